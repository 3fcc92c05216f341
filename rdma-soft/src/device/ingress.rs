//! From the socket to state machines.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Device;
use super::counters::DeviceCounter;
use super::egress::Origin;
use super::queue_pair::{Inner, QueuePair, with_host};
use super::scratch::{Scratch, Wakes};
use crate::net::{Datagrams, Envelope, IcrcCache, PathKey};
use crate::proto::{Acks, PacketMeta, Time};
use crate::wire::{
    Bth, ICRC_LEN, Icrc, Opcode, Packet, ParseError, Qpn, ROCE_V2_PORT, Transport, UnknownIdentification,
};

/// The queue pair number of multicast datagrams (clause 9.6.1.2).
pub(super) const MULTICAST: Qpn = 0xff_ffff;

/// The queue pair that the last packet was for: most likely the next one is for it too, and a look at the table
/// costs four atomic operations.
#[derive(Debug, Default)]
pub(super) struct LastFound {
    /// What [`Lists::destroyed`](super::Lists) was then.
    destroyed: u64,
    qp: Option<Arc<QueuePair>>,
}

impl LastFound {
    #[inline]
    pub(super) fn find(&mut self, device: &Device, number: Qpn) -> Option<&Arc<QueuePair>> {
        let destroyed = device.lists.destroyed.load(Ordering::Acquire);
        if self.destroyed != destroyed || self.qp.as_ref().is_none_or(|qp| qp.qp_num != number) {
            self.look_up(device, destroyed, number);
        }
        self.qp.as_ref()
    }

    #[inline(never)]
    fn look_up(&mut self, device: &Device, destroyed: u64, number: Qpn) {
        self.destroyed = destroyed;
        self.qp = device.queue_pairs().get(number).cloned();
    }
}

/// The queue pair number in a packet that was not checked yet.
fn number_in(bytes: &[u8]) -> Qpn {
    Bth::new(bytes).map_or(0, Bth::dest_qp)
}

impl Device {
    /// Takes what one receive call yielded.
    pub(super) fn take_datagrams(
        &self,
        datagrams: &Datagrams<'_>,
        icrcs: &mut IcrcCache,
        last: &mut LastFound,
        now: Time,
        scratch: &mut Scratch,
    ) {
        self.counters.count(DeviceCounter::ReceiveCalls);
        if datagrams.len() == 0 {
            // No bytes are a datagram too.
            self.counters.count(DeviceCounter::DatagramsReceived);
            self.counters.count(DeviceCounter::DropShort);
            return;
        }
        let mut envelope = Envelope {
            from: datagrams.source,
            to: SocketAddr::new(self.address, ROCE_V2_PORT),
            traffic_class: datagrams.traffic_class,
            identification: 0,
        };
        let path = PathKey::new(envelope.from, envelope.to);
        let mut place = 0;
        while let Some(first) = datagrams.get(place) {
            let number = number_in(first);
            let qp = last.find(self, number);
            // Packets come in runs; one run takes the lock once.
            let mut locked = None;
            while let Some(bytes) = datagrams.get(place).filter(|bytes| number_in(bytes) == number) {
                // The likeliest identification: that of a segment, which is 0 for a lone one.
                envelope.identification = u16::try_from(place).unwrap_or(0);
                place += 1;
                let icrc =
                    |transport: &[u8]| icrcs.icrc_on(path, envelope.identification, transport, || envelope);
                let Some(packet) = self.check(&envelope, Origin::Wire, bytes, icrc) else { continue };
                if let Some(qp) = qp {
                    let inner = locked.get_or_insert_with(|| qp.lock());
                    self.hand_over(qp, inner, &envelope, &packet, bytes.len(), now, &mut scratch.wakes);
                } else if number == MULTICAST {
                    self.hand_to_members(&envelope, None, &packet, bytes.len(), now, scratch);
                } else {
                    self.counters.count(DeviceCounter::DropNoQueuePair);
                }
            }
            if let (Some(qp), Some(inner)) = (qp, locked) {
                self.settle(qp, inner, Acks::Hold, now, scratch);
            }
        }
        self.counters.count_many(DeviceCounter::DatagramsReceived, place);
    }

    /// Gives a datagram of `len` bytes from BTH to ICRC to the members of a multicast group.
    pub(super) fn hand_to_members(
        &self,
        envelope: &Envelope,
        group: Option<[u8; 16]>,
        packet: &Packet<'_>,
        len: usize,
        now: Time,
        scratch: &mut Scratch,
    ) {
        for qp in self.members(envelope, group) {
            let mut inner = qp.lock();
            self.hand_over(&qp, &mut inner, envelope, packet, len, now, &mut scratch.wakes);
            self.settle(&qp, inner, Acks::Hold, now, scratch);
        }
    }

    /// The queue pair of a number; packets for others are counted.
    pub(super) fn queue_pair(&self, number: Qpn) -> Option<Arc<QueuePair>> {
        let qp = self.queue_pairs().get(number).cloned();
        if qp.is_none() {
            self.counters.count(DeviceCounter::DropNoQueuePair);
        }
        qp
    }

    /// The members of a multicast group, or of the one that a packet's address stands for.
    pub(super) fn members(&self, envelope: &Envelope, group: Option<[u8; 16]>) -> Vec<Arc<QueuePair>> {
        let members = self.multicast.members(group, envelope.to.ip());
        if members.is_empty() {
            self.counters.count(DeviceCounter::DropMulticast);
        }
        members
    }

    /// Checks a packet, BTH to ICRC. Every packet that goes no further is counted by its reason. `icrc` computes
    /// that of BTH to padding in this envelope.
    #[inline]
    pub(super) fn check<'b>(
        &self,
        envelope: &Envelope,
        origin: Origin,
        bytes: &'b [u8],
        icrc: impl FnOnce(&[u8]) -> Icrc,
    ) -> Option<Packet<'b>> {
        // The shape before the ICRC: a cheap check before a dear one, and lengths that hold after it.
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(e) => {
                self.counters.count(drop_reason(e));
                return None;
            }
        };
        if origin != Origin::Local && !self.check_icrc(envelope, origin, bytes, icrc) {
            self.counters.count(DeviceCounter::IcrcError);
            return None;
        }
        if packet.bth.opcode() == Opcode::CNP {
            self.counters.count(DeviceCounter::Cnp);
            return None;
        }
        Some(packet)
    }

    /// Gives a packet of `len` bytes from BTH to ICRC to its queue pair.
    #[expect(clippy::too_many_arguments, reason = "a packet, what is known of it, and where results go")]
    pub(super) fn hand_over(
        &self,
        qp: &QueuePair,
        inner: &mut Inner,
        envelope: &Envelope,
        packet: &Packet<'_>,
        len: usize,
        now: Time,
        wakes: &mut Wakes,
    ) {
        let grh;
        let mut meta = PacketMeta::default();
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
    }

    /// Whether the ICRC fits. The identification of a received IPv4 header is not known, so any that
    /// explains the ICRC is taken for it.
    #[inline]
    fn check_icrc(
        &self,
        envelope: &Envelope,
        origin: Origin,
        bytes: &[u8],
        icrc: impl FnOnce(&[u8]) -> Icrc,
    ) -> bool {
        let Some((transport, received)) = bytes.split_last_chunk::<ICRC_LEN>() else { return false };
        let (computed, received) = (icrc(transport), Icrc::from_bytes(*received));
        let identification = if received == computed {
            Some(envelope.identification)
        } else {
            self.explain(envelope, origin, computed, received, transport.len())
        };
        if origin == Origin::Wire && self.capture.is_some() {
            let identification = identification.unwrap_or(envelope.identification);
            self.record(&Envelope { identification, ..*envelope }, bytes, true);
        }
        identification.is_some()
    }

    /// The identification with which a packet has the ICRC that it came with.
    #[cold]
    fn explain(
        &self,
        envelope: &Envelope,
        origin: Origin,
        computed: Icrc,
        received: Icrc,
        transport_len: usize,
    ) -> Option<u16> {
        if origin != Origin::Wire || !envelope.from.is_ipv4() {
            return None;
        }
        // What explains the difference is the difference of the identifications.
        let difference = UnknownIdentification::explain(computed, received, transport_len)?;
        self.counters.count(DeviceCounter::OtherIdentification);
        Some(difference ^ envelope.identification)
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
