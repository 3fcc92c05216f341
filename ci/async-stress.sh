#!/usr/bin/env bash
# A million operations in every wait mode of rdma-async, optimised, with no lost wake-up: tests/async_stress.rs.
# usage: ci/async-stress.sh [OPERATIONS]     default: 1000000
. "$(dirname "$0")/lib.sh"
export RDMA_STRESS_OPERATIONS=${1:-1000000}
step "$RDMA_STRESS_OPERATIONS operations in every wait mode"
timeout 1800 cargo test --release --locked -p rdma-workbench --test async_stress -- --nocapture
