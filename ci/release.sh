#!/usr/bin/env bash
# What a release needs: packages that are whole, licences and advisories, and no break of the interface within a version.
# usage: ci/release.sh
. "$(dirname "$0")/lib.sh"

step "cargo package"
# Each crate to publish, as it would be uploaded, built from its package against the packages of the others.
cargo package --workspace --exclude rdma-workbench --locked --quiet

step "cargo deny"
if cargo deny --version 2>/dev/null; then
  cargo deny --all-features check
else
  echo "error: cargo-deny is missing: cargo install --locked cargo-deny" >&2
  exit 1
fi

step "cargo semver-checks"
# The newest version in the registry is what a change is held against.
# From outside, where the name is not that of the workspace's own crate.
if ! (cd / && cargo info --quiet rdma-core-rs >/dev/null 2>&1); then
  echo "none published yet: nothing to hold this version against"
elif cargo semver-checks --version 2>/dev/null; then
  cargo semver-checks --workspace --exclude rdma-workbench
else
  echo "error: cargo-semver-checks is missing: cargo install --locked cargo-semver-checks" >&2
  exit 1
fi
