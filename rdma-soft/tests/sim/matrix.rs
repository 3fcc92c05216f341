//! The matrix of loss, faults, sizes, path MTUs, queue depths and operations, and its goodput table.

use std::fmt::Write;

use rdma_soft::proto::PathMtu;

use super::{Cell, LinkConfig, Op, run};

/// Loss each way, in percent.
pub const LOSSES: [u32; 5] = [0, 1, 5, 10, 30];
pub const SIZES: [usize; 7] = [0, 1, 4095, 4096, 4097, 65536, 1 << 20];
pub const MTUS: [PathMtu; 3] = [PathMtu::Mtu256, PathMtu::Mtu1024, PathMtu::Mtu4096];
pub const DEPTHS: [u32; 2] = [1, 16];

/// What a link does to packets besides losing them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    None,
    Duplicate,
    Reorder,
    Corrupt,
    All,
    /// No fault, but packets are taken several at a time.
    Batch,
    AllBatch,
}

impl Faults {
    pub const ALL: [Self; 7] =
        [Self::None, Self::Duplicate, Self::Reorder, Self::Corrupt, Self::All, Self::Batch, Self::AllBatch];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Duplicate => "duplicate",
            Self::Reorder => "reorder",
            Self::Corrupt => "corrupt",
            Self::All => "all",
            Self::Batch => "batch",
            Self::AllBatch => "all-batch",
        }
    }

    pub fn link(self, loss_percent: u32) -> LinkConfig {
        let all = matches!(self, Self::All | Self::AllBatch);
        let rate = |fault, rate| if self == fault || all { rate } else { 0.0 };
        LinkConfig {
            loss: f64::from(loss_percent) / 100.0,
            duplicate: rate(Self::Duplicate, 0.05),
            reorder: rate(Self::Reorder, 0.05),
            corrupt: rate(Self::Corrupt, 0.02),
            batch_ns: if matches!(self, Self::Batch | Self::AllBatch) { 20_000 } else { 0 },
            ..LinkConfig::default()
        }
    }
}

/// Operations per cell: enough to go round the queue twice, fewer where messages are long.
pub fn operations(size: usize, depth: u32) -> u32 {
    if size > 65536 { depth + 2 } else { 2 * depth + 4 }
}

/// All cells of one operation, loss and kind of faults.
pub fn cells(op: Op, loss_percent: u32, faults: Faults, seed: u64) -> Vec<Cell> {
    let mut cells = Vec::new();
    let link = faults.link(loss_percent);
    for &size in if op.is_atomic() { &[8][..] } else { &SIZES } {
        for mtu in MTUS {
            for depth in DEPTHS {
                cells.push(Cell { op, size, mtu, depth, count: operations(size, depth), link, seed });
            }
        }
    }
    cells
}

/// Goodput on a link of 4 GB/s with a delay of 5 us each way, in MB/s of virtual time, the mean of some seeds;
/// in thousands of operations per second where they are short. Queue depth 16.
pub fn goodput_table(seeds: u64) -> String {
    let mut table = String::from(
        "Goodput by loss each way, in MB/s; up to 8 bytes: thousands of operations per second\n\n",
    );
    let _ = write!(table, "{:<10} {:>8} {:>5}", "operation", "size", "MTU");
    for loss in LOSSES {
        let _ = write!(table, " {loss:>6} %");
    }
    table.push('\n');
    for op in [Op::Send, Op::Write, Op::Read, Op::FetchAdd] {
        for size in if op.is_atomic() { vec![8] } else { vec![1, 4096, 65536, 1 << 20] } {
            for mtu in [PathMtu::Mtu1024, PathMtu::Mtu4096] {
                let _ = write!(table, "{:<10} {size:>8} {:>5}", op.name(), mtu.bytes());
                for loss in LOSSES {
                    let rate = mean_rate(op, size, mtu, loss, seeds);
                    let _ = write!(table, " {rate:>8.1}");
                }
                table.push('\n');
            }
        }
    }
    table
}

fn mean_rate(op: Op, size: usize, mtu: PathMtu, loss: u32, seeds: u64) -> f64 {
    let mut sum = 0.0;
    for seed in 0..seeds {
        let count = if size > 65536 { 32 } else { 200 };
        let cell = Cell { op, size, mtu, depth: 16, count, link: Faults::None.link(loss), seed };
        let outcome = run(&cell).unwrap_or_else(|error| panic!("{cell:?}: {error}"));
        // Bytes per nanosecond are thousands of MB/s, operations per nanosecond millions of thousands.
        let weight = if size <= 8 { 1e6 } else { size as f64 * 1e3 };
        sum += f64::from(outcome.completed) * weight / outcome.nanoseconds as f64;
    }
    sum / seeds as f64
}
