# Results of one test program, from its output with --show-output: verdict, group, test and detail, separated by tabs.
# Variables: group, status (the program's), seconds (what it was given).
#
# A test, or a part of one, that cannot run on a device prints a line "SKIPPED WHAT: WHY"; the test is counted as skipped. One
# that knows that the device does something differently prints "DIFFERS WHAT", and checks what this device does.
BEGIN { OFS = "\t" }
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
/^DIFFERS / && index(differs[current], $2) == 0 { differs[current] = (differs[current] == "" ? "" : differs[current] ", ") $2 }
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
}
