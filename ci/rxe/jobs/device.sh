#!/bin/bash
# The kernel's devices come up, and libibverbs can use them.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

ip link add d0 type dummy
ip link set d0 mtu 4200 up
ip addr add 10.99.0.1/24 dev d0
run device "rxe-setup.sh add" 20 "$root/rxe-setup.sh" add d0 rxe0
run device "rxe-setup.sh add, again" 20 "$root/rxe-setup.sh" add d0 rxe0
run device "rxe-setup.sh status" 20 "$root/rxe-setup.sh" status

pingpong() {
  ibv_rc_pingpong -d rxe0 -g 1 -n 200 &
  sleep 0.3
  ibv_rc_pingpong -d rxe0 -g 1 -n 200 127.0.0.1 && wait $!
}
export -f pingpong
run device "ibv_rc_pingpong on rxe0" 30 bash -c pingpong

run device "rxe-setup.sh remove" 20 "$root/rxe-setup.sh" remove d0 rxe0
run device "rxe-setup.sh remove, again" 20 "$root/rxe-setup.sh" remove d0 rxe0
run device "rxe-setup.sh add --iwarp" 20 "$root/rxe-setup.sh" add --iwarp d0 siw0
run device "siw0 is listed" 20 bash -c 'ibv_devices | grep -w siw0'
