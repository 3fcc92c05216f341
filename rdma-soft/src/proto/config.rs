//! What is fixed when a queue pair is created.

use crate::wire::{Qpn, Transport};

/// Creation parameters of a [`QueuePair`](super::QueuePair).
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Transport service; [`Transport::Cnp`] is none and behaves as UD.
    pub transport: Transport,
    /// Own number, which UD puts into DETH.
    pub qp_num: Qpn,
    /// Depth of the send queue.
    pub max_send_wr: u32,
    /// Scatter/gather elements per send request.
    pub max_send_sge: u32,
    /// Inline bytes per send request.
    pub max_inline_data: u32,
    /// Whether every send request completes as if it were signalled.
    pub sq_sig_all: bool,
    /// Flow control towards the peer's socket (RC).
    pub congestion: CongestionConfig,
}

/// Bounds of the congestion window of RC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CongestionConfig {
    /// Bytes in flight at first, when the queue pair comes to RTS.
    pub initial: u32,
    /// Bytes in flight at most.
    pub max: u32,
    /// The longest READ request sent at once; longer messages are asked for in pieces of this many bytes, so
    /// that their responses are paced too.
    pub read_chunk: u32,
}

impl Default for CongestionConfig {
    fn default() -> Self {
        Self { initial: 128 << 10, max: 256 << 10, read_chunk: 64 << 10 }
    }
}

impl Config {
    /// A queue pair of `transport` with a send queue of 64 and one element per request.
    #[must_use]
    pub fn new(transport: Transport, qp_num: Qpn) -> Self {
        Self {
            transport,
            qp_num,
            max_send_wr: 64,
            max_send_sge: 1,
            max_inline_data: 0,
            sq_sig_all: false,
            congestion: CongestionConfig::default(),
        }
    }
}
