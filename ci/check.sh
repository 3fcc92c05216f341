#!/usr/bin/env bash
# Format, lints and documentation, warnings as errors; and that the build needs nothing but Rust and a C linker.
. "$(dirname "$0")/lib.sh"

step format
cargo fmt --all --check

step clippy
cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

step documentation
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features --locked

step "no build dependency on a machine's RDMA packages"
# What a bare machine lacks: generators, C build systems, and the crates that bring them.
tree=$(cargo tree -e all --workspace --locked --prefix none --format '{p}')
if grep -E '^(bindgen|cmake|pkg-config|ibverbs|ibverbs-sys|rdma-sys) ' <<<"$tree"; then
  echo "error: the packages above must not be in the workspace's dependency tree" >&2
  exit 1
fi
echo "$(sort -u <<<"$tree" | wc -l) packages, none of them bindgen, cmake, pkg-config, ibverbs or rdma-sys"

step "another processor: aarch64"
# Types of the C interface differ there, `char` first of all.
target=aarch64-unknown-linux-gnu
if rustup target add "$target" 2>/dev/null; then
  cargo check --workspace --all-targets --locked --target "$target"
else
  echo "skipped: no rustup here to install the target $target" >&2
fi
