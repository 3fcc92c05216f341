#!/usr/bin/env bash
# Runs the suites of rdma-core under AddressSanitizer and ThreadSanitizer: memory that the device touches after it was
# freed or lent out, and data races, of the library and of the built-in device. Needs a nightly toolchain.
# usage: ci/sanitize.sh [address] [thread]      default: both
. "$(dirname "$0")/lib.sh"

if ! cargo +nightly --version >/dev/null 2>&1; then
  echo "SKIPPED sanitizers: there is no nightly compiler (rustup toolchain install nightly --profile minimal)"
  exit 0
fi
host=$(rustc -vV | sed -n 's/^host: //p')
case $host in
  x86_64-*-linux-gnu | aarch64-*-linux-gnu) ;;
  *) echo "SKIPPED sanitizers: not on $host"; exit 0 ;;
esac

suppressions=$(mktemp)
trap 'rm -f "$suppressions"' EXIT
# The standard library is not instrumented: what it does to pass a value to another thread is invisible. A line here hides
# every report with such a frame anywhere on its stack, so none may name our code, nor what is below it on every
# stack (std::thread, std::sys, test). This one is the channel of the test harness.
cat >"$suppressions" <<'EOF'
race:std::sync::mpmc
race:alloc::sync::Arc<std::sync::poison::mutex::Mutex<core::option::Option<test::run_test
EOF

# usage: suites SANITIZER RUSTFLAGS
suites() {
  export CARGO_TARGET_DIR="$target/$1"
  step "$1: rdma-core on the null and the evil provider"
  RUSTFLAGS="$2" cargo +nightly test --locked --target "$host" -p rdma-core-rs --lib --test evil --test null_basic
  step "$1: rdma-core on the built-in device"
  RUSTFLAGS="$2" cargo +nightly test --locked --target "$host" -p rdma-workbench \
    --test core_operations --test core_safety --test core_objects --test core_timestamps
}

target="${CARGO_TARGET_DIR:-target}/sanitize"
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(address thread)
for sanitizer in "${wanted[@]}"; do
  case $sanitizer in
    # Leaks are the point of some tests: what must not be freed is forgotten.
    address) ASAN_OPTIONS=detect_leaks=0 suites address "-Zsanitizer=address" ;;
    thread)
      TSAN_OPTIONS="suppressions=$suppressions halt_on_error=0" \
        suites thread "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"
      ;;
    *)
      sed -n 's/^# \(usage: ci.*\)/\1/p' "$0" >&2
      exit 2
      ;;
  esac
done
step "clean"
