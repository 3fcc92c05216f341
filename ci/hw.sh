#!/usr/bin/env bash
# The integration suite, the interoperation matrix and the benchmarks on RDMA hardware of two hosts: this one, and a peer that ssh reaches.
# Prints a table and `N passed, N failed, N skipped`; fails when anything failed, or when something that it needs is missing.
#
#   RDMA_TEST_DEVICE=mlx5_0 RDMA_TEST_PEER=host2 ci/hw.sh
#
# RDMA_TEST_DEVICE       the RDMA device here
# RDMA_TEST_PEER         the other host, as ssh takes it; `local`: another process on this one
# RDMA_TEST_PEER_DEVICE  the device there (the same name as here)
# RDMA_TEST_PEER_ADDR    IPv4 address of the other host for TCP (what its name resolves to)
# RDMA_TEST_PORT         first of eight TCP ports there (7471)
# RDMA_TEST_SSH          how commands get there (ssh -o BatchMode=yes)
# RDMA_TEST_SUITE        pattern of the suite's test programs ((core|async)_.*)
# RDMA_TEST_PROFILE      release; dev builds sooner, and its figures mean nothing
#
# The programs are built here and copied: both hosts have the same architecture, and the peer a C library that is not older.
. "$(dirname "$0")/lib.sh"

missing() { printf 'error: %s\n' "$@" >&2; exit 2; }
[ -n "${RDMA_TEST_DEVICE:-}" ] || missing "RDMA_TEST_DEVICE is not set: name the RDMA device to test (here are: $(ls /sys/class/infiniband 2>/dev/null | xargs))"
[ -n "${RDMA_TEST_PEER:-}" ] || missing "RDMA_TEST_PEER is not set: name the other host as ssh takes it, or say local"
need jq

device=$RDMA_TEST_DEVICE peer=$RDMA_TEST_PEER port=${RDMA_TEST_PORT:-7471}
peer_device=${RDMA_TEST_PEER_DEVICE:-$device}
read -r -a ssh <<<"${RDMA_TEST_SSH:-ssh -o BatchMode=yes}"
if [ "$peer" = local ]; then
  address=127.0.0.1
else
  host=${peer#*@}
  address=${RDMA_TEST_PEER_ADDR:-$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }')}
  [ -n "$address" ] || missing "$host has no IPv4 address: set RDMA_TEST_PEER_ADDR"
fi

# Runs a command there.
there() {
  if [ "$peer" = local ]; then bash -c "$*"; else "${ssh[@]}" "$peer" "$*"; fi
}
there true || missing "no command runs on $peer: ${ssh[*]} $peer true failed"

out=${CARGO_TARGET_DIR:-$PWD/target}/hw
rm -rf "$out"
mkdir -p "$out/bin"
results=$out/results.tsv
result() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$results"; }

step "building the tests, the examples and rdma-interop"
profile=${RDMA_TEST_PROFILE:-release}
cargo test --profile "$profile" --no-run --locked -p rdma-workbench --message-format=json-render-diagnostics >"$out/artifacts.json"
# An example with tests of its own is not built by that.
cargo build --profile "$profile" --locked -p rdma-workbench --examples --message-format=json-render-diagnostics >>"$out/artifacts.json"
for kind in test example bin; do
  mkdir "$out/bin/$kind"
  while IFS=$'\t' read -r name path; do cp "$path" "$out/bin/$kind/$name"; done < <(programs $kind "$out/artifacts.json")
done

step "copying them to $peer"
folder=$(there mktemp -d)
trap 'there rm -rf "$folder"' EXIT
tar -C "$out" -cf - bin | there "tar -C $folder -xf -"

step "devices"
for side in here there; do
  if [ $side = here ]; then
    "$out/bin/example/device_info" --device "$device" >"$out/device-here.log" 2>&1 && status=0 || status=$?
  else
    there "$folder/bin/example/device_info --device $peer_device" >"$out/device-there.log" 2>&1 && status=0 || status=$?
  fi
  cat "$out/device-$side.log"
  [ $status = 0 ] || missing "no usable device $side: $(tail -n 1 "$out/device-$side.log")"
done

# The suite has both ends of each connection on one device, so it runs on each.
step "the suite, here and there"
for test in "$out"/bin/test/*; do
  name=${test##*/}
  [[ $name =~ ^(${RDMA_TEST_SUITE:-(core|async)_.*})$ ]] || continue
  for side in here there; do
    status=0
    if [ $side = here ]; then
      RDMA_TEST_DEVICE=$device timeout --kill-after=5 600 "$test" --test-threads=1 --show-output >"$out/$name-$side.log" 2>&1 || status=$?
    else
      there "cd $folder && RDMA_TEST_DEVICE=$peer_device timeout --kill-after=5 600 bin/test/$name --test-threads=1 --show-output" \
        >"$out/$name-$side.log" 2>&1 || status=$?
    fi
    awk -v group="$name-$side" -v status=$status -v seconds=600 -f ci/suite.awk "$out/$name-$side.log" >>"$results"
  done
done

step "every operation between the hosts, each as requester"
interop() {
  local requester=$1 status=0 verdict name detail
  if [ "$requester" = here ]; then
    there "timeout 300 $folder/bin/bin/rdma-interop --device $peer_device --listen $address:$port" >"$out/interop-responder.log" 2>&1 &
    timeout 300 "$out/bin/bin/rdma-interop" --device "$device" "$address:$port" >"$out/interop.tsv" 2>"$out/interop-requester.log" || status=$?
  else
    there "timeout 300 $folder/bin/bin/rdma-interop --device $peer_device --listen $address:$port" >"$out/interop.tsv" 2>"$out/interop-requester.log" &
    timeout 300 "$out/bin/bin/rdma-interop" --device "$device" --respond "$address:$port" >"$out/interop-responder.log" 2>&1 || status=$?
  fi
  wait $! || true
  while IFS=$'\t' read -r verdict name detail; do result "$verdict" "interop-$requester" "$name" "$detail"; done <"$out/interop.tsv"
  [ -s "$out/interop.tsv" ] || result FAILED "interop-$requester" "(the run)" "status $status: $(tail -n 1 "$out/interop-requester.log")"
}
interop here
port=$((port + 1))
interop there

step "benchmarks between the hosts"
benchmark() {
  local name=$1 status=0
  # Its own port, so that a server that was left alone is not taken for the next one.
  port=$((port + 1))
  shift
  local what="$name $*"
  local log="$out/bench-${what// /}.log" peer_log="$out/bench-${what// /}-peer.log"
  there "timeout 120 $folder/bin/example/$name --device $peer_device --listen $address:$port $*" >"$peer_log" 2>&1 &
  for _ in $(seq 300); do
    if grep -q '^listening on' "$peer_log" || ! kill -0 $! 2>/dev/null; then break; fi
    sleep 0.1
  done
  timeout 120 "$out/bin/example/$name" --device "$device" "$@" "$address:$port" >"$log" 2>&1 || status=$?
  cat "$log"
  if [ $status = 0 ]; then
    wait $! || true
    result ok benchmarks "$what" "$(tail -n 1 "$log")"
  else
    result FAILED benchmarks "$what" "status $status: $(tail -n 1 "$log"); there: $(tail -n 1 "$peer_log")"
  fi
}
benchmark rc_pingpong --mode busy
benchmark rc_pingpong --mode event
benchmark rc_pingpong --mode busy --verb write
benchmark send_bw
benchmark write_bw
benchmark read_bw

step "hardware: results (logs in $out)"
table "$results"
summary "$results"
