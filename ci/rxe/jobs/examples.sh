#!/bin/bash
# The examples on rxe: every line of /run/out/examples.list (NAME PATH ARGUMENTS) is a program that must end with status 0.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
one_rxe || { result FAILED examples rxe0 "no device came up"; exit 1; }
while read -r name path arguments; do
  # The arguments are words.
  # shellcheck disable=SC2086
  run examples "$name $arguments" 60 "$path" $arguments
done </run/out/examples.list
exit 0
