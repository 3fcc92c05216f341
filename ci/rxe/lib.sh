# shellcheck shell=bash
# Sourced by the jobs in the guest: devices to test on, and where results go.

# What ci/rxe.sh passes on: the guest has an environment of its own.
[ ! -e /run/out/environment ] || . /run/out/environment

# Records a result. usage: result ok|FAILED|skipped GROUP NAME [DETAIL]
result() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>/run/out/results.tsv
}

# Runs a command with its output in a log file, and records whether it worked within the time.
# usage: run GROUP NAME SECONDS COMMAND...
run() {
  local group=$1 name=$2 seconds=$3 status=0
  local log=/run/out/$group-${name//[^[:alnum:]._-]/_}.log
  shift 3
  timeout --kill-after=5 "$seconds" "$@" >"$log" 2>&1 </dev/null || status=$?
  case $status in
    0) result ok "$group" "$name" ;;
    124 | 137) result FAILED "$group" "$name" "no end within $seconds s: $(tail -n 1 "$log")" ;;
    *) result FAILED "$group" "$name" "status $status: $(tail -n 1 "$log")" ;;
  esac
  return "$status"
}

# Waits until GID index 1, the IPv4-mapped one, is there. usage: wait_for_gid DEVICE
wait_for_gid() {
  local gid=/sys/class/infiniband/$1/ports/1/gids/1
  for _ in $(seq 100); do
    [ "$(cat "$gid" 2>/dev/null)" != 0000:0000:0000:0000:0000:0000:0000:0000 ] && [ -e "$gid" ] && return
    sleep 0.05
  done
  echo "no GID at index 1 of $1" >&2
  return 1
}

# One device, rxe0, on a dummy interface: GID index 1 is ::ffff:10.99.0.1. Its traffic stays in the device.
one_rxe() {
  ip link add d0 type dummy
  ip link set d0 mtu 4200 up
  ip addr add 10.99.0.1/24 dev d0
  rdma link add rxe0 type rxe netdev d0
  wait_for_gid rxe0
}

# A wire: interface va with 10.98.0.1 in namespace a, vb with 10.98.0.2 in namespace b.
wire() {
  local n
  ip netns add a
  ip netns add b
  ip link add va netns a type veth peer name vb netns b
  for n in a b; do
    ip -n $n link set lo up
    ip -n $n link set v$n mtu 4200 up
  done
  ip -n a addr add 10.98.0.1/24 dev va
  ip -n b addr add 10.98.0.2/24 dev vb
}

# An rxe device at one end of the wire. Every namespace sees it, so name it. usage: rxe_at a|b
rxe_at() {
  ip netns exec "$1" rdma link add "rxe_$1" type rxe netdev "v$1"
  wait_for_gid "rxe_$1"
}

# Loss in percent, each way; 0 ends it. usage: loss PERCENT
loss() {
  local n
  for n in a b; do
    ip netns exec $n tc qdisc del dev v$n root 2>/dev/null
    [ "$1" = 0 ] || ip netns exec $n tc qdisc add dev v$n root netem loss "$1%"
  done
}

# A counter of an rxe device. usage: counter DEVICE NAME
counter() {
  cat "/sys/class/infiniband/$1/ports/1/hw_counters/$2"
}
