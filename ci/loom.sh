#!/usr/bin/env bash
# Runs the loom models, every interleaving of several parties: at a slot of work in flight (rdma-core/src/inflight/slot_loom.rs), and at who
# looks for the completions of a queue that futures wait on (ci/loom/src/lib.rs).
. "$(dirname "$0")/lib.sh"
export RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
step "loom: slots of work in flight"
cargo test --release --locked -p rdma-core-rs --no-default-features --lib loom
step "loom: who looks for completions"
cargo test --release --locked --manifest-path ci/loom/Cargo.toml
