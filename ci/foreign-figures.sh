#!/usr/bin/env bash
# ib_send_lat -s 64 and ib_write_bw -s 65536 on the soft device, against rxe in a User-Mode Linux guest and against UDP sockets alone:
# the three in turn, several rounds in one run. Prints the table of docs/PERFORMANCE.md.
# usage: [PREFIX="chrt -f 10"] [ROUNDS=5] ci/foreign-figures.sh      PREFIX goes in front of the programs on UDP and on the soft
# device; the guest runs with the nice value -10 where that is permitted
. "$(dirname "$0")/lib.sh"
need perftest ibverbs-providers iproute2 busybox-static xz-utils util-linux gcc libc6-dev
target=${CARGO_TARGET_DIR:-$PWD/target}
export CARGO_TARGET_DIR=$target
step "cargo build --release -p rdma-preload"
cargo build --release --locked -p rdma-preload
out=$target/figures
mkdir -p "$out"
cc -O2 -Wall -Wextra -o "$out/udp" ci/foreign/udp.c
prefix=${PREFIX:-}
rounds=${ROUNDS:-5}

# The row of figures that perftest printed. usage: figure FILE COLUMN
figure() {
  awk -v column="$2" '/^ *[0-9]+ +[0-9]+ +[0-9.]+/ { value = $column } END { if (value == "") exit 1; print value }' "$1" ||
    { echo "error: no figures in $1" >&2; tail -n 20 "$1" >&2; exit 1; }
}

# A pair on the soft device. usage: soft FILE PROGRAM ARGUMENTS...
soft() {
  local file=$1 port=$((20000 + RANDOM % 10000)) server
  shift
  # PREFIX is words.
  # shellcheck disable=SC2086
  timeout 60 $prefix "$target/release/rdma-soft" run -- "$@" -d soft0 -x 1 -F -p "$port" >/dev/null 2>&1 &
  server=$!
  sleep 0.5
  # shellcheck disable=SC2086
  timeout 60 $prefix "$target/release/rdma-soft" run -- "$@" -d soft0 -x 1 -F -p "$port" 127.0.0.1 >"$file" 2>&1
  wait "$server"
}

median() { sort -n "$1" | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
range() { sort -n "$1" | awk 'NR == 1 { low = $1 } END { print low " to " $1 }'; }

step "UDP, soft, rxe: $rounds rounds (load $(cut -d' ' -f1-3 /proc/loadavg), $(nproc) processors, Linux $(uname -r)${prefix:+, $prefix})"
rm -f "$out"/*.list
for round in $(seq "$rounds"); do
  # The bytes of a message of 64 with BTH and ICRC; the largest path MTU with them.
  # shellcheck disable=SC2086
  timeout 60 $prefix "$out/udp" lat 80 20000 >>"$out/udp-lat.list"
  # shellcheck disable=SC2086
  timeout 60 $prefix "$out/udp" bw 4112 1 >>"$out/udp-bw.list"
  soft "$out/soft-lat.txt" ib_send_lat -s 64 -n 20000
  figure "$out/soft-lat.txt" 5 >>"$out/soft-lat.list"
  soft "$out/soft-bw.txt" ib_write_bw -s 65536 -n 5000
  # perftest's MB are 2^20 bytes.
  figure "$out/soft-bw.txt" 4 | awk '{ printf "%.2f\n", $1 * 1048576 / 1e9 }' >>"$out/soft-bw.list"
  # Never with a real-time priority: the guest's programs spin, and its kernel would not get the processor from them.
  RXE_SECONDS=60 nice -n -10 bash ci/rxe/guest-run.sh ci/foreign/rxe-figures.sh "$out" >/dev/null 2>&1
  figure "$out/ib_send_lat.txt" 5 >>"$out/rxe-lat.list"
  figure "$out/ib_write_bw.txt" 4 | awk '{ printf "%.3f\n", $1 * 1048576 / 1e9 }' >>"$out/rxe-bw.list"
  printf 'round %s: us %s %s %s, GB/s %s %s %s\n' "$round" "$(tail -n1 "$out/udp-lat.list")" "$(tail -n1 "$out/soft-lat.list")" \
    "$(tail -n1 "$out/rxe-lat.list")" "$(tail -n1 "$out/udp-bw.list")" "$(tail -n1 "$out/soft-bw.list")" "$(tail -n1 "$out/rxe-bw.list")"
done

step "median of $rounds rounds, and the range (load $(cut -d' ' -f1-3 /proc/loadavg))"
printf '| %-44s | %-18s | %-18s |\n' "" "send, 64 B, half round trip, us" "write, 64 KiB, GB/s"
printf '|---|---|---|\n'
for kind in "udp:UDP sockets alone" "soft:soft device, native" "rxe:rxe under User-Mode Linux"; do
  printf '| %s | %s (%s) | %s (%s) |\n' "${kind#*:}" "$(median "$out/${kind%%:*}-lat.list")" "$(range "$out/${kind%%:*}-lat.list")" \
    "$(median "$out/${kind%%:*}-bw.list")" "$(range "$out/${kind%%:*}-bw.list")"
done
