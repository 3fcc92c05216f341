#!/usr/bin/env bash
# The README's test command.
. "$(dirname "$0")/lib.sh"
step "cargo test"
cargo test --locked
