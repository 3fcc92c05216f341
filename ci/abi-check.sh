#!/usr/bin/env bash
# Compares verbs-sys with the system's RDMA headers (read by a C compiler) and with the crate rdma-sys.
. "$(dirname "$0")/lib.sh"
need gcc libc6-dev pkg-config libibverbs-dev librdmacm-dev libclang-14-dev
step "sizes, offsets, constants and signatures of verbs-sys"
cargo run --quiet --locked --manifest-path ci/abi-check/Cargo.toml
