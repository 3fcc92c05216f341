//! The completer: what the requester of RC makes of acknowledgements, responses and time (clause 9.7.5.2, 9.9.2).

use std::time::Duration;

use super::work::len32;
use super::{Counter, Host, QueuePair, SendOperation, State, Status, Time};
use crate::wire::{NakCode, Operation, Packet, Position, Psn, RnrTimer};

impl QueuePair {
    /// Handles an acknowledgement, READ response or atomic acknowledgement.
    pub(super) fn handle_response<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) {
        if !matches!(self.state, State::Rts | State::Sqd) {
            host.count(Counter::DropState);
            return;
        }
        let psn = packet.bth.psn();
        if psn.is_before(self.req.una) {
            host.count(Counter::DuplicateResponse);
            return;
        }
        if !psn.is_before(self.req.sent) {
            host.count(Counter::DropResponse);
            return;
        }
        match packet.info().operation {
            Operation::ReadResponse => self.handle_read_response(now, host, packet),
            Operation::AtomicAcknowledge => self.handle_atomic_response(now, host, packet),
            _ => self.handle_acknowledge(now, host, packet),
        }
    }

    fn handle_acknowledge<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) {
        let Some(aeth) = packet.aeth() else { return };
        let psn = packet.bth.psn();
        if aeth.syndrome.is_ack() {
            self.acknowledge(now, host, psn.next());
        } else if let Some(timer) = aeth.syndrome.as_rnr_nak() {
            self.handle_rnr_nak(now, host, psn, timer);
        } else if let Some(code) = aeth.syndrome.as_nak() {
            self.handle_nak(now, host, psn, code);
        } else {
            host.count(Counter::DropResponse);
        }
    }

    /// Everything before `end` is acknowledged. If that includes a READ or atomic whose response did not
    /// come, the response is lost (implied NAK, clause 9.7.5.2.8). False if so, or if the queue pair failed.
    fn acknowledge<H: Host>(&mut self, now: Time, host: &mut H, end: Psn) -> bool {
        let mut limit = end;
        let mut implied_nak = false;
        let mut position = self.sq.tail;
        while position != self.req.started {
            let wqe = self.sq.wqe(position);
            if !wqe.first.is_before(end) {
                break;
            }
            if wqe.wants_response() && self.req.una.is_before(end) {
                limit = if wqe.first.is_before(self.req.una) { self.req.una } else { wqe.first };
                implied_nak = true;
                break;
            }
            position = position.wrapping_add(1);
        }
        self.advance(now, limit);
        self.retire(host);
        if !self.is_sending() {
            return false;
        }
        if implied_nak && self.req.implied_nak_at != Some(self.req.una) {
            self.req.implied_nak_at = Some(self.req.una);
            host.count(Counter::ImpliedNak);
            self.go_back(host);
        }
        !implied_nak
    }

    /// Moves the window up to `una`: forward progress, which restores all retry counts (clause 9.9.2.1.2).
    fn advance(&mut self, now: Time, una: Psn) {
        if !self.req.una.is_before(una) {
            return;
        }
        self.req.congestion.on_ack(una - self.req.una);
        self.req.una = una;
        if self.req.recover.is_before(una) {
            self.req.recover = una;
        }
        while self.req.reads.front().is_some_and(|end| !una.is_before(*end)) {
            self.req.reads.pop_front();
        }
        self.req.retries_left = self.attributes.retry_count;
        self.req.rnr_retries_left = self.attributes.rnr_retry;
        self.req.nak_at = None;
        self.req.implied_nak_at = None;
        // A receiver that took the request is ready, whatever an older NAK says.
        self.req.rnr_deadline = None;
        if una.is_before(self.req.psn) {
            self.start_ack_timer(now);
        } else {
            self.req.stop_ack_timer();
        }
    }

    fn is_sending(&self) -> bool {
        matches!(self.state, State::Rts | State::Sqd)
    }

    fn handle_rnr_nak<H: Host>(&mut self, now: Time, host: &mut H, psn: Psn, timer: RnrTimer) {
        host.count(Counter::RnrNakReceived);
        if !self.acknowledge(now, host, psn) || self.req.rnr_deadline.is_some() {
            return;
        }
        // Clause 9.9.2.4.1.3; seven means for ever. If nothing was sent since the flight was set back, the NAK is a
        // late copy of one that was paid for, or answers what a timeout gave up.
        if self.attributes.rnr_retry != 7 && self.req.in_flight() != 0 {
            if self.req.rnr_retries_left == 0 {
                host.count(Counter::RnrRetryExceeded);
                self.fail_request(host, Status::RnrRetryExceeded);
                return;
            }
            self.req.rnr_retries_left -= 1;
        }
        self.req.rewind(self.sq.tail);
        self.req.rnr_deadline = Some(now + Duration::from_nanos(timer.nanoseconds()));
    }

    fn handle_nak<H: Host>(&mut self, now: Time, host: &mut H, psn: Psn, code: NakCode) {
        let status = match code {
            NakCode::PSN_SEQUENCE => {
                host.count(Counter::SequenceNakReceived);
                // The responder says each gap once; the same again is a stray copy.
                if self.acknowledge(now, host, psn) && self.req.nak_at != Some(psn) {
                    self.req.nak_at = Some(psn);
                    self.go_back(host);
                }
                return;
            }
            NakCode::INVALID_REQUEST => Status::RemoteInvalidRequest,
            NakCode::REMOTE_ACCESS => Status::RemoteAccess,
            NakCode::REMOTE_OPERATIONAL => Status::RemoteOperation,
            _ => {
                host.count(Counter::DropResponse);
                return;
            }
        };
        host.count(Counter::ErrorNakReceived);
        if self.acknowledge(now, host, psn) {
            self.fail_request(host, status);
        }
    }

    /// Sends again from the oldest PSN that is not acknowledged because the peer says that something is lost.
    ///
    /// Only silence costs a retry (clause 9.9.2.1.2 leaves open what else does): the peer lives, and says the same of
    /// each PSN once between two timeouts. With a retry count of zero nothing is sent twice.
    fn go_back<H: Host>(&mut self, host: &mut H) {
        if self.attributes.retry_count == 0 {
            host.count(Counter::RetryExceeded);
            self.fail_request(host, Status::RetryExceeded);
            return;
        }
        if self.req.recover == self.req.una {
            self.req.congestion.on_loss();
            self.req.recover = self.req.sent;
        }
        self.req.rewind(self.sq.tail);
    }

    /// Takes what a response says about earlier requests; true if it answers the oldest one.
    fn reach_response<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) -> bool {
        let psn = packet.bth.psn();
        if packet.aeth().is_some_and(|aeth| !aeth.syndrome.is_ack()) {
            host.count(Counter::DropResponse);
            return false;
        }
        if self.req.una.is_before(psn) && !self.acknowledge(now, host, psn) {
            return false;
        }
        self.req.una == psn && self.sq.tail != self.req.started
    }

    fn handle_read_response<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) {
        if !self.reach_response(now, host, packet) {
            return;
        }
        let psn = packet.bth.psn();
        let position = self.sq.tail;
        let wqe = self.sq.wqe(position);
        let mtu = self.attributes.path_mtu.bytes();
        let passed = psn - wqe.first;
        let last = passed + 1 == wqe.packets;
        let ends = last || (passed + 1).is_multiple_of(self.req.read_chunk);
        let offset = passed.wrapping_mul(mtu);
        let expected = if last { wqe.length.wrapping_sub(offset) } else { mtu };
        // Clause 9.7.5.2.4: operation code and length must be those of this PSN. Whether a response is the first
        // depends on which copy of the request it answers, and says nothing.
        let fits = match wqe.operation {
            SendOperation::Read { .. } => {
                packet.info().position.ends() == ends && len32(packet.payload().len()) == expected
            }
            SendOperation::AtomicWrite { .. } => {
                packet.info().position == Position::Only && packet.payload().is_empty()
            }
            _ => false,
        };
        if !fits {
            self.fail_request(host, Status::BadResponse);
            return;
        }
        if !packet.payload().is_empty()
            && host.scatter(self.sq.sges(position), offset, packet.payload()).is_err()
        {
            self.fail_request(host, Status::LocalProtection);
            return;
        }
        self.advance(now, psn.next());
        self.retire(host);
    }

    fn handle_atomic_response<H: Host>(&mut self, now: Time, host: &mut H, packet: &Packet<'_>) {
        if !self.reach_response(now, host, packet) {
            return;
        }
        let position = self.sq.tail;
        let operation = self.sq.wqe(position).operation;
        let is_atomic =
            matches!(operation, SendOperation::CompareSwap { .. } | SendOperation::FetchAdd { .. });
        let Some(answer) = packet.atomic_ack_eth().filter(|_| is_atomic) else {
            self.fail_request(host, Status::BadResponse);
            return;
        };
        if host.scatter(self.sq.sges(position), 0, &answer.original.to_ne_bytes()).is_err() {
            self.fail_request(host, Status::LocalProtection);
            return;
        }
        self.advance(now, packet.bth.psn().next());
        self.retire(host);
    }

    /// Handles the local ack timeout and the end of an RNR wait.
    pub(super) fn handle_requester_timeout<H: Host>(&mut self, now: Time, host: &mut H) {
        let due = |deadline: Option<Time>| deadline.is_some_and(|deadline| deadline <= now);
        if due(self.req.rnr_deadline) {
            self.req.rnr_deadline = None;
        }
        if due(self.req.ack_deadline) {
            self.req.stop_ack_timer();
            self.req.nak_at = None;
            self.req.implied_nak_at = None;
            host.count(Counter::Timeout);
            if self.req.retries_left == 0 {
                host.count(Counter::RetryExceeded);
                self.fail_request(host, Status::RetryExceeded);
                return;
            }
            self.req.retries_left -= 1;
            self.go_back(host);
        } else if due(self.req.probe_at) {
            self.req.probe_at = None;
            if self.attributes.retry_count != 0 {
                host.count(Counter::Probe);
                let deadline = self.req.ack_deadline;
                self.req.rewind(self.sq.tail);
                self.req.ack_deadline = deadline;
            }
        }
    }
}
