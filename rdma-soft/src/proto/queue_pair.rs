//! The queue pair: what the device holds and calls.

use super::assembly::fail_receive;
use super::requester::Requester;
use super::responder::Responder;
use super::send_queue::SendQueue;
use super::{
    Acks, Attributes, Config, CongestionConfig, Counter, Destination, Event, Host, PostError, SendRequest,
    State, Status, Time, Transmit,
};
use crate::wire::{Packet, Psn, Qpn, Transport};

/// What the network layer knows of a packet beyond its transport headers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PacketMeta<'a> {
    /// Global route header to place in front of a datagram: the IPv6 header, or 20 undefined bytes and the
    /// IPv4 header (annex A17.4.5.1). Needed for UD only; zeros are placed if it is missing.
    pub grh: Option<&'a [u8; 40]>,
}

/// A transition that the state machine of queue pairs does not have (clause 10.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no transition from {from:?} to {to:?}")]
pub struct ModifyError {
    /// State of the queue pair.
    pub from: State,
    /// State that was asked for.
    pub to: State,
}

/// The requester and responder of one queue pair, see the [module](super).
#[derive(Debug)]
pub struct QueuePair {
    pub(super) transport: Transport,
    pub(super) qp_num: Qpn,
    pub(super) sq_sig_all: bool,
    pub(super) state: State,
    pub(super) attributes: Attributes,
    congestion: CongestionConfig,
    /// The latest time that a call gave.
    clock: Time,
    /// Whether a packet of the connection was received since RTR.
    established: bool,
    /// Whether the last packet was a response.
    responded: bool,
    pub(super) sq: SendQueue,
    pub(super) req: Requester,
    pub(super) resp: Responder,
}

impl QueuePair {
    /// A queue pair in RESET. All memory it will ever need but for READ and atomic resources is allocated here.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            transport: config.transport,
            qp_num: config.qp_num,
            sq_sig_all: config.sq_sig_all,
            state: State::Reset,
            attributes: Attributes::default(),
            congestion: config.congestion,
            clock: Time::ZERO,
            established: false,
            responded: false,
            sq: SendQueue::new(config),
            req: Requester::new(&config.congestion),
            resp: Responder::new(),
        }
    }

    /// The time of a call. A thread that read the clock and then had to wait comes with a time that has passed
    /// for the others: a timer that it started with that would be due at once, and again each time that it is
    /// started, until all retries are gone.
    fn tick(&mut self, now: Time) -> Time {
        self.clock = self.clock.max(now);
        self.clock
    }

    /// Queues a send request. In SQE and ERR it completes at once, flushed.
    #[inline(always)]
    pub fn post_send<H: Host>(
        &mut self,
        _now: Time,
        host: &mut H,
        request: &SendRequest<'_>,
    ) -> Result<(), PostError> {
        self.check_state()?;
        self.sq.push(self.transport, request, host.unpolled_sends())?;
        if matches!(self.state, State::Sqe | State::Err) {
            self.flush_send_queue(host);
        }
        Ok(())
    }

    /// Whether [`post_send`](Self::post_send) would take a request behind `ahead` others, or whose completions wait to be polled;
    /// nothing of it happens.
    pub fn check_send(&self, request: &SendRequest<'_>, ahead: u32) -> Result<(), PostError> {
        self.check_state()?;
        self.sq.check(self.transport, request, ahead)
    }

    fn check_state(&self) -> Result<(), PostError> {
        match self.state {
            State::Reset | State::Init | State::Rtr => Err(PostError::InvalidState(self.state)),
            _ => Ok(()),
        }
    }

    /// Takes a packet that is addressed to this queue pair. Its ICRC was verified, and for RC and UC its
    /// source address is that of the connected peer.
    pub fn handle_packet<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        packet: &Packet<'_>,
        meta: &PacketMeta<'_>,
    ) {
        let now = self.tick(now);
        let info = packet.info();
        if info.transport != self.transport {
            host.count(Counter::DropTransport);
            return;
        }
        // Clause 10.3.1: nothing is received before RTR or after an error.
        if matches!(self.state, State::Reset | State::Init | State::Err) {
            host.count(Counter::DropState);
            return;
        }
        // Clause 10.9.3: the keys must match, and one of the two must be a full member.
        let (theirs, ours) = (packet.bth.pkey(), self.attributes.pkey);
        if (theirs ^ ours) & 0x7fff != 0 || (theirs | ours) & 0x8000 == 0 {
            host.count(Counter::DropPkey);
            return;
        }
        host.count(Counter::ReceivedPackets);
        if !info.is_request() {
            self.handle_response(now, host, packet);
            return;
        }
        match self.transport {
            Transport::Rc => self.handle_request(now, host, packet),
            Transport::Uc => self.handle_uc_request(host, packet),
            _ => self.handle_datagram(host, packet, meta),
        }
    }

    /// Raises the event of a connection that got its first packet in RTR. One that is out of sequence does not
    /// count: it may be anybody's, while one with the agreed PSN is the peer's.
    pub(super) fn note_established<H: Host>(&mut self, host: &mut H) {
        if self.state == State::Rtr && !self.established {
            self.established = true;
            host.event(Event::CommunicationEstablished);
        }
    }

    /// Writes the next packet to send into `out`, which has room for [`MAX_PACKET_LEN`](super::MAX_PACKET_LEN),
    /// or returns `None` if there is nothing to send now. Call again until then; one call is one packet.
    #[inline]
    pub fn poll_transmit<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        acks: Acks,
        out: &mut [u8],
    ) -> Option<Transmit> {
        let now = self.tick(now);
        let (has_request, has_response) = (self.req.cursor != self.sq.head, self.resp.has_response());
        // A long READ response and our own requests take turns.
        if has_request
            && self.responded
            && let Some(request) = self.poll_request(now, host, out)
        {
            self.responded = false;
            return Some(request);
        }
        if has_response && let Some(response) = self.poll_response(host, out) {
            self.responded = true;
            return Some(response);
        }
        if has_request
            && !self.responded
            && let Some(request) = self.poll_request(now, host, out)
        {
            return Some(request);
        }
        self.responded = false;
        self.poll_ack(host, acks, out)
    }

    /// The acknowledgement that waits for company, alone and ahead of all else; `None` if there is none, or a response comes before it.
    pub fn poll_owed<H: Host>(&mut self, host: &mut H, out: &mut [u8]) -> Option<Transmit> {
        self.poll_ack(host, Acks::Flush, out)
    }

    /// Where a datagram goes that [`poll_transmit`](Self::poll_transmit) gave just now; `None` means the peer of
    /// the connection.
    #[must_use]
    pub fn destination(&self, sent: &Transmit) -> Option<&Destination> {
        self.sq.destination(sent.position)
    }

    /// Whether [`poll_transmit`](Self::poll_transmit) may have something; false is sure, and cheap to know.
    #[must_use]
    pub fn may_transmit(&self, acks: Acks) -> bool {
        self.req.cursor != self.sq.head || self.resp.may_transmit(acks)
    }

    /// Whether all that there is to send are acknowledgements, negative ones among them.
    #[must_use]
    pub fn only_acknowledges(&self) -> bool {
        self.req.cursor == self.sq.head && !self.resp.resources.any_pending()
    }

    /// Whether an acknowledgement waits for [`Acks::Flush`].
    #[must_use]
    pub fn ack_pending(&self) -> bool {
        self.resp.ack_due
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called. Changes with any other call.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        // The probe, where there is one, comes before the timeout; neither is set during an RNR wait.
        self.req.rnr_deadline.or(self.req.probe_at).or(self.req.ack_deadline)
    }

    /// Handles what is due at `now`; harmless if nothing is. Then call [`poll_transmit`](Self::poll_transmit).
    pub fn handle_timeout<H: Host>(&mut self, now: Time, host: &mut H) {
        let now = self.tick(now);
        self.handle_requester_timeout(now, host);
    }

    /// Moves to another state, or changes attributes in the same (INIT, RTS, SQD). Which attributes are read is
    /// said at [`Attributes`]. RESET forgets all work without completions; the host must forget its current
    /// receive then too, for the queue pair will ask for the next one. ERR flushes it. An acknowledgement that waits for company survives ERR and not RESET: flush it
    /// before, and before the queue pair is destroyed, or the peer takes a delivered message for lost.
    pub fn modify<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        to: State,
        attributes: &Attributes,
    ) -> Result<(), ModifyError> {
        let now = self.tick(now);
        let from = self.state;
        match (from, to) {
            (_, State::Reset) => {
                self.reset();
                return Ok(());
            }
            (_, State::Err) => {
                self.to_error(host);
                return Ok(());
            }
            (State::Reset | State::Init, State::Init)
            | (State::Init, State::Rtr)
            | (State::Rtr | State::Rts | State::Sqd | State::Sqe, State::Rts)
            | (State::Rts | State::Sqd, State::Sqd) => {}
            _ => return Err(ModifyError { from, to }),
        }
        self.read_attributes(attributes, to);
        match (from, to) {
            (State::Init, State::Rtr) => {
                self.resp.reset();
                self.resp.epsn = attributes.receive_psn;
            }
            (State::Rtr, State::Rts) => self.req.begin(attributes, &self.congestion),
            (State::Rts, State::Sqd) => self.req.drained = false,
            _ => {}
        }
        if to != State::Init && self.transport == Transport::Rc {
            self.resp.resources.resize(usize::from(attributes.max_dest_rd_atomic));
        }
        self.state = to;
        // A timeout that there was none of when the flight left begins now.
        if self.req.in_flight() != 0 && self.req.ack_deadline.is_none() {
            self.start_ack_timer(now);
        }
        self.check_drained(host);
        Ok(())
    }

    /// Takes over what the transition to `to` may change; MTU, peer and PSNs stay as they were from RTS on.
    fn read_attributes(&mut self, attributes: &Attributes, to: State) {
        let old = self.attributes;
        self.attributes = *attributes;
        match to {
            State::Rtr => {}
            State::Rts if self.state == State::Rtr => {
                self.attributes.path_mtu = old.path_mtu;
                self.attributes.dest_qp = old.dest_qp;
                self.attributes.receive_psn = old.receive_psn;
            }
            _ if to != State::Init => {
                self.attributes.path_mtu = old.path_mtu;
                self.attributes.dest_qp = old.dest_qp;
                self.attributes.receive_psn = old.receive_psn;
                self.attributes.send_psn = old.send_psn;
                self.req.retries_left = self.req.retries_left.min(attributes.retry_count);
                self.req.rnr_retries_left = self.req.rnr_retries_left.min(attributes.rnr_retry);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.state = State::Reset;
        self.attributes = Attributes::default();
        self.sq.clear();
        self.req = Requester::new(&self.congestion);
        self.resp = Responder::new();
        self.established = false;
    }

    /// Moves to ERR and flushes, as if by [`modify`](Self::modify); harmless if it is there already.
    pub fn to_error<H: Host>(&mut self, host: &mut H) {
        self.resp.cancel();
        self.enter_error(host);
    }

    /// Moves to ERR for a reason that no completion tells, with the event that says so; harmless in RESET and ERR.
    pub fn fail<H: Host>(&mut self, host: &mut H) {
        if !matches!(self.state, State::Reset | State::Err) {
            host.event(Event::Fatal);
            self.to_error(host);
        }
    }

    /// Moves to ERR; what the responder has queued still goes out.
    pub(super) fn enter_error<H: Host>(&mut self, host: &mut H) {
        if self.state == State::Err {
            return;
        }
        self.state = State::Err;
        self.flush_send_queue(host);
        if let Some(receive) = self.resp.assembly.take_receive() {
            fail_receive(host, receive, Status::WrFlush);
        }
        host.flush_receives();
    }

    /// Current state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Transport service.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Attributes as last read.
    #[must_use]
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// The next PSN that the requester will use for the first time (`sq_psn`).
    #[must_use]
    pub fn send_psn(&self) -> Psn {
        self.req.sent
    }

    /// The PSN that the responder expects (`rq_psn`).
    #[must_use]
    pub fn receive_psn(&self) -> Psn {
        self.resp.epsn
    }

    /// Whether the state is SQD and requests that were begun are not complete yet (`sq_draining`).
    #[must_use]
    pub fn sq_draining(&self) -> bool {
        self.state == State::Sqd && !self.req.drained
    }

    /// Send requests that are posted and not complete.
    #[must_use]
    pub fn send_queue_len(&self) -> u32 {
        self.sq.len()
    }
}
