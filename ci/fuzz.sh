#!/usr/bin/env bash
# Fuzzes every target of fuzz/ and prints executions and coverage of each.
# usage: ci/fuzz.sh SECONDS [TARGET...]      the time is shared by the targets; default: all of them
# Exits with 1 if a target crashed, hung, leaked or did not build. Needs a nightly toolchain; installs cargo-fuzz itself.
. "$(dirname "$0")/lib.sh"

seconds=${1:-}
if ! [[ $seconds =~ ^[0-9]+$ ]]; then
  sed -n 's/^# \(usage.*\)/\1/p' "$0" >&2
  exit 2
fi
shift

if ! cargo +nightly --version >/dev/null 2>&1; then
  echo "error: libFuzzer needs a nightly compiler, and there is none: rustup toolchain install nightly --profile minimal" >&2
  exit 2
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
  step "cargo install cargo-fuzz"
  cargo install --quiet --locked cargo-fuzz || {
    echo "error: cargo-fuzz is missing and could not be installed" >&2
    exit 2
  }
fi

targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  mapfile -t targets < <(cargo +nightly fuzz list | grep -v '^seed_corpus$')
fi
if [ ${#targets[@]} -eq 0 ]; then
  echo "error: no fuzz targets" >&2
  exit 2
fi
each=$((seconds / ${#targets[@]}))
[ "$each" -gt 0 ] || each=1

step "corpus"
cargo run --quiet --manifest-path fuzz/Cargo.toml --bin seed_corpus -- rdma-soft/tests/vectors fuzz/corpus

log=$(mktemp)
trap 'rm -f "$log"' EXIT
summary=()
failed=0
for target in "${targets[@]}"; do
  step "$target: build"
  cargo +nightly fuzz build --release "$target" || { summary+=("$target: did not build"); failed=1; continue; }
  mkdir -p "fuzz/corpus/$target"
  step "$target: $each s"
  status=0
  cargo +nightly fuzz run --release "$target" -- \
    -max_total_time="$each" -timeout=60 -rss_limit_mb=2048 -print_final_stats=1 -max_len=4400 >"$log" 2>&1 || status=$?
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
  coverage=$(grep -o 'cov: [0-9]* ft: [0-9]* corp: [0-9]*' "$log" | tail -n 1 || true)
  line="$target: ${executions:-0} executions, ${coverage:-no coverage}"
  if [ "$status" -ne 0 ]; then
    tail -n 60 "$log"
    line="$line, FAILED"
    failed=1
  fi
  summary+=("$line")
done

step "summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
