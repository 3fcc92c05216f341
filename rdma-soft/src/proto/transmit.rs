//! What `poll_transmit` gives.

use super::Destination;
use crate::wire::{ICRC_LEN, MAX_TRANSPORT_HEADER_LEN};

/// Room that [`QueuePair::poll_transmit`](super::QueuePair::poll_transmit) wants: any packet with its ICRC.
pub const MAX_PACKET_LEN: usize = MAX_TRANSPORT_HEADER_LEN + 4096 + ICRC_LEN;

/// What to do with acknowledgements that are due but may wait for company.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Acks {
    /// Keep them.
    Hold,
    /// Send them after everything else.
    Flush,
}

/// What kind of packet was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransmitKind {
    /// A request: SEND, RDMA WRITE, READ or atomic request, datagram.
    Request,
    /// A READ response or atomic acknowledgement.
    Response,
    /// An acknowledgement, positive or negative.
    Ack,
}

/// A packet in the caller's buffer: BTH to padding. The ICRC goes behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Bytes written; the four of the ICRC come on top.
    pub len: usize,
    /// Kind of packet.
    pub kind: TransmitKind,
    /// Where to (UD); `None` means the peer of the connection.
    pub destination: Option<Destination>,
}
