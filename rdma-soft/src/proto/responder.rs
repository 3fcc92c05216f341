//! The responder of RC: PSN check, execution, responses (clause 9.7.4, 9.7.5.1, 9.9.3).

use std::time::Duration;

use super::assembly::{Assembly, Refusal, fail_receive};
use super::resources::{Kind, Resources, Span};
use super::transmit::{Writer, pad_of};
use super::work::MAX_WIRE_MESSAGE;
use super::{
    Acks, AtomicOp, Counter, Event, Host, QpAccess, QueuePair, RemoteAccess, State, Status, Time, Transmit,
    TransmitKind,
};
use crate::wire::{
    AethRepr, AtomicAckEthRepr, BthRepr, NakCode, Opcode, Operation, Packet, Position, Psn, Syndrome,
};

/// PSNs ahead of the expected one that a request is believed to have. What is further away is dropped in silence,
/// so that one stray packet with a PSN of its sender's fancy seldom makes the peer send its whole flight again.
/// The specification allows half of the circle, 2^23; an honest peer comes near it by long READs alone, and 2^20
/// are a lost READ of 1 GiB at a path MTU of 1024. If more is lost, the peer's timeout finds it instead of our NAK.
const BELIEVED: i32 = 1 << 20;

/// An acknowledgement waits for company no longer than until so many packets came since the last one: the
/// peer's window must move while more of a stream arrives.
const HOLD_PACKETS: u32 = 16;

/// The longest time for which a request that keeps coming while there is no receive is not told so again.
const RNR_SILENCE: Duration = Duration::from_micros(100);

/// State of the responder; UC and UD use parts of it.
#[derive(Debug)]
pub(super) struct Responder {
    /// The PSN that comes next.
    pub(super) epsn: Psn,
    /// Messages completed, 24 bits.
    pub(super) msn: u32,
    /// The message that is coming in.
    pub(super) assembly: Assembly,
    /// An acknowledgement of everything up to `ack_psn` is due.
    pub(super) ack_due: bool,
    /// A packet of a SEND or RDMA WRITE. Never a READ or atomic: those are acknowledged by their responses.
    ack_psn: Psn,
    /// Packets executed since the last acknowledgement.
    unacknowledged: u32,
    /// A negative acknowledgement to send.
    nak: Option<(Psn, Syndrome)>,
    /// The gap at `epsn`, or the lack of a receive, was reported; what follows is dropped in silence.
    nak_sent: bool,
    /// Until when the lack of a receive is not reported again.
    rnr_silent_until: Time,
    pub(super) resources: Resources,
}

impl Responder {
    pub(super) fn new() -> Self {
        Self {
            epsn: Psn::new(0),
            msn: 0,
            assembly: Assembly::new(),
            ack_due: false,
            ack_psn: Psn::new(0),
            unacknowledged: 0,
            nak: None,
            nak_sent: false,
            rnr_silent_until: Time::ZERO,
            resources: Resources::default(),
        }
    }

    /// Begins anew, all but the allocated resources.
    pub(super) fn reset(&mut self) {
        self.resources.clear();
        *self = Self { resources: std::mem::take(&mut self.resources), ..Self::new() };
    }

    /// Forgets the responses that wait to be sent. An acknowledgement that waits for company stays: a device
    /// that does not hold acknowledgements back would have sent it long ago.
    pub(super) fn cancel(&mut self) {
        self.ack_due &= !self.resources.any_pending();
        self.resources.cancel();
        self.nak = None;
    }

    /// Whether there is a response or an acknowledgement that need not wait.
    pub(super) fn may_transmit(&self, acks: Acks) -> bool {
        self.has_response() || self.ack_leaves(acks)
    }

    /// Whether there is a response or a negative acknowledgement.
    pub(super) fn has_response(&self) -> bool {
        self.nak.is_some() || self.resources.any_pending()
    }

    fn ack_leaves(&self, acks: Acks) -> bool {
        self.ack_due && (acks == Acks::Flush || self.unacknowledged >= HOLD_PACKETS)
    }

    fn message_done(&mut self) {
        self.msn = (self.msn + 1) & 0xff_ffff;
    }
}

/// READ responses of `length` bytes.
fn packet_count(length: u32, mtu: u32) -> u32 {
    length.div_ceil(mtu).max(1)
}

impl QueuePair {
    /// Handles a request of RC.
    pub(super) fn handle_request<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) {
        let distance = packet.bth.psn().offset_from(self.resp.epsn);
        if distance < 0 {
            host.count(Counter::DuplicateRequest);
            self.handle_duplicate(host, packet);
            return;
        }
        if distance > BELIEVED {
            host.count(Counter::DropPsn);
            return;
        }
        if distance > 0 {
            // Clause 9.7.5.2.8: one NAK per gap.
            host.count(Counter::OutOfSequenceRequest);
            if !self.resp.nak_sent {
                self.resp.nak_sent = true;
                self.resp.nak = Some((self.resp.epsn, Syndrome::nak(NakCode::PSN_SEQUENCE)));
            }
            return;
        }
        self.note_established(host);
        let result = match packet.info().operation {
            Operation::Send | Operation::Write => self.execute_message(host, packet),
            _ if self.resp.assembly.in_message() => Err(Refusal::Sequence),
            Operation::ReadRequest => self.execute_read(host, packet),
            Operation::AtomicWrite => self.execute_atomic_write(host, packet),
            _ => self.execute_atomic(host, packet),
        };
        match result {
            Ok(()) => {
                self.resp.nak_sent = false;
                self.resp.rnr_silent_until = Time::ZERO;
            }
            Err(refusal) => self.refuse(now, host, refusal),
        }
    }

    fn execute_message<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) -> Result<(), Refusal> {
        let (mtu, access) = (self.attributes.path_mtu.bytes(), self.attributes.access);
        if self.resp.assembly.execute(host, packet, mtu, access)? {
            self.resp.message_done();
        }
        self.resp.epsn = self.resp.epsn.next();
        self.resp.unacknowledged = self.resp.unacknowledged.saturating_add(1);
        self.resp.ack_psn = packet.bth.psn();
        if packet.bth.ack_request() {
            self.request_ack(host);
        }
        Ok(())
    }

    fn request_ack<H: Host>(&mut self, host: &mut H) {
        if self.resp.ack_due {
            host.count(Counter::AckDeferred);
        }
        self.resp.ack_due = true;
    }

    fn execute_read<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) -> Result<(), Refusal> {
        let reth = packet.reth().ok_or(Refusal::Sequence)?;
        if !self.attributes.access.contains(QpAccess::REMOTE_READ) {
            return Err(Refusal::NotEnabled);
        }
        if reth.dma_len > MAX_WIRE_MESSAGE || !self.resp.resources.has_room() {
            return Err(Refusal::Length);
        }
        if reth.dma_len != 0 {
            host.check_remote(reth.rkey, reth.va, reth.dma_len, RemoteAccess::Read)
                .map_err(|_| Refusal::RemoteAccess)?;
        }
        let packets = packet_count(reth.dma_len, self.attributes.path_mtu.bytes());
        let kind = Kind::Read { va: reth.va, rkey: reth.rkey, length: reth.dma_len };
        self.remember(packets, kind);
        Ok(())
    }

    fn execute_atomic<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) -> Result<(), Refusal> {
        let header = packet.atomic_eth().ok_or(Refusal::Sequence)?;
        if !self.attributes.access.contains(QpAccess::REMOTE_ATOMIC) {
            return Err(Refusal::NotEnabled);
        }
        // Clause 9.4.5: the address must be aligned to eight.
        if !header.va.is_multiple_of(8) || !self.resp.resources.has_room() {
            return Err(Refusal::Length);
        }
        let op = if packet.info().operation == Operation::CompareSwap {
            AtomicOp::CompareSwap { compare: header.compare, swap: header.swap_add }
        } else {
            AtomicOp::FetchAdd { add: header.swap_add }
        };
        let original = host.atomic(header.rkey, header.va, op).map_err(|_| Refusal::RemoteAccess)?;
        self.remember(1, Kind::Atomic { original });
        Ok(())
    }

    fn execute_atomic_write<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) -> Result<(), Refusal> {
        let reth = packet.reth().ok_or(Refusal::Sequence)?;
        if !self.attributes.access.contains(QpAccess::REMOTE_WRITE) {
            return Err(Refusal::NotEnabled);
        }
        // Annex A19, oA19-28: eight bytes, at a multiple of eight.
        let bytes = <[u8; 8]>::try_from(packet.payload()).map_err(|_| Refusal::Length)?;
        if reth.dma_len != 8 || !reth.va.is_multiple_of(8) || !self.resp.resources.has_room() {
            return Err(Refusal::Length);
        }
        let op = AtomicOp::Store { value: u64::from_ne_bytes(bytes) };
        host.atomic(reth.rkey, reth.va, op).map_err(|_| Refusal::RemoteAccess)?;
        self.remember(1, Kind::AtomicWrite);
        Ok(())
    }

    /// A READ or atomic was accepted. Its response acknowledges what came before.
    fn remember(&mut self, packets: u32, kind: Kind) {
        self.resp.resources.push(self.resp.epsn, packets, kind);
        self.resp.epsn += packets;
        self.resp.ack_due = false;
        // Clause 9.7.7.1: a READ counts when it is accepted.
        self.resp.message_done();
    }

    /// A request that was executed before (clause 9.7.5.1.4 to 9.7.5.1.6).
    fn handle_duplicate<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) {
        let psn = packet.bth.psn();
        let found = match packet.info().operation {
            Operation::Send | Operation::Write => {
                // By its own PSN: rxe takes an acknowledgement of a message's end, while it sends the message again,
                // for one that it need not wait for any more (docs/INTEROP.md).
                if !self.resp.ack_due || self.resp.ack_psn.is_before(psn) {
                    self.resp.ack_psn = psn;
                }
                self.request_ack(host);
                return;
            }
            _ => self.resp.resources.find(psn),
        };
        let operation = packet.info().operation;
        let single = Span { begin: psn, next: psn, end: psn.next(), end_offset: 0 };
        let replay = found.and_then(|(place, resource)| match resource.kind {
            Kind::Atomic { .. } => packet.atomic_eth().is_some().then_some((place, single)),
            Kind::AtomicWrite => (operation == Operation::AtomicWrite).then_some((place, single)),
            Kind::Read { va, rkey, length } => {
                // The same request, or a rest of it.
                let reth = packet.reth().filter(|_| operation == Operation::ReadRequest)?;
                let mtu = self.attributes.path_mtu.bytes();
                let offset = (psn - resource.first).wrapping_mul(mtu);
                let end_offset = offset.checked_add(reth.dma_len)?;
                let same = reth.rkey == rkey
                    && reth.va == va.wrapping_add(offset.into())
                    && end_offset <= length
                    && (reth.dma_len != 0 || length == 0);
                let end = psn + packet_count(reth.dma_len, mtu);
                same.then_some((place, Span { begin: psn, next: psn, end, end_offset }))
            }
        });
        match replay {
            Some((place, span)) => self.resp.resources.replay(place, span),
            None => host.count(Counter::DropForgotten),
        }
    }

    /// Asks the peer to come again later. A peer that does as it is told does so once per RNR timer; one that does
    /// not gets an answer to a few of its packets, not to each.
    fn refuse_for_now<H: Host>(&mut self, now: Time, host: &mut H) {
        if now < self.resp.rnr_silent_until {
            host.count(Counter::DropNoReceive);
            return;
        }
        let timer = self.attributes.min_rnr_timer;
        // Half, for the NAK and the packet that answers it may have been faster than the ones before.
        let silence = Duration::from_nanos(timer.nanoseconds() / 2).min(RNR_SILENCE);
        self.resp.rnr_silent_until = now + silence;
        self.resp.nak = Some((self.resp.epsn, Syndrome::rnr_nak(timer)));
        self.resp.nak_sent = true;
    }

    /// Answers a request that cannot be executed (clause 9.9.3).
    fn refuse<H: Host>(&mut self, now: Time, host: &mut H, refusal: Refusal) {
        let psn = self.resp.epsn;
        // Clause 11.6.3.1: an event tells what no completion can. A wrong or unexpected operation is an invalid
        // request, a wrong length, alignment, depth, key or right a violation of access.
        let (code, told) = match refusal {
            Refusal::NotReady => return self.refuse_for_now(now, host),
            Refusal::Sequence | Refusal::NotEnabled => (NakCode::INVALID_REQUEST, Err(Event::RequestError)),
            Refusal::Length => (NakCode::INVALID_REQUEST, Err(Event::AccessError)),
            Refusal::RemoteAccess => (NakCode::REMOTE_ACCESS, Err(Event::AccessError)),
            Refusal::ReceiveTooShort => (NakCode::INVALID_REQUEST, Ok(Status::LocalLength)),
            Refusal::Invalidate => (NakCode::INVALID_REQUEST, Ok(Status::RemoteInvalidRequest)),
            Refusal::LocalProtection => (NakCode::REMOTE_OPERATIONAL, Ok(Status::LocalProtection)),
        };
        match told {
            // These concern the receive in use, so there is one.
            Ok(status) => {
                if let Some(receive) = self.resp.assembly.take_receive() {
                    fail_receive(host, receive, status);
                }
            }
            Err(event) => host.event(event),
        }
        self.fail_responder(host, psn, code);
    }

    /// The queue pair fails; the NAK still goes out, behind the responses that are due before it.
    fn fail_responder<H: Host>(&mut self, host: &mut H, psn: Psn, code: NakCode) {
        self.resp.nak = Some((psn, Syndrome::nak(code)));
        self.resp.ack_due = false;
        self.enter_error(host);
    }

    /// The next response or negative acknowledgement, also after the queue pair failed.
    pub(super) fn poll_response<H: Host>(&mut self, host: &mut H, out: &mut [u8]) -> Option<Transmit> {
        // Each turn sends a response, forgets one, or ends: at most as many turns as there are resources.
        while let Some((place, resource, span)) = self.resp.resources.next_pending() {
            let (first, kind, answered) = (resource.first, resource.kind, resource.answered);
            let len = match kind {
                Kind::Atomic { original } => self.write_atomic_response(span, original, out),
                Kind::AtomicWrite => self.write_atomic_write_response(span, out),
                Kind::Read { va, rkey, .. } => {
                    match self.write_read_response(host, first, va, rkey, span, out)? {
                        Some(len) => Some(len),
                        None if answered => {
                            // The peer was answered before its memory was withdrawn; this is a late copy.
                            self.resp.resources.drop_pending(place);
                            host.count(Counter::DropForgotten);
                            continue;
                        }
                        None => {
                            // The key was valid when the request came, and is not any more.
                            self.resp.resources.cancel();
                            if self.state != State::Err {
                                host.event(Event::AccessError);
                            }
                            self.fail_responder(host, span.next, NakCode::REMOTE_ACCESS);
                            return self.poll_nak(host, out);
                        }
                    }
                }
            }?;
            self.resp.resources.advance(place);
            host.count(Counter::SentPackets);
            return Some(Transmit { len, kind: TransmitKind::Response, position: 0 });
        }
        self.poll_nak(host, out)
    }

    fn poll_nak<H: Host>(&mut self, host: &mut H, out: &mut [u8]) -> Option<Transmit> {
        let (psn, syndrome) = self.resp.nak.take()?;
        let counter = if syndrome == Syndrome::nak(NakCode::PSN_SEQUENCE) {
            Counter::SequenceNakSent
        } else if syndrome.as_rnr_nak().is_some() {
            Counter::RnrNakSent
        } else {
            Counter::ErrorNakSent
        };
        // What was missing has come since.
        if psn != self.resp.epsn && counter != Counter::ErrorNakSent {
            return None;
        }
        self.resp.ack_due = false;
        let nak = self.write_ack(host, psn, syndrome, out)?;
        host.count(counter);
        Some(nak)
    }

    /// The acknowledgement that is due, unless it may wait or responses must go before it.
    pub(super) fn poll_ack<H: Host>(&mut self, host: &mut H, acks: Acks, out: &mut [u8]) -> Option<Transmit> {
        if !self.resp.ack_leaves(acks) || self.resp.resources.any_pending() {
            return None;
        }
        self.resp.ack_due = false;
        self.resp.unacknowledged = 0;
        self.write_ack(host, self.resp.ack_psn, Syndrome::ACK, out)
    }

    fn response_bth(&self, opcode: Opcode, psn: Psn) -> BthRepr {
        BthRepr { pkey: self.attributes.pkey, ..BthRepr::new(opcode, self.attributes.dest_qp, psn) }
    }

    fn write_ack<H: Host>(
        &self,
        host: &mut H,
        psn: Psn,
        syndrome: Syndrome,
        out: &mut [u8],
    ) -> Option<Transmit> {
        let mut writer = Writer::new(out);
        self.response_bth(Opcode::RC_ACKNOWLEDGE, psn).emit(writer.header()?);
        AethRepr { syndrome, msn: self.resp.msn }.emit(writer.header()?);
        host.count(Counter::SentPackets);
        Some(Transmit { len: writer.len(), kind: TransmitKind::Ack, position: 0 })
    }

    fn write_atomic_response(&self, span: Span, original: u64, out: &mut [u8]) -> Option<usize> {
        let mut writer = Writer::new(out);
        self.response_bth(Opcode::RC_ATOMIC_ACKNOWLEDGE, span.next).emit(writer.header()?);
        AethRepr { syndrome: Syndrome::ACK, msn: self.resp.msn }.emit(writer.header()?);
        AtomicAckEthRepr { original }.emit(writer.header()?);
        Some(writer.len())
    }

    /// ATOMIC WRITE is answered by a READ response without data.
    fn write_atomic_write_response(&self, span: Span, out: &mut [u8]) -> Option<usize> {
        let mut writer = Writer::new(out);
        self.response_bth(Opcode::RC_READ_RESPONSE_ONLY, span.next).emit(writer.header()?);
        AethRepr { syndrome: Syndrome::ACK, msn: self.resp.msn }.emit(writer.header()?);
        Some(writer.len())
    }

    /// The outer `None`: no room; the inner: the memory is not accessible any more.
    #[expect(clippy::option_option, reason = "two ways to fail that the caller tells apart by ? and match")]
    fn write_read_response<H: Host>(
        &self,
        host: &mut H,
        first: Psn,
        va: u64,
        rkey: u32,
        span: Span,
        out: &mut [u8],
    ) -> Option<Option<usize>> {
        let mtu = self.attributes.path_mtu.bytes();
        let place = Position::new(span.next == span.begin, span.next.next() == span.end);
        let opcode = match place {
            Position::First => Opcode::RC_READ_RESPONSE_FIRST,
            Position::Middle => Opcode::RC_READ_RESPONSE_MIDDLE,
            Position::Last => Opcode::RC_READ_RESPONSE_LAST,
            Position::Only => Opcode::RC_READ_RESPONSE_ONLY,
        };
        let offset = (span.next - first).wrapping_mul(mtu);
        let len = span.end_offset.saturating_sub(offset).min(mtu);
        let mut writer = Writer::new(out);
        BthRepr { pad: pad_of(len), ..self.response_bth(opcode, span.next) }.emit(writer.header()?);
        if place != Position::Middle {
            AethRepr { syndrome: Syndrome::ACK, msn: self.resp.msn }.emit(writer.header()?);
        }
        let payload = writer.payload(len as usize)?;
        if len != 0 && host.read_remote(rkey, va.wrapping_add(offset.into()), payload).is_err() {
            return Some(None);
        }
        Some(Some(writer.len()))
    }
}
