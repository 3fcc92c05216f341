#!/usr/bin/env bash
# The kernel's Soft-RoCE in a User-Mode Linux guest: devices, the integration suite, the examples, interoperation with the soft
# device. Prints a table and `N passed, N failed, N skipped`; fails when anything failed or no device came up.
# usage: ci/rxe.sh [JOB...]      jobs: the files in ci/rxe/jobs, without .sh; default: all
#
# RXE_TESTS is a pattern of test programs for the job suite (those that test a device: core_* and async_*).
# RXE_SECONDS is how long a job may take (480), RXE_TEST_SECONDS one test program (120); RDMA_TEST_SCALE multiplies the
# repetitions of tests (0.05: the guest is slow), and RDMA_STRESS_OPERATIONS is how many async_stress does (600).
# RXE_KERNEL names a kernel to use instead of the one in ci/rxe; RXE_KERNEL=build builds it from Debian's source first.
. "$(dirname "$0")/lib.sh"
command -v cargo >/dev/null || { echo "error: cargo is missing: install Rust (https://rustup.rs)" >&2; exit 1; }
packages=(ibverbs-providers ibverbs-utils iproute2 tcpdump xz-utils jq util-linux mount)
# Any compiler that links, any busybox.
command -v cc >/dev/null || packages+=(gcc libc6-dev)
command -v busybox >/dev/null || packages+=(busybox-static)
need "${packages[@]}"
target=${CARGO_TARGET_DIR:-$PWD/target}
export RXE_SECONDS=${RXE_SECONDS:-480}
# Hundreds of messages a second, not hundreds of thousands.
export RDMA_TEST_SCALE=${RDMA_TEST_SCALE:-0.05} RDMA_STRESS_OPERATIONS=${RDMA_STRESS_OPERATIONS:-600}
export CARGO_TARGET_DIR=$target
out=$target/rxe/out
rm -rf "$out"
mkdir -p "$out/boot"

if [ "${RXE_KERNEL:-}" = build ]; then
  step "building the kernel"
  export RXE_KERNEL=$target/rxe/linux-uml-built
  [ -x "$RXE_KERNEL" ] || bash ci/rxe/build-kernel.sh "$RXE_KERNEL"
fi

jobs=("$@")
if [ $# -eq 0 ]; then
  for job in ci/rxe/jobs/*.sh; do jobs+=("$(basename "$job" .sh)"); done
fi

for job in "${jobs[@]}"; do
  [ -e "ci/rxe/jobs/$job.sh" ] || { echo "error: there is no job $job" >&2; exit 2; }
done

# Before the long part: a machine that no guest runs on.
step "the guest"
if ! RXE_SECONDS=60 bash ci/rxe/guest-run.sh ci/rxe/boot.sh "$out/boot" 2>&1 | tee "$out/boot/log"; then
  echo "error: no User-Mode Linux guest runs here. It needs x86-64, a process that may trace its children (ptrace, seccomp: not under a" >&2
  echo "strict container profile), and 1.2 GB of memory. A kernel of your own: RXE_KERNEL=FILE, or RXE_KERNEL=build." >&2
  exit 1
fi

# What the jobs run is built here, with this machine's toolchain: the guest sees the same files.
step "building the tests, the examples and rdma-interop"
cargo test --no-run --locked -p rdma-workbench --message-format=json-render-diagnostics >"$out/artifacts.json"
# An example with tests of its own is not built by that.
cargo build --locked -p rdma-workbench --examples --message-format=json-render-diagnostics >>"$out/artifacts.json"

prepare() {
  local name arguments
  case $1 in
    suite)
      programs test "$out/artifacts.json" | grep -E "^(${RXE_TESTS:-(core|async)_.*})"$'\t' >"$2/tests.list" || { echo "error: no such test program in tests/" >&2; return 1; }
      ;;
    examples)
      while read -r name arguments; do
        [ -z "$name" ] || printf '%s %s %s\n' "$name" "$(programs example "$out/artifacts.json" | awk -v name="$name" '$1 == name { print $2 }')" "$arguments"
      done < <(grep -v '^#' ci/rxe/examples.list) >"$2/examples.list"
      ;;
    interop) programs bin "$out/artifacts.json" | awk '$1 == "rdma-interop" { print $2 }' >"$2/program" ;;
  esac
}

for job in "${jobs[@]}"; do
  step "$job"
  mkdir -p "$out/$job"
  prepare "$job" "$out/$job"
  printf 'export RDMA_TEST_SCALE=%q RDMA_STRESS_OPERATIONS=%q RXE_TEST_SECONDS=%q\n' "$RDMA_TEST_SCALE" "$RDMA_STRESS_OPERATIONS" \
    "${RXE_TEST_SECONDS:-120}" >"$out/$job/environment"
  status=0
  bash ci/rxe/guest-run.sh "ci/rxe/jobs/$job.sh" "$out/$job" || status=$?
  [ "$status" = 0 ] || printf 'FAILED\t%s\t%s\t%s\n' "$job" "(the job)" "status $status" >>"$out/$job/results.tsv"
  [ -s "$out/$job/results.tsv" ] || printf 'FAILED\t%s\t%s\t%s\n' "$job" "(the job)" "no results" >>"$out/$job/results.tsv"
  table "$out/$job/results.tsv"
done

step "rxe: results (logs in $out)"
summary "$out"/*/results.tsv
