#!/bin/bash
# The soft device against the kernel's rxe on a wire, both ways, without and with loss. /run/out/program is rdma-interop.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
program=$(cat /run/out/program)
wire
rxe_at a || { result FAILED interop rxe_a "no device came up"; exit 1; }

# rxe is at a, the soft device at b.
at_a() { ip netns exec a "$program" --device rxe_a --gid-index 1 "$@"; }
at_b() { RDMA_SOFT_ADDR=10.98.0.2 RDMA_SOFT_PCAP=/run/capture.pcap ip netns exec b "$program" --device soft0 "$@"; }

counters_of_rxe() {
  local file
  for file in /sys/class/infiniband/rxe_a/ports/1/hw_counters/*; do
    printf '%s %s\n' "${file##*/}" "$(<"$file")"
  done
}

# Runs both sides and records every case; where one failed, what the soft device sent and received is kept in GROUP.pcap. usage: interop GROUP REQUESTER RESPONDER ARGUMENT...
interop() {
  local group=$1 requester=$2 responder=$3 address=10.98.0.1 status=0 verdict name detail
  shift 3
  [ "$responder" = at_a ] || address=10.98.0.2
  counters_of_rxe >/run/before
  timeout --kill-after=5 240 bash -c "$responder --listen $address:7471" >"/run/out/$group-responder.log" 2>&1 &
  timeout --kill-after=5 240 bash -c "$requester $* $address:7471" >"/run/out/$group.tsv" 2>"/run/out/$group-requester.log" || status=$?
  wait $!
  # The kernel shows a device's counters only outside of the namespaces.
  local rxe=responder
  [ "$requester" = at_b ] || rxe=requester
  counters_of_rxe | awk 'NR == FNR { before[$1] = $2; next } { print "counter", $1, $2 - before[$1] }' /run/before - >>"/run/out/$group-$rxe.log"
  while IFS=$'\t' read -r verdict name detail; do
    result "$verdict" "$group" "$name" "$detail"
  done <"/run/out/$group.tsv"
  if ! [ -s "/run/out/$group.tsv" ] || [ "$status" -gt 1 ]; then
    result FAILED "$group" "(the run)" "status $status: $(tail -n 1 "/run/out/$group-requester.log")"
  fi
  [ "$status" = 0 ] || cp /run/capture.pcap "/run/out/$group.pcap"
}

# Records whether the counters of a side, together, are above zero. usage: counted GROUP SIDE NAME...
counted() {
  local group=$1 side=$2 sum
  shift 2
  sum=$(awk -v names="$*" 'BEGIN { split(names, list, " "); for (i in list) wanted[list[i]] } $1 == "counter" && $2 in wanted { sum += $3 } END { print sum + 0 }' \
    "/run/out/$group-$side.log")
  if [ "$sum" -gt 0 ]; then
    result ok "$group" "counters of the $side ($*)" "$sum"
  else
    result FAILED "$group" "counters of the $side ($*)" "0"
  fi
}

export -f at_a at_b
export program
interop soft-to-rxe at_b at_a
counted soft-to-rxe responder send_rnr_err
counted soft-to-rxe requester rcvd_rnr_err
interop rxe-to-soft at_a at_b
counted rxe-to-soft requester rcvd_rnr_err
counted rxe-to-soft responder send_rnr_err

# One system call of the soft device sends many packets, which the interface sees as one of many times the path MTU: a
# capture shows it, and rxe takes all of them in order.
ip netns exec b tcpdump -i vb -n -Q out --immediate-mode -l 'udp dst port 4791' >/run/out/segmented.txt 2>/run/out/segmented-tcpdump.log &
tcpdump=$!
for _ in $(seq 100); do
  grep -q '^listening on' /run/out/segmented-tcpdump.log && break
  sleep 0.05
done
interop segmented at_b at_a --mtus 1024 --sizes 65536 --only "'RC write,'"
kill "$tcpdump"
wait "$tcpdump"
longest=$(sed -n 's/.* UDP, length \([0-9]*\)$/\1/p' /run/out/segmented.txt | sort -n | tail -n 1)
# 1024 bytes of payload, 16 of headers and checksum, per packet.
if [ "$((${longest:-0} / 1040))" -ge 3 ]; then
  result ok segmented "packets in one send that rxe took" "$((longest / 1040)) ($longest bytes)"
else
  result FAILED segmented "packets in one send that rxe took" "the longest is ${longest:-none} bytes"
fi
for name in out_of_seq_request duplicate_request; do
  count=$(awk -v name="$name" '$1 == "counter" && $2 == name { print $3 }' /run/out/segmented-responder.log)
  if [ "$count" = 0 ]; then result ok segmented "counter of rxe ($name)" 0; else result FAILED segmented "counter of rxe ($name)" "$count"; fi
done

loss 5
sizes=(--mtus 1024 --sizes 1,4096,65536)
interop lossy-soft-to-rxe at_b at_a --lossy "${sizes[@]}"
counted lossy-soft-to-rxe requester retransmitted_pkts
counted lossy-soft-to-rxe responder duplicate_request out_of_seq_request
interop lossy-rxe-to-soft at_a at_b --lossy "${sizes[@]}"
counted lossy-rxe-to-soft requester completer_retry_err rcvd_seq_err
counted lossy-rxe-to-soft responder duplicate_request out_of_seq_request
exit 0
