#!/bin/bash
# In the guest: the two programs on rxe, whose output goes to /run/out.
. "$(dirname "${BASH_SOURCE[0]}")/../rxe/lib.sh"
one_rxe
for program in "ib_send_lat -s 64 -n 2000" "ib_write_bw -s 65536 -n 300"; do
  # The program's arguments are words.
  # shellcheck disable=SC2086
  {
    timeout 60 $program -d rxe0 -x 1 -F >/dev/null &
    sleep 0.5
    timeout 60 $program -d rxe0 -x 1 -F 10.99.0.1 || exit 1
    wait $!
  } >"/run/out/${program%% *}.txt" 2>&1
done
