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

sources=$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library

# usage: suites SANITIZER RUSTFLAGS [CARGO OPTION...]
suites() {
  local flags=$2
  export CARGO_TARGET_DIR="$target/$1"
  step "$1: rdma-core on the null and the evil provider"
  RUSTFLAGS="$flags" cargo +nightly test --locked --target "$host" "${@:3}" -p rdma-core-rs --lib --test evil --test null_basic --test null_credits
  step "$1: rdma-core on the built-in device"
  RUSTFLAGS="$flags" cargo +nightly test --locked --target "$host" "${@:3}" -p rdma-workbench \
    --test core_operations --test core_safety --test core_objects --test core_timestamps
}

target="${CARGO_TARGET_DIR:-target}/sanitize"
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(address thread)
for sanitizer in "${wanted[@]}"; do
  case $sanitizer in
    # Leaks are the point of some tests: what must not be freed is forgotten.
    address) ASAN_OPTIONS=detect_leaks=0 suites address "-Zsanitizer=address" ;;
    # With the standard library built anew: what that of the toolchain does to pass a value to another thread is invisible to
    # the sanitizer, which then reports races all over. So there is nothing to suppress.
    thread)
      if [ ! -d "$sources" ]; then
        echo "SKIPPED thread: the nightly compiler has no sources of the standard library (rustup component add rust-src --toolchain nightly)"
        continue
      fi
      TSAN_OPTIONS="halt_on_error=0" suites thread "-Zsanitizer=thread" -Zbuild-std
      ;;
    *)
      sed -n 's/^# \(usage: ci.*\)/\1/p' "$0" >&2
      exit 2
      ;;
  esac
done
step "clean"
