#!/bin/bash
# The integration suite on rxe: every test binary in /run/out/tests.list (NAME PATH), one test at a time.
#
# A test, or a part of one, that cannot run on this device prints a line "SKIPPED WHAT: WHY"; the test is counted as skipped.
# One that knows that this device does something differently prints "DIFFERS WHAT", and checks what this device does.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

one_rxe || { result FAILED suite rxe0 "no device came up"; exit 1; }
export RDMA_TEST_DEVICE=rxe0
cd "$root" || exit

while IFS=$'\t' read -r name path; do
  log=/run/out/suite-$name.log
  status=0
  timeout --kill-after=5 "$RXE_TEST_SECONDS" "$path" --test-threads=1 --show-output >"$log" 2>&1 || status=$?
  awk -v group="$name" -v status="$status" -v seconds="$RXE_TEST_SECONDS" -v OFS='\t' '
    /^test .* \.\.\. / {
      test = $0
      sub(/^test /, "", test)
      sub(/ - should panic/, "", test)
      verdict = test
      sub(/ \.\.\. .*/, "", test)
      sub(/.* \.\.\. /, "", verdict)
      order[++count] = test
      verdicts[test] = verdict
    }
    /^---- .* stdout ----$/ { current = $2 }
    /^SKIPPED / && current != "" { reasons[current] = (reasons[current] == "" ? "" : reasons[current] "; ") substr($0, 9) }
    /^DIFFERS / {
      if (index(differs[current], $2) == 0) differs[current] = (differs[current] == "" ? "" : differs[current] ", ") $2
    }
    # The message is on the line after the place.
    place != "" { panics[current] = $0 " (" place ")"; place = "" }
    /^thread .* panicked at / { place = $0; sub(/.* panicked at /, "", place); sub(/:$/, "", place) }
    # Test programs without the standard harness.
    /^[a-z0-9_]+ \.\.\.$/ { current = $1 }
    /^[a-z0-9_]+ (ok|FAILED)$/ { order[++count] = $1; verdicts[$1] = $2 }
    END {
      for (i = 1; i <= count; i++) {
        test = order[i]
        if (verdicts[test] ~ /^ok/) {
          if (test in reasons) print "skipped", group, test, reasons[test]
          else print "ok", group, test, (test in differs ? "differs: " differs[test] : "")
        } else if (verdicts[test] ~ /^ignored/) {
          print "skipped", group, test, verdicts[test]
        } else {
          failed++
          print "FAILED", group, test, panics[test]
        }
      }
      if (status == 124 || status == 137) print "FAILED", group, "(the binary)", "no end within " seconds " s, in or after " test
      else if (status != 0 && !failed) print "FAILED", group, "(the binary)", "status " status ": " panics[current]
      else if (!count) print "FAILED", group, "(the binary)", "no test ran"
    }' "$log" >>/run/out/results.tsv
done </run/out/tests.list
