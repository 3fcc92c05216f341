//! From state machines to the socket, or straight to a queue pair of this process.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::DeviceCounter;
use super::inbox::SentTo;
use super::pacing::Pause;
use super::peer::{Peer, address_of_gid, socket_address};
use super::queue_pair::{Inner, QueuePair, with_host};
use super::scratch::Scratch;
use super::{Device, FaultState};
use crate::net::{Envelope, Fault, IcrcCache, MAX_BATCH_LEN, MAX_SEGMENTS, SendError, corrupt};
use crate::proto::{Acks, Destination, MAX_PACKET_LEN, Time};
use crate::wire::{ICRC_LEN, Transport};

/// Packets taken from a state machine at once: a 64 KiB message at the largest path MTU.
const BATCH_PACKETS: usize = 16;
const BATCH_LEN: usize = BATCH_PACKETS * MAX_PACKET_LEN;
/// Where a batch begins: behind headers of 12 or 28 bytes, payload is then aligned as memory is.
const BATCH_START: usize = 4;
/// What a queue pair may send before others have their turn.
const QUOTA: usize = 4 * BATCH_LEN;
/// What may wait while the socket takes nothing, in bytes.
const DELAYED_LEN: usize = 4 << 20;

/// Packets on their way from a state machine to the socket, one behind the other.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Box<[u8]>,
    len: usize,
    /// Where each is, BTH to ICRC.
    packets: Vec<Range<usize>>,
    /// Where those of a connection go.
    peer: Option<Arc<Peer>>,
    /// Where each datagram goes; empty for a connection.
    destinations: Vec<Destination>,
}

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

impl Default for Batch {
    fn default() -> Self {
        Batch {
            bytes: vec![0; BATCH_START + BATCH_LEN].into_boxed_slice(),
            len: BATCH_START,
            packets: Vec::with_capacity(BATCH_PACKETS),
            peer: None,
            destinations: Vec::with_capacity(BATCH_PACKETS),
        }
    }
}

impl Batch {
    fn clear(&mut self) {
        self.len = BATCH_START;
        self.packets.clear();
        self.destinations.clear();
    }

    /// Packets `from` on that one segmented send can carry: of one destination and one size, the last one
    /// shorter.
    #[inline]
    fn run(&self, from: usize) -> usize {
        if from + 1 == self.packets.len() { from + 1 } else { self.run_of_several(from) }
    }

    fn run_of_several(&self, from: usize) -> usize {
        let first = &self.packets[from];
        let mut len = first.len();
        let mut end = from + 1;
        while let Some(next) = self.packets.get(end)
            && end - from < MAX_SEGMENTS
            && next.len() <= first.len()
            && len + next.len() <= MAX_BATCH_LEN
            && self.destinations.get(end) == self.destinations.get(from)
        {
            len += next.len();
            end += 1;
            if next.len() < first.len() {
                break;
            }
        }
        end
    }
}

/// Datagrams that the socket would not take, in order.
#[derive(Debug, Default)]
pub(super) struct Delayed {
    queue: Mutex<VecDeque<DelayedSend>>,
    bytes: AtomicUsize,
}

#[derive(Debug)]
struct DelayedSend {
    peer: Peer,
    bytes: Box<[u8]>,
    segment: usize,
}

impl Device {
    /// Sends what the queue pair has to send, as far as its quota goes, and enters it into the lists that
    /// its state asks for. Takes the lock that the caller holds. True if it has to wait for its receiver.
    #[inline(always)]
    pub(super) fn settle<'q>(
        &self,
        qp: &'q Arc<QueuePair>,
        inner: MutexGuard<'q, Inner>,
        acks: Acks,
        now: Time,
        scratch: &mut Scratch,
    ) -> bool {
        if inner.machine.may_transmit(acks) {
            return self.transmit(qp, inner, acks, now, scratch);
        }
        self.note_state(qp, &inner, now, scratch);
        drop(inner);
        false
    }

    /// The same for a queue pair that has something to send. A thread that answers a lone packet finds little of this
    /// code in its processor's caches. So what is rare from here on stands in functions of its own, and what every
    /// packet passes is inlined, where a call costs more than what it calls.
    #[inline(never)]
    fn transmit<'q>(
        &self,
        qp: &'q Arc<QueuePair>,
        mut inner: MutexGuard<'q, Inner>,
        acks: Acks,
        now: Time,
        scratch: &mut Scratch,
    ) -> bool {
        let is_crowd = qp.transport == Transport::Rc && self.is_crowded();
        if (is_crowd || inner.pause.is_some()) && self.must_wait(qp, &mut inner, is_crowd, now) {
            self.note_state(qp, &inner, now, scratch);
            drop(inner);
            self.wait_in_turn(qp, now);
            return true;
        }
        if !qp.listed.sending.enter() {
            // The thread that sends holds acknowledgements; what was to be flushed waits for its tick.
            self.note_state(qp, &inner, now, scratch);
            return false;
        }
        let mut sent = 0;
        loop {
            let dry = self.fill(qp, &mut inner, acks, now, scratch);
            self.note_state(qp, &inner, now, scratch);
            drop(inner);
            sent += scratch.batch.len;
            self.send_batch(scratch);
            let pause = if qp.transport != Transport::Rc || is_crowd {
                self.pace_batch(&scratch.batch, now)
            } else {
                None
            };
            if pause.is_none() && dry {
                if qp.listed.sending.leave() {
                    return false;
                }
            } else if pause.is_some() || sent >= QUOTA {
                let paused = pause.is_some();
                if paused {
                    qp.lock().pause = pause;
                }
                // In this order: who finds it in the list must be able to send.
                qp.listed.sending.stop();
                self.wait_in_turn(qp, now);
                return paused;
            }
            inner = qp.lock();
        }
    }

    /// Whether the queue pair may not send at the moment because its receiver's buffer is full.
    #[cold]
    fn must_wait(&self, qp: &QueuePair, inner: &mut Inner, is_crowd: bool, now: Time) -> bool {
        if inner.machine.only_acknowledges() {
            // A few bytes, and the peer waits for them.
            inner.pause = None;
        } else if let Some(pause) = &mut inner.pause {
            // Those in the list have their turn one after the other, whoever else looks at them.
            if !qp.listed.in_runnable.load(Ordering::Acquire) && !self.still_paused(pause, now) {
                inner.pause = None;
            }
        } else if is_crowd && let Some(peer) = inner.peer.as_deref().filter(|peer| !peer.is_local) {
            inner.pause = self.pause_before(peer.address, now);
        }
        inner.pause.is_some()
    }

    /// Others have their turn; who looks at the list next goes on with this one.
    #[inline(never)]
    fn wait_in_turn(&self, qp: &Arc<QueuePair>, now: Time) {
        self.lists.runnable.add(qp);
        self.note_deadline(now);
    }

    /// Counts the packets of a batch that was sent against what their receivers take.
    #[inline(never)]
    fn pace_batch(&self, batch: &Batch, now: Time) -> Option<Pause> {
        let mut from = 0;
        let mut pause = None;
        while let (Some(first), None) = (batch.packets.get(from), &pause) {
            let end = batch.run(from);
            let bytes = batch.packets[end - 1].end - first.start;
            let peer = match (batch.destinations.get(from), &batch.peer) {
                (Some(destination), _) => {
                    socket_address(address_of_gid(destination.gid), self.interface_index)
                }
                (None, Some(peer)) => peer.address,
                (None, None) => return None,
            };
            if !self.is_local(peer.ip()) && !peer.ip().is_multicast() {
                pause = self.pace(peer, bytes, end - from, now);
            }
            from = end;
        }
        pause
    }

    /// Takes packets from the state machine until it has none or the batch is full; true if it has none.
    fn fill(&self, qp: &QueuePair, inner: &mut Inner, acks: Acks, now: Time, scratch: &mut Scratch) -> bool {
        let batch = &mut scratch.batch;
        batch.clear();
        let mut dry = false;
        with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
            while batch.packets.len() < BATCH_PACKETS {
                let transmit = if machine.may_transmit(acks) {
                    machine.poll_transmit(now, &mut host, acks, &mut batch.bytes[batch.len..])
                } else {
                    None
                };
                let Some(transmit) = transmit else {
                    dry = true;
                    break;
                };
                let end = batch.len + transmit.len + ICRC_LEN;
                batch.packets.push(batch.len..end);
                if qp.transport == Transport::Ud
                    && let Some(destination) = machine.destination(&transmit)
                {
                    batch.destinations.push(*destination);
                }
                batch.len = end;
            }
        });
        if !batch.packets.is_empty()
            && !batch.peer.as_ref().zip(inner.peer.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b))
        {
            batch.peer.clone_from(&inner.peer);
        }
        dry
    }

    /// Puts the acknowledgement that is held, and nothing else, into the batch; false if there is none.
    pub(super) fn fill_owed(
        &self,
        qp: &QueuePair,
        inner: &mut Inner,
        now: Time,
        scratch: &mut Scratch,
    ) -> bool {
        let batch = &mut scratch.batch;
        batch.clear();
        with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
            if let Some(transmit) = machine.poll_owed(&mut host, &mut batch.bytes[batch.len..]) {
                let end = batch.len + transmit.len + ICRC_LEN;
                batch.packets.push(batch.len..end);
                batch.len = end;
            }
        });
        batch.peer.clone_from(&inner.peer);
        !batch.packets.is_empty()
    }

    pub(super) fn send_batch(&self, scratch: &mut Scratch) {
        let Some(peer) = scratch.batch.peer.take() else { return self.send_each(scratch) };
        if peer.is_local && self.faults.is_none() {
            self.send_locally(&peer, scratch);
        } else {
            self.send_to(&peer, 0..scratch.batch.packets.len(), scratch);
        }
        scratch.batch.peer = Some(peer);
    }

    /// Sends datagrams, each to its destination. Of a connection that ended meanwhile there are none, and nobody waits
    /// for what is left.
    #[inline(never)]
    fn send_each(&self, scratch: &mut Scratch) {
        let mut from = 0;
        while let Some(destination) = scratch.batch.destinations.get(from).copied() {
            let end = scratch.batch.run(from);
            let peer = self.peer_of_destination(&destination);
            if peer.address.ip().is_multicast() {
                for packet in from..end {
                    let range = scratch.batch.packets[packet].clone();
                    self.send_one(&peer, range, Some(destination.gid), scratch);
                }
            } else {
                self.send_to(&peer, from..end, scratch);
            }
            from = end;
        }
    }

    /// Sends packets to one destination, as many by one call as it takes.
    fn send_to(&self, peer: &Peer, places: Range<usize>, scratch: &mut Scratch) {
        let mut from = places.start;
        while from < places.end {
            let end = scratch.batch.run(from);
            if end == from + 1 || peer.is_local || self.faults.is_some() || !self.socket.segmentation() {
                let range = scratch.batch.packets[from].clone();
                self.send_one(peer, range, None, scratch);
                from += 1;
                continue;
            }
            let Scratch { batch: Batch { bytes, packets, .. }, icrcs, .. } = scratch;
            if self.send_run(peer, from..end, bytes, packets, icrcs) {
                from = end;
            }
        }
    }

    /// Delivers the packets of a connection within this process. Nothing can happen to them on the way, so
    /// they need no ICRC.
    #[inline(never)]
    fn send_locally(&self, peer: &Peer, scratch: &mut Scratch) {
        let Scratch { batch: Batch { bytes, packets, .. }, sent_to, .. } = scratch;
        let packets = packets.iter().map(|packet| &bytes[packet.clone()]);
        if self.capture.is_some() {
            packets.clone().for_each(|packet| self.record(&self.envelope_to(peer, 0), packet, false));
        }
        self.post_locally(peer, Origin::Local, packets, sent_to);
    }

    /// Completes the packets of a run and sends them by one call; false if they must go one by one.
    fn send_run(
        &self,
        peer: &Peer,
        run: Range<usize>,
        bytes: &mut [u8],
        packets: &[Range<usize>],
        icrcs: &mut IcrcCache,
    ) -> bool {
        let (first, last) = (&packets[run.start], &packets[run.end - 1]);
        for (segment, packet) in packets[run.clone()].iter().enumerate() {
            let identification = u16::try_from(segment).unwrap_or(u16::MAX);
            self.seal(peer, identification, &mut bytes[packet.clone()], icrcs);
        }
        let all = &bytes[first.start..last.end];
        match self.send_datagrams(peer, all, first.len()) {
            Ok(()) => {
                if self.capture.is_some() {
                    self.record_run(peer, &packets[run], bytes);
                }
                true
            }
            Err(SendError::NoSegmentation) => {
                self.socket.disable_segmentation();
                false
            }
            Err(_) => true,
        }
    }

    /// Adds packets that left to the capture file.
    #[cold]
    fn record_run(&self, peer: &Peer, packets: &[Range<usize>], bytes: &[u8]) {
        for (segment, packet) in packets.iter().enumerate() {
            let identification = u16::try_from(segment).unwrap_or(u16::MAX);
            self.record(&self.envelope_to(peer, identification), &bytes[packet.clone()], true);
        }
    }

    /// Sends or delivers a packet by itself, with faults if they are asked for.
    #[inline(always)]
    fn send_one(&self, peer: &Peer, range: Range<usize>, group: Option<[u8; 16]>, scratch: &mut Scratch) {
        let Scratch { batch, sent_to, icrcs, .. } = scratch;
        let packet = &mut batch.bytes[range];
        // Without faults a local packet needs no ICRC: nothing can happen to it.
        if !peer.is_local || self.faults.is_some() {
            self.seal(peer, 0, packet, icrcs);
        }
        match &self.faults {
            None => self.pass_on(peer, packet, group, sent_to),
            Some(faults) => self.pass_on_faulty(faults, peer, packet, group, sent_to),
        }
    }

    /// The same as [`pass_on`](Self::pass_on), with a fault if it is time for one.
    #[cold]
    fn pass_on_faulty(
        &self,
        faults: &Mutex<FaultState>,
        peer: &Peer,
        packet: &mut [u8],
        group: Option<[u8; 16]>,
        sent_to: &mut SentTo,
    ) {
        let mut faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
        let fault = faults.source.next();
        if fault != Fault::None {
            self.counters.count(DeviceCounter::Injected);
        }
        let mut repeat = 1;
        match fault {
            Fault::None => {}
            Fault::Lose => repeat = 0,
            Fault::Duplicate => repeat = 2,
            Fault::Corrupt { bit } => corrupt(packet, bit),
            Fault::Reorder => repeat = 0,
        }
        let held = if fault == Fault::Reorder {
            faults.held.replace((peer.clone(), packet.to_vec()))
        } else {
            faults.held.take()
        };
        drop(faults);
        for _ in 0..repeat {
            self.pass_on(peer, packet, group, sent_to);
        }
        // What was held back comes after the packet behind it.
        if let Some((peer, packet)) = held {
            self.pass_on(&peer, &packet, None, sent_to);
        }
    }

    /// Hands one packet to the socket or to its queue pair in this process, or both.
    #[inline(always)]
    fn pass_on(&self, peer: &Peer, packet: &[u8], group: Option<[u8; 16]>, sent_to: &mut SentTo) {
        if self.capture.is_some() {
            self.record(&self.envelope_to(peer, 0), packet, !peer.is_local || self.faults.is_some());
        }
        if peer.is_local || group.is_some() {
            self.deliver(peer, packet, group, sent_to);
        }
        if !peer.is_local {
            // A failure was counted; what it means is the transport's business.
            let _ = self.send_datagrams(peer, packet, packet.len());
        }
    }

    /// Puts one packet into the inbox that it belongs to, or those of a group.
    #[inline(never)]
    fn deliver(&self, peer: &Peer, packet: &[u8], group: Option<[u8; 16]>, sent_to: &mut SentTo) {
        let origin = if self.faults.is_some() { Origin::FaultyLocal } else { Origin::Local };
        match group {
            Some(group) => self.post_to_group(peer, origin, group, packet, sent_to),
            None => self.post_locally(peer, origin, std::iter::once(packet), sent_to),
        }
    }

    /// Writes the ICRC behind a packet.
    fn seal(&self, peer: &Peer, identification: u16, packet: &mut [u8], icrcs: &mut IcrcCache) {
        let Some((transport, icrc)) = packet.split_last_chunk_mut::<ICRC_LEN>() else { return };
        let envelope = || self.envelope_to(peer, identification);
        *icrc = icrcs.icrc_on(peer.path, identification, transport, envelope).to_bytes();
    }

    pub(super) fn envelope_to(&self, peer: &Peer, identification: u16) -> Envelope {
        Envelope {
            from: self.own_address(),
            to: peer.address,
            traffic_class: peer.traffic_class,
            identification,
        }
    }

    /// Sends, or queues behind what waits already.
    #[inline(never)]
    fn send_datagrams(&self, peer: &Peer, bytes: &[u8], segment: usize) -> Result<(), SendError> {
        if self.delayed.bytes.load(Ordering::Acquire) == 0 {
            match self.send_now(peer, bytes, segment) {
                Err(SendError::Full) => {}
                Err(SendError::Refused(e)) => {
                    self.counters.count(DeviceCounter::SendRefused);
                    return Err(SendError::Refused(e));
                }
                other => return other,
            }
        }
        self.delay(peer, bytes, segment)
    }

    /// Queues what the socket does not take at the moment.
    #[cold]
    fn delay(&self, peer: &Peer, bytes: &[u8], segment: usize) -> Result<(), SendError> {
        let mut queue = self.delayed.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if self.delayed.bytes.load(Ordering::Relaxed) + bytes.len() > DELAYED_LEN {
            self.counters.count(DeviceCounter::SendRefused);
            return Err(SendError::Full);
        }
        self.counters.count(DeviceCounter::SendDelayed);
        self.delayed.bytes.fetch_add(bytes.len(), Ordering::Release);
        queue.push_back(DelayedSend { peer: peer.clone(), bytes: bytes.into(), segment });
        drop(queue);
        self.note_deadline(self.now());
        Ok(())
    }

    #[inline(always)]
    fn send_now(&self, peer: &Peer, bytes: &[u8], segment: usize) -> Result<(), SendError> {
        self.socket.send(&peer.to, bytes, segment, peer.traffic_class)
    }

    pub(super) fn has_delayed(&self) -> bool {
        self.delayed.bytes.load(Ordering::Acquire) > 0
    }

    /// Tries again to send what the socket would not take; true if nothing is left.
    pub(super) fn send_delayed(&self) -> bool {
        if self.delayed.bytes.load(Ordering::Acquire) == 0 {
            return true;
        }
        let mut queue = self.delayed.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(send) = queue.front() {
            match self.send_now(&send.peer, &send.bytes, send.segment) {
                Err(SendError::Full) => return false,
                Ok(()) => {}
                Err(_) => self.counters.count(DeviceCounter::SendRefused),
            }
            self.delayed.bytes.fetch_sub(send.bytes.len(), Ordering::Release);
            queue.pop_front();
        }
        true
    }

    /// Lets a packet pass that fault injection holds back for a packet that does not come.
    pub(super) fn release_held(&self, scratch: &mut Scratch) {
        let Some(faults) = &self.faults else { return };
        let held = faults.lock().unwrap_or_else(PoisonError::into_inner).held.take();
        if let Some((peer, packet)) = held {
            self.pass_on(&peer, &packet, None, &mut scratch.sent_to);
        }
    }

    fn peer_of_destination(&self, destination: &Destination) -> Peer {
        self.peer_at(address_of_gid(destination.gid), destination.traffic_class)
    }

    /// What the device's own socket is bound to.
    pub(super) fn own_address(&self) -> SocketAddr {
        socket_address(self.address, self.interface_index)
    }

    /// The destination at an address.
    pub(crate) fn peer_at(&self, address: std::net::IpAddr, traffic_class: u8) -> Peer {
        let to = socket_address(address, self.interface_index);
        Peer::new(self.own_address(), to, traffic_class, self.is_local(address))
    }

    /// Whether packets to the address stay in this process.
    fn is_local(&self, address: std::net::IpAddr) -> bool {
        address == self.address && !self.settings.local_through_wire
    }
}
