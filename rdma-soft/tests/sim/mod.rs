//! Two queue pairs on a simulated link: virtual time, and one seed that decides every fate of a packet.
//!
//! A test reads as a script: post, [`Pair::drive`], look at completions and memory. Shared by the tests, the
//! example `sim_matrix` and the fuzz targets.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    missing_docs,
    missing_debug_implementations,
    clippy::cast_possible_truncation,
    reason = "each of the programs that share this module uses a part of it"
)]

mod buffers;
mod host;
mod link;
mod matrix;
mod pair;
mod rng;
mod scenario;

pub use buffers::{atomic_write, compare_swap, fetch_add, pattern, read_from, with_buffers, write_to};
pub use host::{Region, Rights, TestHost};
pub use link::{Link, LinkConfig};
pub use matrix::{DEPTHS, Faults, LOSSES, MTUS, SIZES, cells, goodput_table, operations};
pub use pair::{Pair, PairConfig, Side, bring_up, connect};
pub use rng::Rng;
pub use scenario::{Cell, Op, Outcome, run};
