#!/usr/bin/env bash
# Counts the instructions of one operation of 64 bytes (8 for fetch-add), posted and completed, in the loops of benches/overhead:
# over the C interface as a C program has it (ci/peers.sh shows that C itself costs the same), through rdma-core, and awaited
# through rdma-async. "device" is what runs inside of the verbs post_send, post_recv and poll_cq; "program" is all the rest: the
# loop and the library. Ratios are to the C-like loop: on null0 of "program", what the library costs; on soft0 of all, what a
# user notices.
#
# Counted is the thread that runs the loop. Under valgrind work takes many times longer, and a millisecond does not: the device's background
# thread, which wakes up that often, would take up more than the loop.
#
# Fails when a ratio on null0, where counts are exact, is more than 2 % above the one in ci/instructions/snapshot.txt. On soft0
# threads and timers make counts vary by some percent; those are for reading. It also fails when a SEND and its RECV, awaited, take
# over 200 instructions more than through rdma-core, or over 400 where the receive was awaited first, and so was pending once.
# usage: ci/instructions.sh [--update]     --update writes the snapshot
. "$(dirname "$0")/lib.sh"
need gcc libc6-dev valgrind
snapshot=ci/instructions/snapshot.txt

step "building benches/overhead"
# As a program is built that asks for nothing special; and across crates, verbs would be inlined where they are not found.
export CARGO_PROFILE_RELEASE_LTO=false
program=$(cargo build --quiet --release --locked --bench overhead --message-format=json |
  sed -n 's/.*"executable":"\([^"]*overhead[^"]*\)".*/\1/p' | tail -1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# All instructions of a run, and those inside of the verbs. usage: count DEVICE API OPERATION ITERATIONS
count() {
  rm -f "$work"/profile*
  timeout 300 valgrind --quiet --tool=callgrind --separate-threads=yes --callgrind-out-file="$work/profile" \
    "$program" count "$@"
  awk '
    # A name stands where its number first comes up: "fn=(12) name", later "fn=(12)".
    function name(line,  id) {
      match(line, /\([0-9]+\)/); id = substr(line, RSTART, RLENGTH)
      if (length(line) > RSTART + RLENGTH) names[id] = substr(line, RSTART + RLENGTH + 1)
      return names[id]
    }
    function is_verb(f) { return f ~ /^(verbs_sys::null|rdma_soft::abi)::(post::post_(send|recv)|cq::poll_cq)$/ }
    /^fn=/ { caller = name($0) }
    /^cfn=/ { callee = name($0) }
    # The line after it has the cost of the call with all that it calls.
    /^calls=/ { getline; if (is_verb(callee) && !is_verb(caller)) inside += $2; next }
    /^[0-9+*-]/ { all += $2 }
    END { print all, inside }' "$work/profile-01"
}

# usage: row DEVICE OPERATION API FEW MANY     two runs, so that what is not the loop cancels out
row() {
  local few many
  few=$(count "$1" "$3" "$2" "$4")
  many=$(count "$1" "$3" "$2" "$5")
  awk -v name="$(printf '%-6s %-10s %-11s' "$1" "$2" "$3")" -v n=$(($5 - $4)) '
    NR == 1 { all = -$1; inside = -$2 }
    NR == 2 { all += $1; inside += $2; printf "%s %10.1f %10.1f %10.1f\n", name, all / n, inside / n, (all - inside) / n }
  ' <<<"$few"$'\n'"$many"
}

step "instructions per operation"
{
  printf '%-6s %-10s %-11s %10s %10s %10s %7s\n' device operation loop all device program ratio
  for device in null0 soft0; do
    few=1000 many=6000
    [ $device = null0 ] || few=200 many=1200
    for operation in send recv-first write read fetch-add; do
      for loop in c-like rdma-core rdma-async; do row $device $operation $loop $few $many; done
    done
  done | awk '{ cost = $1 == "null0" ? $6 : $4; if ($3 == "c-like") base = cost; printf "%s %7.2f\n", $0, cost / base; fflush() }'
} | tee "$work/table"

step "instructions of futures"
awk '
  $1 != "null0" { next }
  { program[$2, $3] = $6 }
  END {
    limit["send"] = 200; limit["recv-first"] = 400
    for (o in limit) {
      more = program[o, "rdma-async"] - program[o, "rdma-core"]
      printf "%-10s %5.0f more than through rdma-core, of %d at most\n", o, more, limit[o]
      if (!(more > 0 && more <= limit[o])) bad++
    }
    exit bad > 0
  }' "$work/table"

if [ "${1:-}" = --update ]; then
  cp "$work/table" $snapshot
  echo "written to $snapshot"
  exit
fi

step "ratios against $snapshot"
awk '
  FNR == 1 { next }
  $1 == "soft0" { next }
  NR == FNR { was[$1, $2, $3] = $7; next }
  { key = $1 SUBSEP $2 SUBSEP $3
    if (!(key in was)) { print $1, $2, $3, "is not in the snapshot"; bad++ }
    # Printed with two digits: half of the last one is no growth.
    else if ($7 > was[key] * 1.02 + 0.005) { print $1, $2, $3 ": " was[key], "grew to", $7; bad++ }
    else if ($7 < was[key] * 0.98) print $1, $2, $3 ": " was[key], "fell to", $7 ": ci/instructions.sh --update keeps it" }
  END { if (bad) exit 1; print "none grew by more than 2 %" }' $snapshot "$work/table"
