//! Buffers and operations that most scripts need.

use rdma_soft::proto::{SendOperation, Sge};

use super::{Pair, PairConfig, Rights};

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251 + 1) as u8).collect()
}

/// A pair, the client's buffer with the pattern, and the server's zeroed buffer of the same length.
pub fn with_buffers(config: &PairConfig, len: usize) -> (Pair, Sge, Sge) {
    let mut pair = Pair::new(config);
    let source = pair.client.host.register(pattern(len), Rights::ALL);
    let target = pair.server.host.register(vec![0; len], Rights::ALL);
    (pair, source, target)
}

/// An RDMA WRITE to the whole of `target`.
pub fn write_to(target: Sge) -> SendOperation {
    SendOperation::Write { va: target.addr, rkey: target.lkey }
}

/// An RDMA READ of the whole of `source`.
pub fn read_from(source: Sge) -> SendOperation {
    SendOperation::Read { va: source.addr, rkey: source.lkey }
}

/// A fetch and add on the first word of `target`.
pub fn fetch_add(target: Sge, add: u64) -> SendOperation {
    SendOperation::FetchAdd { va: target.addr, rkey: target.lkey, add }
}

/// An ATOMIC WRITE of the first word of `target`.
pub fn atomic_write(target: Sge) -> SendOperation {
    SendOperation::AtomicWrite { va: target.addr, rkey: target.lkey }
}

/// A compare and swap on the first word of `target`.
pub fn compare_swap(target: Sge, compare: u64, swap: u64) -> SendOperation {
    SendOperation::CompareSwap { va: target.addr, rkey: target.lkey, compare, swap }
}
