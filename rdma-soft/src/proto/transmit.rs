//! What `poll_transmit` gives.

use crate::wire::{ICRC_LEN, MAX_TRANSPORT_HEADER_LEN};

/// Room that [`QueuePair::poll_transmit`](super::QueuePair::poll_transmit) wants: any packet with its ICRC.
pub const MAX_PACKET_LEN: usize = MAX_TRANSPORT_HEADER_LEN + 4096 + ICRC_LEN;

/// What to do with acknowledgements that are due but may wait for company.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Acks {
    /// Keep them, unless many packets came since the last one.
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
    /// Place of the request in the send queue.
    pub(super) position: u32,
}

/// Writes a packet piece by piece. Every step is `None` if the buffer is too short.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self { out, len: 0 }
    }

    /// The next `N` bytes, for a header.
    pub(super) fn header<const N: usize>(&mut self) -> Option<&mut [u8; N]> {
        let chunk = self.out.get_mut(self.len..)?.first_chunk_mut()?;
        self.len += N;
        Some(chunk)
    }

    /// The next `len` bytes, with zeroed padding behind.
    pub(super) fn payload(&mut self, len: usize) -> Option<&mut [u8]> {
        let padded = self.out.get_mut(self.len..)?.get_mut(..len.next_multiple_of(4))?;
        self.len += padded.len();
        // The last word whole, which is cheaper than to find out how much of it is padding.
        if let Some(last) = padded.last_chunk_mut::<4>() {
            *last = [0; 4];
        }
        padded.get_mut(..len)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// The pad count of a payload.
pub(super) fn pad_of(len: u32) -> u8 {
    // Two bits.
    (len.wrapping_neg() & 3) as u8
}
