#!/usr/bin/env bash
# The README's test command.
. "$(dirname "$0")/lib.sh"
step "cargo test"
cargo test --locked

step "what the features of rdma-async tell"
cargo test --locked -p rdma-async --features tracing,metrics --test observability
