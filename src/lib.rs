//! Examples, benchmarks and integration tests of the RDMA crates in this workspace.
