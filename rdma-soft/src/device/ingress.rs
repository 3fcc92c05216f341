//! From the socket, or from a queue pair of this process, to state machines.

use std::net::SocketAddr;
use std::sync::Arc;

use super::Device;
use super::counters::DeviceCounter;
use super::queue_pair::{QueuePair, with_host};
use super::scratch::{Scratch, Touched, Wakes};
use crate::net::{Datagrams, Envelope};
use crate::proto::{PacketMeta, Time};
use crate::wire::{
    ICRC_LEN, Icrc, Opcode, Packet, ParseError, Qpn, ROCE_V2_PORT, Transport, UnknownIdentification,
};

/// The queue pair number of multicast datagrams (clause 9.6.1.2).
const MULTICAST: Qpn = 0xff_ffff;

/// Where a packet comes from, and so what has to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The socket.
    Wire,
    /// A queue pair of this process.
    Local,
    /// The same, but fault injection may have changed it.
    FaultyLocal,
}

impl Device {
    /// Takes what one receive call yielded.
    pub(super) fn take_datagrams(&self, datagrams: &Datagrams<'_>, now: Time, scratch: &mut Scratch) {
        self.counters.count(DeviceCounter::ReceiveCalls);
        let envelope = Envelope {
            from: datagrams.source,
            to: SocketAddr::new(self.address, ROCE_V2_PORT),
            traffic_class: datagrams.traffic_class,
            identification: 0,
        };
        for packet in datagrams.iter() {
            self.counters.count(DeviceCounter::DatagramsReceived);
            self.take_packet(
                &envelope,
                Origin::Wire,
                None,
                packet,
                now,
                &mut scratch.wakes,
                &mut scratch.touched,
            );
        }
    }

    /// Checks a packet, BTH to ICRC, and gives it to the queue pair it is for. Every packet that goes no
    /// further is counted by its reason.
    #[expect(clippy::too_many_arguments, reason = "a packet, what is known of it, and where results go")]
    pub(super) fn take_packet(
        &self,
        envelope: &Envelope,
        origin: Origin,
        group: Option<[u8; 16]>,
        bytes: &[u8],
        now: Time,
        wakes: &mut Wakes,
        touched: &mut Touched,
    ) {
        // The shape before the ICRC: a cheap check before a dear one, and lengths that hold after it.
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(e) => return self.counters.count(drop_reason(e)),
        };
        if origin != Origin::Local && !self.check_icrc(envelope, origin, bytes) {
            return self.counters.count(DeviceCounter::IcrcError);
        }
        if packet.bth.opcode == Opcode::CNP {
            return self.counters.count(DeviceCounter::Cnp);
        }
        let deliver = |qp: &Arc<QueuePair>, wakes: &mut Wakes, touched: &mut Touched| {
            self.deliver(qp, envelope, &packet, bytes.len(), now, wakes, touched);
        };
        match group {
            None if packet.bth.dest_qp != MULTICAST => {
                let qp = self.queue_pairs().get(packet.bth.dest_qp).cloned();
                match qp {
                    Some(qp) => deliver(&qp, wakes, touched),
                    None => self.counters.count(DeviceCounter::DropNoQueuePair),
                }
            }
            group => {
                let members = self.multicast.members(group, envelope.to.ip());
                if members.is_empty() {
                    self.counters.count(DeviceCounter::DropMulticast);
                }
                for qp in members {
                    deliver(&qp, wakes, touched);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "as `take_packet`")]
    fn deliver(
        &self,
        qp: &Arc<QueuePair>,
        envelope: &Envelope,
        packet: &Packet<'_>,
        len: usize,
        now: Time,
        wakes: &mut Wakes,
        touched: &mut Touched,
    ) {
        let grh;
        let mut meta = PacketMeta::default();
        let mut inner = qp.lock();
        if qp.transport == Transport::Ud {
            grh = envelope.global_route_header(len);
            meta.grh = Some(&grh);
        } else if inner.peer.as_ref().is_none_or(|peer| peer.address.ip() != envelope.from.ip()) {
            // Clause 9.6.1.4 and annex A17: a connection takes packets of its peer's address only.
            return self.counters.count(DeviceCounter::DropSource);
        }
        with_host!(self, qp, inner, wakes, now, |machine, host| {
            machine.handle_packet(now, &mut host, packet, &meta);
        });
        drop(inner);
        touched.add(qp);
    }

    /// Whether the ICRC fits. The identification of a received IPv4 header is not known, so any that
    /// explains the ICRC is taken for it.
    fn check_icrc(&self, envelope: &Envelope, origin: Origin, bytes: &[u8]) -> bool {
        let Some((transport, icrc)) = bytes.split_last_chunk::<ICRC_LEN>() else { return false };
        let (received, computed) = (Icrc::from_bytes(*icrc), envelope.icrc(transport));
        let identification = match origin {
            _ if received == computed => Some(0),
            Origin::Wire if envelope.from.is_ipv4() => {
                UnknownIdentification::explain(computed, received, transport.len())
            }
            _ => None,
        };
        if origin == Origin::Wire {
            self.record(&Envelope { identification: identification.unwrap_or(0), ..*envelope }, bytes, true);
        }
        identification.is_some()
    }
}

fn drop_reason(error: ParseError) -> DeviceCounter {
    match error {
        ParseError::TooShort => DeviceCounter::DropShort,
        ParseError::Version => DeviceCounter::DropVersion,
        ParseError::UnknownOpcode(_) => DeviceCounter::DropOpcode,
        ParseError::Pad => DeviceCounter::DropPad,
        ParseError::UnexpectedPayload => DeviceCounter::DropPayload,
    }
}
