#!/usr/bin/env bash
# Runs the loom models: every interleaving of the parties at a slot of work in flight (rdma-core/src/inflight/slot_loom.rs).
. "$(dirname "$0")/lib.sh"
step "loom"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom" \
  cargo test --release --locked -p rdma-core-rs --no-default-features --lib loom
