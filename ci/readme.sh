#!/usr/bin/env bash
# The README's main command, with few iterations, in each mode and with each verb.
. "$(dirname "$0")/lib.sh"
step "cargo run --release --example rc_pingpong"
cargo run --release --locked --example rc_pingpong -- --iters 1000

for mode in busy event adaptive; do
  for verb in send write write-imm; do
    step "rc_pingpong --mode $mode --verb $verb --json"
    timeout 60 target/release/examples/rc_pingpong --mode "$mode" --verb "$verb" --iters 500 --size 5000 --json
  done
done
