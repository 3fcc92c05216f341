#!/usr/bin/env bash
# Counts instructions of one 64-byte SEND and RECV, posted and both completions polled, on the null provider: the same
# loop in C and through Rust crates. Prints a table: per iteration all instructions, those of the provider, and the rest.
# usage: ci/peers.sh [PROGRAM...]     default: all
. "$(dirname "$0")/lib.sh"
need gcc libc6-dev libibverbs-dev valgrind

# The crate ibverbs is missing here: its build compiles the C libraries with cmake, which the machines that this ran on lack.
# A program takes the number of iterations as its only argument. Add one here, and its binary to ci/peers/loops.
programs=("$@")
[ $# -gt 0 ] || programs=(c raw safe async-ready async-pending)

build=${CARGO_TARGET_DIR:-$PWD/ci/peers/target}
export CARGO_TARGET_DIR=$build
step "building the null provider and the programs"
cargo build --quiet --release --locked --manifest-path ci/peers/Cargo.toml
mkdir -p "$build/lib" "$build/bin"
cp "$build/release/libnull_verbs.so" "$build/lib/libibverbs.so.1"
cc -O2 -g -Wall -Wextra -o "$build/bin/c" ci/peers/c-loop.c "$build/lib/libibverbs.so.1"
for program in "${programs[@]}"; do
  [ "$program" = c ] || cp "$build/release/$program" "$build/bin/$program"
done

# All instructions and the provider's, of one run. Read from the profile itself: callgrind_annotate does not name the
# object of inlined code. usage: count PROGRAM ITERATIONS
count() {
  local profile
  profile=$(mktemp)
  LD_LIBRARY_PATH=$build/lib timeout 300 valgrind --quiet --tool=callgrind --callgrind-out-file="$profile" "$build/bin/$1" "$2" >/dev/null
  awk '
    # An object is named where its number first comes up, which may be in a call.
    /^c?ob=/ { split($1, id, "="); if (NF > 1) is_provider[id[2]] = $2 ~ /libibverbs\.so\.1$/ }
    /^ob=/ { here = is_provider[id[2]] }
    /^calls=/ { getline; next } # what the callee cost, counted there
    /^[0-9+*-]/ { all += $2; if (here) provider += $2 }
    END { print all, provider }' "$profile"
  rm -f "$profile"
}

# Two runs, so that what is not the loop cancels out.
few=1000 many=11000
step "instructions per iteration"
printf '%-12s %8s %10s %8s\n' program all provider rest
for program in "${programs[@]}"; do
  read -r all_few provider_few <<<"$(count "$program" $few)"
  read -r all_many provider_many <<<"$(count "$program" $many)"
  awk -v name="$program" -v n=$((many - few)) -v all=$((all_many - all_few)) -v provider=$((provider_many - provider_few)) \
    'BEGIN { printf "%-12s %8.1f %10.1f %8.1f\n", name, all / n, provider / n, (all - provider) / n }'
done
