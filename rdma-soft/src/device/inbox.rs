//! Packets between queue pairs of one process.
//!
//! A packet is put into the inbox of the completion queue that its completion will go to, and the thread
//! that polls that queue takes it out and runs it through the state machine. So each thread works on its
//! own queue pairs' memory, and what two threads share is the packet: a cache line that moves between
//! processors costs as much as the work on it.
//!
//! A queue that nobody polls at the moment is served by others: at once by the sender if the queue is armed,
//! for then its thread sleeps; by the sender when it polls in vain for a while, a short one if no other thread
//! polls the queue; or by the background thread's next tick.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use crossbeam_utils::CachePadded;

use super::Device;
use super::completion_queue::CompletionQueue;
use super::counters::DeviceCounter;
use super::egress::Origin;
use super::ingress::LastFound;
use super::peer::{Peer, address_of_gid};
use super::queue_pair::QueuePair;
use super::scratch::Scratch;
use crate::net::Envelope;
use crate::proto::Acks;
use crate::wire::{Bth, Packet, Qpn, ROCE_V2_PORT};

/// More bytes than this are dropped, as a socket's buffer does.
const MOST: usize = 8 << 20;
/// A buffer that grew beyond this is given back when it is empty.
const KEEP: usize = 256 << 10;

/// Packets on their way to queue pairs of one completion queue.
///
/// Everything that sender and receiver share is in one cache line, but for the packets themselves.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    shared: CachePadded<Shared>,
    /// Who holds this takes packets out, so that they stay in order.
    reader: CachePadded<Mutex<Reader>>,
}

#[derive(Debug, Default)]
struct Reader {
    /// Exchanged with the buffer of the queue.
    letters: Vec<u8>,
    last: LastFound,
}

#[derive(Debug, Default)]
struct Shared {
    /// [`Letter`]s, each followed by its packet, BTH to ICRC.
    queue: Mutex<Vec<u8>>,
    /// Whether any wait, to see without the lock that none does.
    waiting: AtomicBool,
    /// Whether a thread may sleep until the next completion.
    armed: AtomicBool,
    /// The thread that polled the queue in vain, and it first in a row of such polls, when that was noted last, see `SentTo::thread`; 0 before any did.
    poller: AtomicUsize,
}

impl Shared {
    fn is_for_another(&self, thread: usize) -> bool {
        let poller = self.poller.load(Ordering::Relaxed);
        poller != 0 && poller != thread
    }
}

/// An inbox that is written to.
struct Open<'i> {
    queue: MutexGuard<'i, Vec<u8>>,
    shared: &'i Shared,
}

/// Who is to take a packet out of an inbox.
#[derive(Debug, Clone, Copy)]
struct Reads {
    /// May sleep.
    sleeps: bool,
    /// Is another thread than the one that put it there, as far as is known.
    is_another: bool,
}

impl Open<'_> {
    /// Announces what was written by `thread`; gives whom it is for.
    fn close(self, thread: usize) -> Reads {
        // While the cache line is here.
        let is_another = self.shared.is_for_another(thread);
        // The reader looks at the flag all the time: set while the lock is held it would run into it.
        drop(self.queue);
        // In this order with [`Device::arm`], which sets `armed` and then looks at `waiting`.
        self.shared.waiting.swap(true, Ordering::SeqCst);
        let sleeps = self.shared.armed.load(Ordering::SeqCst);
        Reads { sleeps, is_another }
    }
}

/// What is written in front of a packet. All comes from this device's address and goes to it, but for
/// datagrams to a group, which say where to for their receivers' route headers.
#[derive(Debug, Clone, Copy)]
struct Letter {
    qp_num: Qpn,
    len: u16,
    traffic_class: u8,
    group: Option<[u8; 16]>,
}

impl Letter {
    /// Without a group's address.
    const LEN: usize = 8;

    fn write(&self, out: &mut Vec<u8>) {
        let mut head = [0; Self::LEN];
        head[..4].copy_from_slice(&self.qp_num.to_ne_bytes());
        head[4..6].copy_from_slice(&self.len.to_ne_bytes());
        head[6] = self.traffic_class;
        head[7] = u8::from(self.group.is_some());
        out.extend_from_slice(&head);
        if let Some(group) = &self.group {
            out.extend_from_slice(group);
        }
    }

    /// The first letter and its packet, and what follows.
    fn read(bytes: &[u8]) -> Option<(Letter, &[u8], &[u8])> {
        let (head, mut rest) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let [a, b, c, d, e, f, traffic_class, has_group] = *head;
        let (qp_num, len) = (u32::from_ne_bytes([a, b, c, d]), u16::from_ne_bytes([e, f]));
        let mut group = None;
        if has_group != 0 {
            let (address, after) = rest.split_first_chunk::<16>()?;
            (group, rest) = (Some(*address), after);
        }
        let (packet, after) = rest.split_at_checked(usize::from(len))?;
        Some((Letter { qp_num, len, traffic_class, group }, packet, after))
    }
}

impl Inbox {
    pub(super) fn is_empty(&self) -> bool {
        !self.shared.waiting.load(Ordering::Acquire)
    }

    pub(super) fn set_armed(&self, armed: bool) {
        self.shared.armed.store(armed, Ordering::SeqCst);
    }

    /// A thread polls in vain.
    #[inline]
    pub(super) fn note_poller(&self, thread: usize) {
        if self.shared.poller.load(Ordering::Relaxed) != thread {
            self.shared.poller.store(thread, Ordering::Relaxed);
        }
    }

    /// Whether another thread polls, as far as is known.
    #[inline]
    pub(super) fn is_for_another(&self, thread: usize) -> bool {
        self.shared.is_for_another(thread)
    }

    fn queue(&self) -> MutexGuard<'_, Vec<u8>> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue, to write to.
    fn open(&self) -> Open<'_> {
        Open { queue: self.queue(), shared: &self.shared }
    }

    /// Exchanges what waits for `empty`.
    fn take(&self, empty: &mut Vec<u8>) {
        let mut queue = self.queue();
        std::mem::swap(&mut *queue, empty);
        self.shared.waiting.store(false, Ordering::Release);
    }

    /// Forgets what waits, and the queue pair that it knows, which knows the inbox's own completion queue.
    pub(super) fn clear(&self) {
        self.queue().clear();
        self.shared.waiting.store(false, Ordering::Release);
        self.reader.lock().unwrap_or_else(PoisonError::into_inner).last = LastFound::default();
    }
}

/// The inboxes of a queue pair of this process, as its peer knows them.
#[derive(Debug, Clone)]
pub(super) struct Route {
    /// Where the thread polls that waits for requests of the peer, and for answers.
    requests: Weak<CompletionQueue>,
    answers: Weak<CompletionQueue>,
}

impl Route {
    fn inbox_of(&self, is_request: bool) -> Option<Arc<CompletionQueue>> {
        if is_request { self.requests.upgrade() } else { self.answers.upgrade() }
    }

    fn is_one_inbox(&self) -> bool {
        self.requests.ptr_eq(&self.answers)
    }

    fn to(qp: &QueuePair) -> Self {
        Route { requests: Arc::downgrade(&qp.recv_cq), answers: Arc::downgrade(&qp.send_cq) }
    }
}

/// The completion queues that a thread put packets into and that may not have been served yet.
#[derive(Debug, Default)]
pub(super) struct SentTo {
    queues: Vec<Weak<CompletionQueue>>,
    /// Threads may sleep on some of them.
    to_sleepers: bool,
    /// Some are polled by no other thread.
    has_own: bool,
    /// Packets were put since the background thread was last told.
    news: bool,
}

impl SentTo {
    fn add(&mut self, cq: &Arc<CompletionQueue>, reads: Reads) {
        if !self.queues.iter().any(|known| known.as_ptr() == Arc::as_ptr(cq)) {
            self.queues.push(Arc::downgrade(cq));
        }
        self.to_sleepers |= reads.sleeps;
        self.has_own |= !reads.is_another;
        self.news = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    pub(super) fn has_own(&self) -> bool {
        self.has_own
    }

    /// Tells the threads of a process from one another: each has one of these. A hint, for another thread may have it after one
    /// has ended.
    pub(super) fn thread(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl Device {
    /// Puts packets of a connection to a queue pair of this process into the inboxes they belong to.
    pub(super) fn post_locally<'b>(
        &self,
        peer: &Peer,
        origin: Origin,
        packets: impl Iterator<Item = &'b [u8]>,
        sent_to: &mut SentTo,
    ) {
        let mut packets = packets.filter_map(|bytes| {
            self.counters.count(DeviceCounter::LocalPackets);
            if origin == Origin::Local {
                // As this device made it; who takes it out parses it.
                let bth = Bth::new(bytes)?;
                return Some((bth.dest_qp(), bth.opcode().info()?.is_request(), bytes));
            }
            let envelope = self.envelope_to(peer, 0);
            let packet = self.check(&envelope, origin, bytes, |transport| envelope.icrc(transport))?;
            Some((packet.bth.dest_qp(), packet.info().is_request(), bytes))
        });
        let Some((mut qp_num, mut is_request, mut bytes)) = packets.next() else { return };
        if peer.route.get().is_none() {
            let Some(qp) = self.queue_pair(qp_num) else { return };
            peer.route.get_or_init(|| Route::to(&qp));
        }
        let Some(route) = peer.route.get() else { return };
        loop {
            let Some(cq) = route.inbox_of(is_request) else {
                return self.counters.count(DeviceCounter::DropNoQueuePair);
            };
            // The lock is kept as long as packets go to the same inbox.
            let mut inbox = cq.inbox.open();
            let more = loop {
                self.write_letter(&mut inbox.queue, qp_num, peer.traffic_class, None, bytes);
                let before = is_request;
                let Some(next) = packets.next() else { break false };
                (qp_num, is_request, bytes) = next;
                if is_request != before && !route.is_one_inbox() {
                    break true;
                }
            };
            let reads = inbox.close(sent_to.thread());
            sent_to.add(&cq, reads);
            if !more {
                return;
            }
        }
    }

    /// Puts a datagram into the inboxes of the members of its group in this process.
    pub(super) fn post_to_group(
        &self,
        peer: &Peer,
        origin: Origin,
        group: [u8; 16],
        bytes: &[u8],
        sent_to: &mut SentTo,
    ) {
        self.counters.count(DeviceCounter::LocalPackets);
        let envelope = self.envelope_to(peer, 0);
        if self.check(&envelope, origin, bytes, |transport| envelope.icrc(transport)).is_none() {
            return;
        }
        for qp in self.members(&envelope, Some(group)) {
            let mut inbox = qp.recv_cq.inbox.open();
            self.write_letter(&mut inbox.queue, qp.qp_num, peer.traffic_class, Some(group), bytes);
            let reads = inbox.close(sent_to.thread());
            sent_to.add(&qp.recv_cq, reads);
        }
    }

    fn write_letter(
        &self,
        queue: &mut Vec<u8>,
        qp_num: Qpn,
        traffic_class: u8,
        group: Option<[u8; 16]>,
        packet: &[u8],
    ) {
        match u16::try_from(packet.len()) {
            Ok(len) if queue.len() + packet.len() <= MOST => {
                Letter { qp_num, len, traffic_class, group }.write(queue);
                queue.extend_from_slice(packet);
            }
            _ => self.counters.count(DeviceCounter::DropInboxFull),
        }
    }

    /// After sending: serves the queues whose threads may sleep, and sees to it that others are not forgotten.
    #[inline(always)]
    pub(super) fn serve_sleepers(&self, scratch: &mut Scratch) -> bool {
        (scratch.sent_to.to_sleepers || scratch.sent_to.news) && self.serve_news(scratch)
    }

    fn serve_news(&self, scratch: &mut Scratch) -> bool {
        /// Rounds of packets and answers before the rest is left to the background thread.
        const ROUNDS: usize = 8;
        let mut worked = false;
        for _ in 0..ROUNDS {
            if !std::mem::take(&mut scratch.sent_to.to_sleepers) {
                break;
            }
            worked |= self.serve_queues(true, true, scratch);
        }
        if std::mem::take(&mut scratch.sent_to.news) && !self.local_pending.load(Ordering::Relaxed) {
            self.local_pending.store(true, Ordering::SeqCst);
            self.note_deadline(self.now());
        }
        worked
    }

    /// Serves the queues that this thread sent to and nobody polled since; not `all`: those that no other thread polls.
    pub(super) fn serve_sent_to(&self, all: bool, scratch: &mut Scratch) -> bool {
        self.serve_queues(all, false, scratch)
    }

    fn serve_queues(&self, all: bool, wait: bool, scratch: &mut Scratch) -> bool {
        let mut worked = false;
        if scratch.sent_to.is_empty() {
            return worked;
        }
        let thread = scratch.sent_to.thread();
        scratch.sent_to.has_own = false;
        let mut queues = std::mem::take(&mut scratch.sent_to.queues);
        queues.retain(|weak| {
            let Some(cq) = weak.upgrade() else { return false };
            let is_left = !all && cq.inbox.is_for_another(thread);
            if !is_left {
                worked |= self.serve_inbox(&cq, wait, scratch);
            }
            is_left
        });
        // Nothing was sent meanwhile, most likely.
        let SentTo { queues: sent, .. } = &mut scratch.sent_to;
        sent.retain(|cq| !queues.iter().any(|known| known.ptr_eq(cq)));
        queues.append(sent);
        *sent = queues;
        worked
    }

    /// Serves every queue; for the background thread.
    pub(super) fn serve_all_inboxes(&self, scratch: &mut Scratch) -> bool {
        if !self.local_pending.swap(false, Ordering::SeqCst) {
            return false;
        }
        let waiting: Vec<Arc<CompletionQueue>> = {
            let mut all = self.completion_queues.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|cq| cq.strong_count() > 0);
            all.iter().filter_map(Weak::upgrade).filter(|cq| !cq.inbox.is_empty()).collect()
        };
        let mut worked = false;
        for cq in waiting {
            worked |= self.serve_inbox(&cq, false, scratch);
        }
        worked
    }

    /// Runs the packets of an inbox through their queue pairs. `wait` for a thread that does so already, which
    /// may have looked for the last time.
    pub(super) fn serve_inbox(&self, cq: &CompletionQueue, wait: bool, scratch: &mut Scratch) -> bool {
        if cq.inbox.is_empty() {
            return false;
        }
        let reader = &cq.inbox.reader;
        let mut reader = match reader.try_lock() {
            Ok(reader) => reader,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if wait => reader.lock().unwrap_or_else(PoisonError::into_inner),
            Err(TryLockError::WouldBlock) => return false,
        };
        let Reader { letters, last } = &mut *reader;
        cq.inbox.take(letters);
        let now = self.now();
        let own = SocketAddr::new(self.address, ROCE_V2_PORT);
        let mut envelope = Envelope { from: own, to: own, traffic_class: 0, identification: 0 };
        let mut rest = &letters[..];
        while let Some((Letter { qp_num, .. }, ..)) = Letter::read(rest) {
            let qp = last.find(self, qp_num);
            if qp.is_none() {
                self.counters.count(DeviceCounter::DropNoQueuePair);
            }
            let mut inner = qp.map(|qp| qp.lock());
            // Packets come in runs; one run takes the lock once.
            while let Some((letter, packet, after)) = Letter::read(rest)
                && letter.qp_num == qp_num
            {
                rest = after;
                let (Some(qp), Some(inner), Ok(parsed)) = (qp, &mut inner, Packet::parse(packet)) else {
                    continue;
                };
                envelope.traffic_class = letter.traffic_class;
                let to_group;
                let envelope = match letter.group {
                    None => &envelope,
                    Some(group) => {
                        let to = SocketAddr::new(address_of_gid(group), ROCE_V2_PORT);
                        to_group = Envelope { to, ..envelope };
                        &to_group
                    }
                };
                self.hand_over(qp, inner, envelope, &parsed, packet.len(), now, &mut scratch.wakes);
            }
            if let (Some(qp), Some(inner)) = (qp, inner) {
                self.settle(qp, inner, Acks::Hold, now, scratch);
            }
        }
        letters.clear();
        if letters.capacity() > KEEP {
            *letters = Vec::new();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_come_out_as_they_went_in() {
        let mut bytes = Vec::new();
        for (qp_num, group) in [(7, None), (0xff_fffe, Some([9; 16]))] {
            Letter { qp_num, len: 3, traffic_class: 5, group }.write(&mut bytes);
            bytes.extend_from_slice(&[1, 2, 3]);
        }
        let (first, packet, rest) = Letter::read(&bytes).unwrap();
        assert_eq!((first.qp_num, first.traffic_class, first.group, packet), (7, 5, None, &[1, 2, 3][..]));
        let (second, packet, rest) = Letter::read(rest).unwrap();
        assert_eq!((second.qp_num, second.group, packet), (0xff_fffe, Some([9; 16]), &[1, 2, 3][..]));
        assert!(Letter::read(rest).is_none());
        assert!(Letter::read(&bytes[..10]).is_none());
    }
}
