#!/usr/bin/env bash
# Checks the exact messages of the compiler for programs that rdma-core must not let compile. They are one compiler's
# wording, so that compiler is stated here; `cargo test` checks only that such programs do not compile.
. "$(dirname "$0")/lib.sh"
toolchain=1.95.0

if ! rustup run "$toolchain" rustc --version >/dev/null 2>&1; then
  echo "error: the messages are those of Rust $toolchain, which is not installed: rustup toolchain install $toolchain --profile minimal" >&2
  exit 2
fi
step "messages of Rust $toolchain"
cargo "+$toolchain" test --quiet --locked --manifest-path ci/compile-fail/Cargo.toml
