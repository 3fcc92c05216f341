#!/usr/bin/env bash
# Counts instructions of one 64-byte SEND and RECV, posted and both completions polled: the same loop in C and through Rust
# crates. Prints two tables, on the null provider and on the built-in device: per iteration all instructions, those of the
# provider, the rest, and all of them as a ratio to those of C.
# usage: ci/peers.sh [PROGRAM...]     default: all. Without ibverbs-loop, whose build takes minutes:
#        ci/peers.sh c raw safe async-ready async-pending
. "$(dirname "$0")/lib.sh"
need gcc libc6-dev libibverbs-dev valgrind

# A program takes the number of iterations as its only argument. Add one here, and its binary to ci/peers/loops.
programs=("$@")
[ $# -gt 0 ] || programs=(c raw safe ibverbs-loop async-ready async-pending)
wants() { [[ " ${programs[*]} " == *" $1 "* ]]; }

build=${CARGO_TARGET_DIR:-$PWD/ci/peers/target}
export CARGO_TARGET_DIR=$build
step "building the null provider and the programs"
cargo build --quiet --release --locked --manifest-path ci/peers/Cargo.toml
if wants ibverbs-loop; then
  # The crate ibverbs compiles all of rdma-core for a few headers, and reads those with libclang.
  need cmake libclang-dev
  cargo build --quiet --release --locked --manifest-path ci/peers/Cargo.toml -p ibverbs-loop
fi
bash ci/build-libibverbs.sh "$build/soft" >/dev/null
mkdir -p "$build/lib" "$build/bin"
cp "$build/release/libnull_verbs.so" "$build/lib/libibverbs.so.1"
cc -O2 -g -Wall -Wextra -o "$build/bin/c" ci/peers/c-loop.c "$build/lib/libibverbs.so.1"
for program in "${programs[@]}"; do
  [ "$program" = c ] || cp "$build/release/$program" "$build/bin/$program"
done

# All instructions and the provider's, of one run. Read from the profile itself: callgrind_annotate does not name the
# object of inlined code. usage: count PROVIDER PROGRAM ITERATIONS
count() {
  local profile
  profile=$(mktemp)
  # The library has no version nodes, and ld.so says so.
  LD_LIBRARY_PATH=$build/$1 timeout 300 valgrind --quiet --tool=callgrind --callgrind-out-file="$profile" \
    "$build/bin/$2" "$3" >/dev/null 2>"$profile.log" || { cat "$profile.log" >&2; return 1; }
  awk '
    # An object is named where its number first comes up, which may be in a call.
    /^c?ob=/ { split($1, id, "="); if (NF > 1) is_provider[id[2]] = $2 ~ /libibverbs\.so\.1$/ }
    /^ob=/ { here = is_provider[id[2]] }
    /^calls=/ { getline; next } # what the callee cost, counted there
    /^[0-9+*-]/ { all += $2; if (here) provider += $2 }
    END { print all, provider }' "$profile"
  rm -f "$profile" "$profile.log"
}

# usage: table PROVIDER PROGRAM...
table() {
  local provider=$1 program all_few provider_few all_many provider_many c=0
  # Two runs, so that what is not the loop cancels out.
  local few=1000 many=11000
  printf '%-14s %8s %10s %8s %6s\n' program all provider rest ratio
  shift
  for program in "$@"; do
    read -r all_few provider_few <<<"$(count "$provider" "$program" $few)"
    read -r all_many provider_many <<<"$(count "$provider" "$program" $many)"
    [ "$program" != c ] || c=$((all_many - all_few))
    awk -v name="$program" -v n=$((many - few)) -v all=$((all_many - all_few)) -v provider=$((provider_many - provider_few)) -v c="$c" \
      'BEGIN { printf "%-14s %8.1f %10.1f %8.1f %6s\n", name, all / n, provider / n, (all - provider) / n, c ? sprintf("%.2f", all / c) : "-" }'
  done
}

step "instructions per iteration, on the null provider"
table lib "${programs[@]}"
# Those that take whichever device there is.
on_soft=()
for program in c safe ibverbs-loop; do
  if wants "$program"; then on_soft+=("$program"); fi
done
if [ ${#on_soft[@]} -gt 0 ]; then
  step "instructions per iteration, on the built-in device"
  table soft "${on_soft[@]}"
fi
