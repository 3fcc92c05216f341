//! The send queue: a ring of work requests with room for their elements, all allocated at creation.

use super::work::{MAX_MESSAGE, len32};
use super::{
    Config, Data, Destination, PathMtu, PostError, SendFlags, SendOperation, SendRequest, Sge, Status,
};
use crate::wire::{Psn, Transport};

/// A posted send request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wqe {
    pub(super) wr_id: u64,
    pub(super) operation: SendOperation,
    /// Bytes of the message.
    pub(super) length: u32,
    /// PSN of its first packet, once started.
    pub(super) first: Psn,
    /// How many PSNs it takes, once started; zero for local operations.
    pub(super) packets: u32,
    pub(super) num_sge: u32,
    pub(super) flags: SendFlags,
    pub(super) inline: bool,
    /// Why it cannot be carried out. It completes so once it is the oldest, and the queue pair fails.
    pub(super) error: Option<Status>,
}

impl Wqe {
    const EMPTY: Self = Self {
        wr_id: 0,
        operation: SendOperation::Send,
        length: 0,
        first: Psn::new(0),
        packets: 0,
        num_sge: 0,
        flags: SendFlags::empty(),
        inline: false,
        error: None,
    };

    /// The PSN after its last packet.
    pub(super) fn end(&self) -> Psn {
        self.first + self.packets
    }

    /// Whether only a response completes it, never a plain acknowledgement.
    pub(super) fn wants_response(&self) -> bool {
        self.fetches() || matches!(self.operation, SendOperation::AtomicWrite { .. })
    }

    /// Whether its elements say where bytes of the response go, not what is sent.
    pub(super) fn fetches(&self) -> bool {
        self.operation.fetches()
    }

    /// Whether nothing of it goes on the wire.
    pub(super) fn is_local(&self) -> bool {
        self.operation.is_local()
    }

    /// How many PSNs the message takes (clause 9.7.2.2).
    pub(super) fn psn_count(&self, mtu: PathMtu) -> u32 {
        match self.operation {
            SendOperation::LocalInvalidate(_) | SendOperation::BindWindow(_) => 0,
            SendOperation::CompareSwap { .. } | SendOperation::FetchAdd { .. } => 1,
            _ => self.length.div_ceil(mtu.bytes()).max(1),
        }
    }
}

/// Positions in the ring count up and wrap at 2^32; the slot is the position modulo the capacity.
#[derive(Debug)]
pub(super) struct SendQueue {
    wqes: Box<[Wqe]>,
    sges: Box<[Sge]>,
    inline: Box<[u8]>,
    destinations: Box<[Destination]>,
    depth: u32,
    max_sge: usize,
    max_inline: usize,
    /// The oldest request that is not complete.
    pub(super) tail: u32,
    /// Where the next request goes.
    pub(super) head: u32,
}

impl SendQueue {
    pub(super) fn new(config: &Config) -> Self {
        // Positions wrap at 2^32, so the capacity must be a power of two.
        let capacity = config.max_send_wr.clamp(1, 1 << 20).next_power_of_two() as usize;
        let max_sge = config.max_send_sge as usize;
        let max_inline = config.max_inline_data as usize;
        let destinations = if config.transport == Transport::Ud { capacity } else { 0 };
        Self {
            wqes: vec![Wqe::EMPTY; capacity].into_boxed_slice(),
            sges: vec![Sge::default(); capacity * max_sge].into_boxed_slice(),
            inline: vec![0; capacity * max_inline].into_boxed_slice(),
            destinations: vec![Destination::default(); destinations].into_boxed_slice(),
            depth: config.max_send_wr.min(1 << 20),
            max_sge,
            max_inline,
            tail: 0,
            head: 0,
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.head.wrapping_sub(self.tail)
    }

    fn slot(&self, position: u32) -> usize {
        position as usize & (self.wqes.len() - 1)
    }

    pub(super) fn wqe(&self, position: u32) -> &Wqe {
        &self.wqes[self.slot(position)]
    }

    pub(super) fn wqe_mut(&mut self, position: u32) -> &mut Wqe {
        let slot = self.slot(position);
        &mut self.wqes[slot]
    }

    /// The elements of the request, empty if it is inline.
    pub(super) fn sges(&self, position: u32) -> &[Sge] {
        let (slot, wqe) = (self.slot(position), self.wqe(position));
        let used = if wqe.inline { 0 } else { wqe.num_sge as usize };
        &self.sges[slot * self.max_sge..][..used]
    }

    /// The data of the request if it is inline.
    pub(super) fn inline(&self, position: u32) -> Option<&[u8]> {
        let (slot, wqe) = (self.slot(position), self.wqe(position));
        wqe.inline.then(|| &self.inline[slot * self.max_inline..][..wqe.length as usize])
    }

    /// Where a datagram goes.
    pub(super) fn destination(&self, position: u32) -> Option<&Destination> {
        self.destinations.get(self.slot(position))
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.tail = 0;
        self.head = 0;
    }

    /// Whether a request would be taken behind `ahead` others. Nothing of it happens.
    pub(super) fn check(
        &self,
        transport: Transport,
        request: &SendRequest<'_>,
        ahead: u32,
    ) -> Result<(), PostError> {
        let operation = &request.operation;
        if !is_supported(transport, operation) {
            return Err(PostError::InvalidOperation);
        }
        if self.len().saturating_add(ahead) >= self.depth {
            return Err(PostError::QueueFull);
        }
        if transport == Transport::Ud && request.destination.is_none() {
            return Err(PostError::NoDestination);
        }
        match request.data {
            Data::Gather(sges) if sges.len() > self.max_sge && !operation.is_local() => {
                Err(PostError::TooManySges)
            }
            Data::Inline(_) if operation.fetches() || operation.is_local() => {
                Err(PostError::InvalidOperation)
            }
            Data::Inline(pieces) => {
                let fits = |room: usize, piece: &&[u8]| room.checked_sub(piece.len());
                pieces.iter().try_fold(self.max_inline, fits).ok_or(PostError::InlineTooLong).map(|_| ())
            }
            Data::Gather(_) => Ok(()),
        }
    }

    /// `ahead`: requests that have left it, and keep their places until their completions are polled.
    #[inline(always)]
    pub(super) fn push(
        &mut self,
        transport: Transport,
        request: &SendRequest<'_>,
        ahead: u32,
    ) -> Result<(), PostError> {
        self.check(transport, request, ahead)?;
        let slot = self.slot(self.head);
        let wqe = &mut self.wqes[slot];
        *wqe = Wqe { wr_id: request.wr_id, operation: request.operation, flags: request.flags, ..Wqe::EMPTY };
        match request.data {
            Data::Gather(_) if wqe.operation.is_local() => {}
            Data::Gather(sges) => store_sges(wqe, &mut self.sges[slot * self.max_sge..], sges),
            Data::Inline(pieces) => {
                let room = &mut self.inline[slot * self.max_inline..][..self.max_inline];
                store_inline(wqe, room, pieces);
            }
        }
        if matches!(request.operation, SendOperation::CompareSwap { .. } | SendOperation::FetchAdd { .. }) {
            // The operand is eight bytes; the list must have room for them (clause 9.4.5).
            if wqe.length < 8 {
                wqe.error = Some(Status::LocalLength);
            }
            wqe.length = 8;
        }
        if matches!(request.operation, SendOperation::AtomicWrite { .. }) && wqe.length != 8 {
            wqe.error = Some(Status::LocalLength);
        }
        if let (Some(place), Some(destination)) = (self.destinations.get_mut(slot), request.destination) {
            *place = *destination;
        }
        self.head = self.head.wrapping_add(1);
        Ok(())
    }
}

/// Keeps a list that was checked.
fn store_sges(wqe: &mut Wqe, room: &mut [Sge], sges: &[Sge]) {
    wqe.num_sge = len32(sges.len());
    let mut length = 0;
    // Nearly always one: no call to copy it.
    for (to, sge) in room.iter_mut().zip(sges) {
        *to = *sge;
        length += u64::from(sge.length);
    }
    match u32::try_from(length) {
        Ok(length) if length <= MAX_MESSAGE => wqe.length = length,
        _ => wqe.error = Some(Status::LocalLength),
    }
}

/// Keeps bytes that were checked.
fn store_inline(wqe: &mut Wqe, room: &mut [u8], pieces: &[&[u8]]) {
    let mut end = 0;
    for piece in pieces {
        room[end..][..piece.len()].copy_from_slice(piece);
        end += piece.len();
    }
    wqe.length = len32(end);
    wqe.inline = true;
}

/// Which operations a transport has (clause 9.1, table 36).
fn is_supported(transport: Transport, operation: &SendOperation) -> bool {
    use SendOperation as Op;
    match operation {
        Op::Send | Op::SendWithImmediate(_) => true,
        Op::Write { .. } | Op::WriteWithImmediate { .. } | Op::BindWindow(_) | Op::LocalInvalidate(_) => {
            matches!(transport, Transport::Rc | Transport::Uc)
        }
        Op::SendWithInvalidate(_)
        | Op::Read { .. }
        | Op::CompareSwap { .. }
        | Op::FetchAdd { .. }
        | Op::AtomicWrite { .. } => transport == Transport::Rc,
    }
}
