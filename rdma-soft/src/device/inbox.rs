//! Packets between queue pairs of one process.
//!
//! A packet is put into the inbox of the completion queue that its completion will go to, and the thread
//! that polls that queue takes it out and runs it through the state machine. So each thread works on its
//! own queue pairs' memory, and what two threads share is the packet: a cache line that moves between
//! processors costs as much as the work on it.
//!
//! A queue that nobody polls at the moment is served by others: at once by the sender if the queue is armed,
//! for then its thread sleeps; by the sender when it polls in vain for a while; or by the background
//! thread's next tick.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use super::Device;
use super::completion_queue::CompletionQueue;
use super::counters::DeviceCounter;
use super::egress::Origin;
use super::queue_pair::QueuePair;
use super::scratch::Scratch;
use crate::net::Envelope;
use crate::proto::Acks;
use crate::wire::Packet;

/// More bytes than this are dropped, as a socket's buffer does.
const MOST: usize = 8 << 20;
/// A buffer that grew beyond this is given back when it is empty.
const KEEP: usize = 256 << 10;

/// Packets on their way to queue pairs of one completion queue.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    queue: Mutex<Letters>,
    /// How many wait, to see without the lock that none does.
    len: AtomicUsize,
    /// Who holds this takes packets out, so that they stay in order; the buffers are exchanged with those of
    /// the queue.
    reader: Mutex<Letters>,
}

#[derive(Debug, Default)]
struct Letters {
    bytes: Vec<u8>,
    list: Vec<Letter>,
}

#[derive(Debug)]
struct Letter {
    qp: Arc<QueuePair>,
    envelope: Envelope,
    /// In `bytes`, BTH to ICRC; one begins where the one before ends.
    len: usize,
}

impl Letters {
    fn clear(&mut self) {
        self.list.clear();
        self.bytes.clear();
        if self.bytes.capacity() > KEEP {
            self.bytes = Vec::new();
        }
    }
}

impl Inbox {
    pub(super) fn is_empty(&self) -> bool {
        self.len.load(Ordering::Acquire) == 0
    }

    fn queue(&self) -> MutexGuard<'_, Letters> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if there is no room.
    fn push(&self, qp: Arc<QueuePair>, envelope: &Envelope, packet: &[u8]) -> bool {
        let mut queue = self.queue();
        if queue.bytes.len() + packet.len() > MOST {
            return false;
        }
        queue.bytes.extend_from_slice(packet);
        queue.list.push(Letter { qp, envelope: *envelope, len: packet.len() });
        self.len.store(queue.list.len(), Ordering::Release);
        true
    }

    /// Exchanges what waits for `empty`.
    fn take(&self, empty: &mut Letters) {
        let mut queue = self.queue();
        std::mem::swap(&mut *queue, empty);
        self.len.store(0, Ordering::Release);
    }

    /// Forgets what waits, and with it the queue pairs that it is for.
    pub(super) fn clear(&self) {
        self.queue().clear();
        self.len.store(0, Ordering::Release);
    }
}

/// The completion queues that a thread put packets into and that may not have been served yet.
#[derive(Debug, Default)]
pub(super) struct SentTo(Vec<Weak<CompletionQueue>>);

impl SentTo {
    fn add(&mut self, cq: &Arc<CompletionQueue>) {
        if !self.0.iter().any(|known| known.as_ptr() == Arc::as_ptr(cq)) {
            self.0.push(Arc::downgrade(cq));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Device {
    /// Puts a packet of this process into the inbox it belongs to.
    pub(super) fn post_locally(
        &self,
        envelope: &Envelope,
        origin: Origin,
        group: Option<[u8; 16]>,
        bytes: &[u8],
        sent_to: &mut SentTo,
    ) {
        self.counters.count(DeviceCounter::LocalPackets);
        let Some(packet) = self.check(envelope, origin, bytes) else { return };
        let is_request = packet.info().is_request();
        let mut post = |qp: Arc<QueuePair>| {
            // Where the thread that waits for the outcome polls: a receiver, or the sender of a request.
            let cq = Arc::clone(if is_request { &qp.recv_cq } else { &qp.send_cq });
            if cq.inbox.push(qp, envelope, bytes) {
                sent_to.add(&cq);
            } else {
                self.counters.count(DeviceCounter::DropInboxFull);
            }
        };
        match group {
            Some(_) => self.members(envelope, group).into_iter().for_each(post),
            None => {
                if let Some(qp) = self.queue_pair(packet.bth.dest_qp) {
                    post(qp);
                }
            }
        }
    }

    /// After sending: serves the queues whose threads sleep, and sees to it that the others are not forgotten.
    pub(super) fn serve_sleepers(&self, scratch: &mut Scratch) -> bool {
        /// Queues that one call serves before it leaves the rest to the background thread.
        const PER_CALL: usize = 64;
        let (mut worked, mut at) = (false, 0);
        // The list may grow meanwhile.
        while at < scratch.sent_to.0.len().min(PER_CALL) {
            if let Some(cq) = scratch.sent_to.0[at].upgrade()
                && !cq.inbox.is_empty()
            {
                // Pairs with the fence of `arm`.
                std::sync::atomic::fence(Ordering::SeqCst);
                if cq.is_armed() {
                    worked |= self.serve_inbox(&cq, true, scratch);
                } else if !self.local_pending.load(Ordering::Relaxed) {
                    self.local_pending.store(true, Ordering::SeqCst);
                    self.note_deadline(self.now());
                }
            }
            at += 1;
        }
        if at >= PER_CALL {
            scratch.sent_to.0.clear();
        }
        worked
    }

    /// Serves all queues that this thread sent to and nobody polled since.
    pub(super) fn serve_sent_to(&self, scratch: &mut Scratch) -> bool {
        let mut worked = false;
        for cq in std::mem::take(&mut scratch.sent_to.0) {
            if let Some(cq) = cq.upgrade() {
                worked |= self.serve_inbox(&cq, false, scratch);
            }
        }
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
        let mut letters = match reader.try_lock() {
            Ok(letters) => letters,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) if wait => reader.lock().unwrap_or_else(PoisonError::into_inner),
            Err(TryLockError::WouldBlock) => return false,
        };
        cq.inbox.take(&mut letters);
        let Letters { bytes, list } = &mut *letters;
        let mut rest = bytes.as_slice();
        let mut list = list.drain(..).peekable();
        let now = self.now();
        while let Some(Letter { qp, envelope, len }) = list.next() {
            let mut inner = qp.lock();
            let (mut packet, mut after) = rest.split_at(len);
            loop {
                if let Ok(parsed) = Packet::parse(packet) {
                    self.hand_over(
                        &qp,
                        &mut inner,
                        &envelope,
                        &parsed,
                        packet.len(),
                        now,
                        &mut scratch.wakes,
                    );
                }
                let Some(next) = list.next_if(|next| Arc::ptr_eq(&next.qp, &qp)) else { break };
                (packet, after) = after.split_at(next.len);
            }
            rest = after;
            self.settle(&qp, inner, Acks::Hold, now, scratch);
        }
        drop(list);
        letters.clear();
        true
    }
}
