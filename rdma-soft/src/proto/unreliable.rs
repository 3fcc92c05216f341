//! The responders of UC and UD, which answer nothing.

use super::assembly::{Refusal, fail_receive};
use super::work::len32;
use super::{
    Completion, CompletionKind, CompletionOpcode, Counter, Host, ImmediateOrKey, PacketMeta, QueuePair,
    Status,
};
use crate::wire::Packet;

/// Room in front of a datagram for the global route header (clause 11.4.1.2).
const GRH_LEN: u32 = 40;

impl QueuePair {
    /// Handles a request of UC: a message of which anything is missing or wrong is dropped in silence (clause 9.8.2).
    pub(super) fn handle_uc_request<H: Host>(&mut self, host: &mut H, packet: &Packet<'_>) {
        let begins = packet.info().position.begins();
        let psn = packet.bth.psn();
        if psn == self.resp.epsn {
            self.note_established(host);
        }
        if psn != self.resp.epsn && !begins {
            self.resp.assembly.abandon();
        }
        self.resp.epsn = psn.next();
        if begins {
            if self.resp.assembly.in_message() {
                host.count(Counter::DropBrokenMessage);
            }
            self.resp.assembly.abandon();
        } else if !self.resp.assembly.in_message() {
            host.count(Counter::DropBrokenMessage);
            return;
        }
        let (mtu, access) = (self.attributes.path_mtu.bytes(), self.attributes.access);
        let Err(refusal) = self.resp.assembly.execute(host, packet, mtu, access) else { return };
        host.count(match refusal {
            Refusal::NotReady => Counter::DropNoReceive,
            Refusal::Sequence => Counter::DropBrokenMessage,
            Refusal::Length | Refusal::ReceiveTooShort => Counter::DropLength,
            _ => Counter::DropAccess,
        });
        self.resp.assembly.abandon();
        if refusal == Refusal::LocalProtection {
            self.fail_own_receive(host);
        }
    }

    /// Handles a datagram (clause 9.8.3).
    pub(super) fn handle_datagram<H: Host>(
        &mut self,
        host: &mut H,
        packet: &Packet<'_>,
        meta: &PacketMeta<'_>,
    ) {
        let Some(deth) = packet.deth() else { return };
        if deth.qkey != self.attributes.qkey {
            host.count(Counter::DropQkey);
            return;
        }
        let len = len32(packet.payload().len());
        if len > self.attributes.path_mtu.bytes() {
            host.count(Counter::DropLength);
            return;
        }
        let Some(receive) = self.resp.assembly.receive(host) else {
            host.count(Counter::DropNoReceive);
            return;
        };
        // Dropped in silence, and the receive stays for the next datagram: an error of class D (clause 9.9.3), as in rxe.
        // A completion in error would let any sender use up the receives of a queue pair that serves many.
        if receive.length < u64::from(GRH_LEN + len) {
            host.count(Counter::DropLength);
            return;
        }
        let grh = meta.grh.unwrap_or(&[0; GRH_LEN as usize]);
        let placed = host
            .scatter_receive(0, grh)
            .and_then(|()| if len == 0 { Ok(()) } else { host.scatter_receive(GRH_LEN, packet.payload()) });
        if placed.is_err() {
            self.fail_own_receive(host);
            return;
        }
        let _ = self.resp.assembly.take_receive();
        host.count(Counter::ReceivesCompleted);
        host.complete(Completion {
            kind: CompletionKind::Receive,
            wr_id: receive.wr_id,
            status: Status::Success,
            opcode: CompletionOpcode::Receive,
            byte_len: GRH_LEN + len,
            immediate: packet.immdt().map_or(ImmediateOrKey::None, |h| ImmediateOrKey::Immediate(h.data)),
            src_qp: deth.src_qp,
            grh: true,
            solicited: packet.bth.solicited(),
        });
    }

    /// The receive names memory that is not ours to write: a local error, which fails the queue pair (clause 9.9.3.1).
    fn fail_own_receive<H: Host>(&mut self, host: &mut H) {
        if let Some(receive) = self.resp.assembly.take_receive() {
            fail_receive(host, receive, Status::LocalProtection);
        }
        self.enter_error(host);
    }
}
