//! The requester: turns send requests into packets. RC and UC, and the common part of UD.
//!
//! A *cursor* walks over the send queue and the PSNs of its requests; a retransmission is nothing but the
//! cursor set back (go-back-N, clause 9.9.2.1.1). `tail <= cursor <= started <= head` as positions of the
//! queue, and `una <= psn <= sent <= assigned` on the circle of PSNs.

use std::collections::VecDeque;

use super::congestion::Congestion;
use super::send_queue::Wqe;
use super::transmit::{Writer, pad_of};
use super::{
    Attributes, Completion, CompletionKind, CongestionConfig, Counter, Event, Host, ImmediateOrKey, PathMtu,
    QueuePair, SendFlags, SendOperation, State, Status, Time, Transmit, TransmitKind,
};
use crate::wire::{
    AtomicEthRepr, BthRepr, DethRepr, IethRepr, ImmDtRepr, Opcode, Position, Psn, RethRepr, Transport,
};

/// State of the requester.
#[derive(Debug)]
pub(super) struct Requester {
    /// Position of the request that the next packet belongs to.
    pub(super) cursor: u32,
    /// Position of the first request that was never begun.
    pub(super) started: u32,
    /// PSN of the next packet.
    pub(super) psn: Psn,
    /// The PSN after the last request that was begun.
    pub(super) assigned: Psn,
    /// The PSN after the last that was ever sent.
    pub(super) sent: Psn,
    /// The oldest PSN that is not acknowledged.
    pub(super) una: Psn,
    /// For each READ (chunk), atomic and ATOMIC WRITE request in flight the PSN after its last response.
    pub(super) reads: VecDeque<Psn>,
    pub(super) congestion: Congestion,
    /// PSNs that one READ request asks for at most. Fixed, so that a repeated request never spans two.
    pub(super) read_chunk: u32,
    since_ack_request: u32,
    /// What was sent before this PSN has had its loss accounted in the congestion window.
    pub(super) recover: Psn,
    /// PSN of the sequence NAK that was last obeyed; the same again is a duplicate.
    pub(super) nak_at: Option<Psn>,
    /// The same for what a response implied.
    pub(super) implied_nak_at: Option<Psn>,
    pub(super) retries_left: u8,
    pub(super) rnr_retries_left: u8,
    pub(super) ack_deadline: Option<Time>,
    /// When the flight is sent again on suspicion, once per local ack timeout.
    pub(super) probe_at: Option<Time>,
    pub(super) rnr_deadline: Option<Time>,
    /// Whether the drained event was raised in this stay in SQD.
    pub(super) drained: bool,
}

impl Requester {
    pub(super) fn new(config: &CongestionConfig) -> Self {
        let zero = Psn::new(0);
        Self {
            cursor: 0,
            started: 0,
            psn: zero,
            assigned: zero,
            sent: zero,
            una: zero,
            reads: VecDeque::new(),
            congestion: Congestion::new(config, PathMtu::Mtu1024),
            read_chunk: 1,
            since_ack_request: 0,
            recover: zero,
            nak_at: None,
            implied_nak_at: None,
            retries_left: 0,
            rnr_retries_left: 0,
            ack_deadline: None,
            probe_at: None,
            rnr_deadline: None,
            drained: false,
        }
    }

    /// Begins at the attributes' PSN.
    pub(super) fn begin(&mut self, attributes: &Attributes, config: &CongestionConfig) {
        let mtu = attributes.path_mtu;
        let first = attributes.send_psn;
        *self = Self {
            psn: first,
            assigned: first,
            sent: first,
            una: first,
            recover: first,
            congestion: Congestion::new(config, mtu),
            read_chunk: (config.read_chunk / mtu.bytes()).clamp(1, Psn::WINDOW / 4),
            retries_left: attributes.retry_count,
            rnr_retries_left: attributes.rnr_retry,
            reads: VecDeque::with_capacity(usize::from(attributes.max_rd_atomic)),
            cursor: self.cursor,
            started: self.started,
            ..Self::new(config)
        };
    }

    /// Packets that are on their way or lost.
    pub(super) fn in_flight(&self) -> u32 {
        self.psn - self.una
    }

    /// Continues at the oldest PSN that is not acknowledged, which `tail` contains.
    pub(super) fn rewind(&mut self, tail: u32) {
        self.cursor = tail;
        self.psn = self.una;
        self.reads.clear();
        self.since_ack_request = 0;
        self.stop_ack_timer();
    }

    pub(super) fn stop_ack_timer(&mut self) {
        self.ack_deadline = None;
        self.probe_at = None;
    }
}

impl QueuePair {
    /// Starts the local ack timer. Halfway the flight is sent once more without that counting as a retry: the
    /// last packets of a message have nothing behind them that would show their loss earlier.
    ///
    /// A timeout may take up to four times what the attributes say (clause 9.7.6.1.3). From the second on, each that
    /// passed in vain makes the next one longer by as much: a peer that is a program may be waiting for a processor,
    /// and many who send to it again do not make it faster.
    pub(super) fn start_ack_timer(&mut self, now: Time) {
        let in_vain = self.attributes.retry_count.saturating_sub(self.req.retries_left);
        let timeout = self.attributes.ack_timeout_nanoseconds().map(|t| t * u64::from(in_vain.clamp(1, 4)));
        self.req.ack_deadline = timeout.map(|timeout| now.after(timeout));
        self.req.probe_at = timeout.map(|timeout| now.after(timeout / 2));
    }

    /// The next request packet.
    pub(super) fn poll_request<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        out: &mut [u8],
    ) -> Option<Transmit> {
        // Each turn sends a packet, passes one request, or ends: at most as many turns as the queue is deep.
        while self.req.cursor != self.sq.head {
            if !matches!(self.state, State::Rts | State::Sqd) || self.req.rnr_deadline.is_some() {
                return None;
            }
            let position = self.req.cursor;
            if position == self.req.started && !self.start_request(host) {
                return None;
            }
            if self.req.cursor != position {
                continue;
            }
            let wqe = self.sq.wqe(position);
            if wqe.error.is_some() {
                self.retire(host);
                return None;
            }
            if wqe.is_local() {
                self.req.cursor = position.wrapping_add(1);
                continue;
            }
            let count = self.admitted(wqe)?;
            let Some(len) = self.write_request(host, position, count, out)? else {
                self.sq.wqe_mut(position).error = Some(Status::LocalProtection);
                continue;
            };
            self.request_sent(now, host, position, count);
            return Some(Transmit { len, kind: TransmitKind::Request, position });
        }
        None
    }

    /// Begins the request at the cursor: gives it its PSNs, or executes it if it is a local one. False if it
    /// must wait.
    fn start_request<H: Host>(&mut self, host: &mut H) -> bool {
        let position = self.req.started;
        let wqe = self.sq.wqe(position);
        if self.state == State::Sqd {
            return false;
        }
        // Clause 10.8.3.3: a fence waits for READs and atomics. Clause 10.6.5.1: a local invalidate for all.
        if wqe.flags.contains(SendFlags::FENCE) && !self.req.reads.is_empty() {
            return false;
        }
        if matches!(wqe.operation, SendOperation::LocalInvalidate(_)) && self.sq.tail != position {
            return false;
        }
        let mut error = wqe.error;
        if error.is_none() {
            error = match wqe.operation {
                SendOperation::LocalInvalidate(key) => {
                    host.invalidate_local(key).err().map(|_| Status::MwBind)
                }
                SendOperation::BindWindow(request) => {
                    host.bind_window(&request).err().map(|_| Status::MwBind)
                }
                _ if wqe.wants_response() && self.attributes.max_rd_atomic == 0 => {
                    Some(Status::LocalQpOperation)
                }
                _ if self.transport == Transport::Ud => self.datagram_error(position),
                _ => None,
            };
        }
        let packets = if error.is_some() { 0 } else { wqe.psn_count(self.attributes.path_mtu) };
        let wqe = self.sq.wqe_mut(position);
        (wqe.first, wqe.packets, wqe.error) = (self.req.assigned, packets, error);
        self.req.assigned += packets;
        self.req.started = position.wrapping_add(1);
        if packets == 0 {
            self.retire(host);
        }
        true
    }

    /// Why a datagram cannot be sent.
    fn datagram_error(&self, position: u32) -> Option<Status> {
        if self.sq.destination(position).is_some_and(|to| to.is_foreign) {
            return Some(Status::LocalQpOperation);
        }
        let is_too_long = self.sq.wqe(position).length > self.attributes.path_mtu.bytes();
        is_too_long.then_some(Status::LocalLength)
    }

    /// How many PSNs the next packet takes, or `None` if it must wait for acknowledgements.
    fn admitted(&self, wqe: &Wqe) -> Option<u32> {
        if self.transport != Transport::Rc {
            return Some(1);
        }
        let (in_flight, window) = (self.req.in_flight(), self.req.congestion.window());
        if in_flight >= window {
            return None;
        }
        if !wqe.wants_response() {
            return Some(1);
        }
        // What was begun before the depth became zero still ends.
        if self.req.reads.len() >= usize::from(self.attributes.max_rd_atomic.max(1)) {
            return None;
        }
        let passed = self.req.psn - wqe.first;
        let chunk_left = self.req.read_chunk - passed % self.req.read_chunk;
        let count = chunk_left.min(wqe.packets - passed);
        (in_flight == 0 || in_flight + count <= window).then_some(count)
    }

    /// Writes the packet at the cursor. The outer `None`: no room; the inner: the request's memory is not accessible.
    #[expect(clippy::option_option, reason = "two ways to fail that the caller tells apart by ? and else")]
    fn write_request<H: Host>(
        &self,
        host: &mut H,
        position: u32,
        count: u32,
        out: &mut [u8],
    ) -> Option<Option<usize>> {
        use SendOperation as Op;
        let wqe = self.sq.wqe(position);
        let mtu = self.attributes.path_mtu.bytes();
        let passed = self.req.psn - wqe.first;
        let place = Position::new(passed == 0, passed + count == wqe.packets);
        let offset = passed * mtu;
        let payload_len = if wqe.fetches() { 0 } else { (wqe.length - offset).min(mtu) };

        let opcode = match wqe.operation {
            Op::CompareSwap { .. } => Opcode::RC_COMPARE_SWAP,
            Op::FetchAdd { .. } => Opcode::RC_FETCH_ADD,
            Op::Read { .. } => Opcode::RC_READ_REQUEST,
            Op::AtomicWrite { .. } => Opcode::RC_ATOMIC_WRITE,
            _ => match self.transport {
                Transport::Rc => message_opcode(&wqe.operation, place),
                Transport::Uc => message_opcode(&wqe.operation, place).to_uc(),
                _ if matches!(wqe.operation, Op::SendWithImmediate(_)) => Opcode::UD_SEND_ONLY_WITH_IMMEDIATE,
                _ => Opcode::UD_SEND_ONLY,
            },
        };
        let takes_receive = !matches!(wqe.operation, Op::Write { .. }) && !wqe.wants_response();
        let mut bth = BthRepr {
            solicited: place.ends() && takes_receive && wqe.flags.contains(SendFlags::SOLICITED),
            ack_request: self.transport == Transport::Rc && (place.ends() || self.wants_ack(count)),
            pad: pad_of(payload_len),
            pkey: self.attributes.pkey,
            ..BthRepr::new(opcode, self.attributes.dest_qp, self.req.psn)
        };
        let mut writer = Writer::new(out);
        if self.transport == Transport::Ud {
            let destination = self.sq.destination(position)?;
            bth.dest_qp = destination.qp_num;
            bth.emit(writer.header()?);
            // Clause 10.2.5: the highest bit selects the queue pair's own key.
            let own = destination.qkey >> 31 == 1;
            let qkey = if own { self.attributes.qkey } else { destination.qkey };
            DethRepr { qkey, src_qp: self.qp_num }.emit(writer.header()?);
        } else {
            bth.emit(writer.header()?);
        }
        match wqe.operation {
            Op::Write { va, rkey } | Op::WriteWithImmediate { va, rkey, .. } if place.begins() => {
                RethRepr { va, rkey, dma_len: wqe.length }.emit(writer.header()?);
            }
            Op::AtomicWrite { va, rkey } => {
                RethRepr { va, rkey, dma_len: wqe.length }.emit(writer.header()?);
            }
            Op::Read { va, rkey } => {
                let dma_len = (count * mtu).min(wqe.length - offset);
                RethRepr { va: va.wrapping_add(offset.into()), rkey, dma_len }.emit(writer.header()?);
            }
            Op::CompareSwap { va, rkey, compare, swap } => {
                AtomicEthRepr { va, rkey, swap_add: swap, compare }.emit(writer.header()?);
            }
            Op::FetchAdd { va, rkey, add } => {
                AtomicEthRepr { va, rkey, swap_add: add, compare: 0 }.emit(writer.header()?);
            }
            _ => {}
        }
        if place.ends() {
            match wqe.operation {
                Op::SendWithImmediate(data) | Op::WriteWithImmediate { immediate: data, .. } => {
                    ImmDtRepr { data }.emit(writer.header()?);
                }
                Op::SendWithInvalidate(rkey) => IethRepr { rkey }.emit(writer.header()?),
                _ => {}
            }
        }
        let payload = writer.payload(payload_len as usize)?;
        if let Some(inline) = self.sq.inline(position) {
            payload.copy_from_slice(inline.get(offset as usize..)?.get(..payload.len())?);
        } else if payload_len != 0 && host.gather(self.sq.sges(position), offset, payload).is_err() {
            return Some(None);
        }
        Some(Some(writer.len()))
    }

    /// Whether a packet within a message asks for an acknowledgement: four times per window, and before it closes.
    fn wants_ack(&self, count: u32) -> bool {
        let window = self.req.congestion.window();
        self.req.since_ack_request + count >= (window / 4).max(1) || self.req.in_flight() + count >= window
    }

    fn request_sent<H: Host>(&mut self, now: Time, host: &mut H, position: u32, count: u32) {
        let wqe = self.sq.wqe(position);
        let (end, wants_response) = (wqe.end(), wqe.wants_response());
        host.count(Counter::SentPackets);
        if self.transport == Transport::Rc {
            let next = self.req.psn + count;
            let asked = next == end || self.wants_ack(count);
            self.req.since_ack_request = if asked { 0 } else { self.req.since_ack_request + count };
            if self.req.psn.is_before(self.req.sent) {
                host.count(Counter::Retransmitted);
            }
            if wants_response {
                self.req.reads.push_back(next);
            }
            if self.req.ack_deadline.is_none() {
                self.start_ack_timer(now);
            }
        }
        self.req.psn += count;
        if self.req.sent.is_before(self.req.psn) {
            self.req.sent = self.req.psn;
        }
        if self.req.psn == end {
            self.req.cursor = position.wrapping_add(1);
        }
        if self.transport != Transport::Rc {
            // Sent is done: nobody will acknowledge it.
            self.req.una = self.req.psn;
            if self.req.psn == end {
                self.retire(host);
            }
        }
    }

    /// Completes, oldest first, all requests that are acknowledged, up to one that failed.
    pub(super) fn retire<H: Host>(&mut self, host: &mut H) {
        while self.sq.tail != self.req.started {
            let wqe = self.sq.wqe(self.sq.tail);
            if let Some(status) = wqe.error {
                self.fail_request(host, status);
                return;
            }
            // Steps since its first PSN, which is not after `una`: a message may take half of the circle.
            if self.req.una - wqe.first < wqe.packets {
                break;
            }
            let is_send = wqe.operation.completion_opcode() == super::CompletionOpcode::Send;
            host.count(if is_send { Counter::SendsCompleted } else { Counter::RdmaCompleted });
            self.complete_oldest(host, Status::Success);
        }
        // An acknowledgement may overtake a cursor that was set back.
        let behind = self.req.cursor.wrapping_sub(self.sq.tail).cast_signed() < 0;
        if behind || self.req.psn.is_before(self.req.una) {
            self.req.cursor = self.sq.tail;
            self.req.psn = self.req.una;
        }
        self.check_drained(host);
    }

    /// Completes the oldest request and frees its place.
    pub(super) fn complete_oldest<H: Host>(&mut self, host: &mut H, status: Status) {
        let wqe = self.sq.wqe(self.sq.tail);
        let visible = self.sq_sig_all || wqe.flags.contains(SendFlags::SIGNALED) || status != Status::Success;
        if visible {
            host.complete(Completion {
                kind: CompletionKind::Send,
                wr_id: wqe.wr_id,
                status,
                opcode: wqe.operation.completion_opcode(),
                byte_len: wqe.length,
                immediate: ImmediateOrKey::None,
                src_qp: 0,
                grh: false,
                solicited: false,
            });
        }
        self.sq.tail = self.sq.tail.wrapping_add(1);
    }

    /// Completes the oldest request in error. RC goes to ERR, UC and UD to SQE (clause 10.3.1.7); what follows is flushed.
    pub(super) fn fail_request<H: Host>(&mut self, host: &mut H, status: Status) {
        if self.sq.len() == 0 {
            return;
        }
        host.count(Counter::SendError);
        self.complete_oldest(host, status);
        if self.transport == Transport::Rc {
            self.to_error(host);
        } else {
            self.state = State::Sqe;
            self.flush_send_queue(host);
        }
    }

    /// Flushes all requests and leaves the requester with an empty queue.
    pub(super) fn flush_send_queue<H: Host>(&mut self, host: &mut H) {
        while self.sq.len() != 0 {
            self.complete_oldest(host, Status::WrFlush);
        }
        let tail = self.sq.tail;
        self.req.started = tail;
        self.req.assigned = self.req.sent;
        self.req.una = self.req.sent;
        self.req.rewind(tail);
        self.req.rnr_deadline = None;
    }

    /// Raises the drained event once when in SQD nothing that was begun is left.
    pub(super) fn check_drained<H: Host>(&mut self, host: &mut H) {
        if self.state == State::Sqd && !self.req.drained && self.sq.tail == self.req.started {
            self.req.drained = true;
            if self.attributes.sqd_event {
                host.event(Event::SendQueueDrained);
            }
        }
    }
}

/// Operation code of a SEND or RDMA WRITE packet of RC.
fn message_opcode(operation: &SendOperation, place: Position) -> Opcode {
    use SendOperation as Op;
    match (operation, place) {
        (Op::Write { .. } | Op::WriteWithImmediate { .. }, Position::First) => Opcode::RC_WRITE_FIRST,
        (Op::Write { .. } | Op::WriteWithImmediate { .. }, Position::Middle) => Opcode::RC_WRITE_MIDDLE,
        (Op::Write { .. }, Position::Last) => Opcode::RC_WRITE_LAST,
        (Op::Write { .. }, Position::Only) => Opcode::RC_WRITE_ONLY,
        (Op::WriteWithImmediate { .. }, Position::Last) => Opcode::RC_WRITE_LAST_WITH_IMMEDIATE,
        (Op::WriteWithImmediate { .. }, Position::Only) => Opcode::RC_WRITE_ONLY_WITH_IMMEDIATE,
        (_, Position::First) => Opcode::RC_SEND_FIRST,
        (_, Position::Middle) => Opcode::RC_SEND_MIDDLE,
        (Op::SendWithImmediate(_), Position::Last) => Opcode::RC_SEND_LAST_WITH_IMMEDIATE,
        (Op::SendWithImmediate(_), Position::Only) => Opcode::RC_SEND_ONLY_WITH_IMMEDIATE,
        (Op::SendWithInvalidate(_), Position::Last) => Opcode::RC_SEND_LAST_WITH_INVALIDATE,
        (Op::SendWithInvalidate(_), Position::Only) => Opcode::RC_SEND_ONLY_WITH_INVALIDATE,
        (_, Position::Last) => Opcode::RC_SEND_LAST,
        (_, Position::Only) => Opcode::RC_SEND_ONLY,
    }
}
