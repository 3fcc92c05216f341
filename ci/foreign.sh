#!/usr/bin/env bash
# Programs that already use libibverbs, unmodified, on the soft device: Debian's ibverbs-utils, perftest and pyverbs.
# usage: ci/foreign.sh [--long] [NAME...]      --long sweeps more sizes; NAME runs only the cases whose name contains it
. "$(dirname "$0")/lib.sh"
need ibverbs-utils perftest python3-pyverbs ibverbs-providers iproute2 tshark tcpdump binutils
step "cargo build --release -p rdma-preload"
cargo build --release --locked -p rdma-preload
step "the drop-in libibverbs.so.1"
target=${CARGO_TARGET_DIR:-target}
bash ci/build-libibverbs.sh "$target/drop-in"
step "foreign programs on the soft device"
exec /usr/bin/python3 ci/foreign/run.py "$target/release/rdma-soft" "$target/drop-in" "$@"
