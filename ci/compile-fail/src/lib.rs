//! The messages of the compiler for programs that `rdma-core` does not let compile; see `tests/`.
