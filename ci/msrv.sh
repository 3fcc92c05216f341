#!/usr/bin/env bash
# Checks that everything but the benchmarks' and tests' own code compiles with the oldest Rust that Cargo.toml promises.
# usage: ci/msrv.sh
. "$(dirname "$0")/lib.sh"
msrv=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
step "cargo +$msrv check"
if ! cargo "+$msrv" --version 2>/dev/null; then
  echo "error: the toolchain $msrv is missing: rustup toolchain install $msrv --profile minimal" >&2
  exit 1
fi
cargo "+$msrv" check --workspace --all-features --examples --locked
