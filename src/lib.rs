//! What the examples and benchmarks of this workspace share: command line, the two processes of
//! a local run, and the report.
//!
//! Nothing here is part of the library's interface; the crates to use are `rdma_core` and
//! `rdma_async`.

pub mod bandwidth;
pub mod baseline;
pub mod cli;
pub mod latency;
pub mod local;
pub mod payload;
pub mod peer;
pub mod plot;
pub mod udp_stream;

/// Compiles the README's code samples as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

/// Compiles the guide's steps, and runs its programs.
#[cfg(doctest)]
#[doc = include_str!("../docs/GUIDE.md")]
mod guide {}
