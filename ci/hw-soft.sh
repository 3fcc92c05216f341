#!/usr/bin/env bash
# Rehearses ci/hw.sh where there is no hardware: two network namespaces of this machine are the hosts, and the soft device is
# theirs. Needs root. The variables of ci/hw.sh apply.
# usage: ci/hw-soft.sh      ci/hw-soft.sh --in HOST COMMAND is what it gives ci/hw.sh for ssh
. "$(dirname "$0")/lib.sh"
if [ "${1:-}" = --in ]; then
  RDMA_SOFT_ADDR=10.97.0.2 exec ip netns exec "$2" bash -c "$3"
fi
need iproute2
[ "$(id -u)" -eq 0 ] || { echo "error: network namespaces need root: sudo -E $0" >&2; exit 2; }

here=rdma-here-$$ there=rdma-there-$$
trap 'ip netns del $here; ip netns del $there' EXIT
for host in $here $there; do
  ip netns add $host
  ip -n $host link set lo up
done
ip link add wire netns $here type veth peer name wire netns $there
ip -n $here addr add 10.97.0.1/24 dev wire
ip -n $there addr add 10.97.0.2/24 dev wire
for host in $here $there; do ip -n $host link set wire mtu 4200 up; done

# All but async_processes, whose processes would share the one address that a host has here.
export RDMA_TEST_SUITE=${RDMA_TEST_SUITE:-core_.*|async_[^p].*}
export RDMA_TEST_DEVICE=soft0 RDMA_TEST_PEER=$there RDMA_TEST_PEER_ADDR=10.97.0.2 RDMA_TEST_SSH="bash $PWD/ci/hw-soft.sh --in"
RDMA_SOFT_ADDR=10.97.0.1 ip netns exec $here bash ci/hw.sh
