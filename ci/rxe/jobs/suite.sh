#!/bin/bash
# The integration suite on rxe: every test binary in /run/out/tests.list (NAME PATH), one test at a time.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

one_rxe || { result FAILED suite rxe0 "no device came up"; exit 1; }
export RDMA_TEST_DEVICE=rxe0
cd "$root" || exit

while IFS=$'\t' read -r name path; do
  log=/run/out/suite-$name.log
  status=0
  timeout --kill-after=5 "$RXE_TEST_SECONDS" "$path" --test-threads=1 --show-output >"$log" 2>&1 || status=$?
  awk -v group="$name" -v status="$status" -v seconds="$RXE_TEST_SECONDS" -f ci/suite.awk "$log" >>/run/out/results.tsv
done </run/out/tests.list
