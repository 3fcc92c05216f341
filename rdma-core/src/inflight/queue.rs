//! A work queue as the library keeps it: what is posted, what it keeps alive, who waits.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;
use verbs_sys::{ibv_sge, ibv_wc, ibv_wc_status};

use super::held::{Held, Keep};
use super::slot::{Claim, FreeList, SlotTable};
use super::table::{QueueIndex, WrId};
use crate::cq::{CqInner, Deferred, Later, Opcode, Sink};
use crate::sync::UnsafeCell;

/// What a slot keeps besides its buffers.
pub(crate) struct Payload {
    /// The caller's number.
    pub(crate) id: u64,
    /// Position in the queue's order of posting.
    pub(crate) seq: u32,
    /// Entries of the scatter/gather list that the slot owns.
    pub(crate) held: u16,
    pub(crate) opcode: Opcode,
    pub(crate) keep: Option<Keep>,
}

/// What only the poster touches.
pub(crate) struct PostState {
    pub(crate) free: FreeList,
    /// The next work request's position.
    pub(crate) seq: u32,
    /// Unsignalled sends since the last signalled one.
    pub(crate) unsignaled: u32,
    /// A credit is set aside for the signalled send that ends the run.
    pub(crate) reserved: bool,
    /// Scratch for scatter/gather lists, `max_sge` long.
    pub(crate) sges: Vec<ibv_sge>,
}

/// The first error of a queue pair, which explains the flushes behind it.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// 0, or 1 << 63 | vendor error << 31 | status.
    first: AtomicU64,
}

impl Health {
    #[cold]
    pub(crate) fn note(&self, wc: &ibv_wc) {
        if wc.status != ibv_wc_status::IBV_WC_WR_FLUSH_ERR {
            let value = 1 << 63 | u64::from(wc.vendor_err) << 31 | u64::from(wc.status.0 & 0x7fff_ffff);
            let _ = self.first.compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Status and vendor error of the first completion that failed by itself.
    #[allow(clippy::cast_possible_truncation, reason = "the parts are masked")]
    pub(crate) fn first(&self) -> Option<(ibv_wc_status, u32)> {
        match self.first.load(Ordering::Relaxed) {
            0 => None,
            value => Some((ibv_wc_status(value as u32 & 0x7fff_ffff), (value >> 31) as u32)),
        }
    }

    pub(crate) fn clear(&self) {
        self.first.store(0, Ordering::Relaxed);
    }
}

/// What kind of queue, and where its completions go.
pub(crate) enum Kind {
    /// Of one queue pair, completing on one completion queue.
    Send(Arc<CqInner>),
    /// As above.
    Recv(Arc<CqInner>),
    /// Shared: completes on the receive queues of all its pairs, each of which has the whole depth
    /// reserved.
    Shared,
}

/// A send, receive or shared receive queue: its slots and what they hold.
pub struct WorkQueue {
    pub(crate) slots: SlotTable<Payload, ibv_wc>,
    held: Box<[UnsafeCell<MaybeUninit<Held>>]>,
    max_sge: u32,
    index: Arc<QueueIndex>,
    base: u64,
    pub(crate) kind: Kind,
    post: Mutex<PostState>,
    /// Unsignalled sends in the order of posting: written by the poster at `tail`, read by the
    /// poller at `head`. An entry is slot and generation, and 20 bits of the position.
    ring: Box<[AtomicU64]>,
    ring_tail: AtomicU64,
    ring_head: AtomicU64,
    pub(crate) health: Arc<Health>,
    waiters: Mutex<Vec<Waker>>,
}

// SAFETY: `held` cells follow the state of their slot (S-3); all else is Send and Sync.
unsafe impl Send for WorkQueue {}
// SAFETY: as above.
unsafe impl Sync for WorkQueue {}

/// Bits of a ring entry that are slot and generation.
const RING_ID: u64 = (1 << 44) - 1;

impl WorkQueue {
    pub(crate) fn new(
        index: Arc<QueueIndex>,
        kind: Kind,
        depth: u32,
        max_sge: u32,
        health: Arc<Health>,
    ) -> Arc<WorkQueue> {
        let max_sge = max_sge.max(1);
        let cells = depth as usize * max_sge as usize;
        let ring = if matches!(kind, Kind::Send(_)) { depth.next_power_of_two() as usize } else { 0 };
        Arc::new(WorkQueue {
            slots: SlotTable::new(depth),
            held: (0..cells).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
            max_sge,
            base: WrId::base(index.index),
            index,
            kind,
            post: Mutex::new(PostState {
                free: FreeList::new(),
                seq: 0,
                unsignaled: 0,
                reserved: false,
                sges: vec![ibv_sge::default(); max_sge as usize],
            }),
            ring: (0..ring).map(|_| AtomicU64::new(0)).collect(),
            ring_tail: AtomicU64::new(0),
            ring_head: AtomicU64::new(0),
            health,
            waiters: Mutex::default(),
        })
    }

    pub(crate) fn index(&self) -> u32 {
        self.index.index
    }

    pub(crate) fn queue_index(&self) -> &Arc<QueueIndex> {
        &self.index
    }

    /// The most work requests in flight.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.slots.depth()
    }

    /// The longest scatter/gather list.
    #[must_use]
    pub fn max_sge(&self) -> u32 {
        self.max_sge
    }

    /// Whether completions of this queue may come on `cq`.
    #[inline]
    pub(crate) fn completes_on(&self, cq: &CqInner) -> bool {
        match &self.kind {
            Kind::Send(own) | Kind::Recv(own) => std::ptr::eq(&raw const **own, cq),
            Kind::Shared => true,
        }
    }

    #[inline]
    pub(crate) fn wr_id(&self, slot: u32, generation: u32) -> u64 {
        WrId::new(self.base, slot, generation).0
    }

    #[inline]
    pub(crate) fn lock_post(&self) -> MutexGuard<'_, PostState> {
        self.post.lock()
    }

    #[inline]
    fn cell(&self, slot: u32, i: u32) -> &UnsafeCell<MaybeUninit<Held>> {
        &self.held[slot as usize * self.max_sge as usize + i as usize]
    }

    /// Keeps entry `i` of a slot's list.
    ///
    /// # Safety
    ///
    /// The caller is the poster, acquired the slot and has not published it; `i < max_sge`.
    #[inline]
    pub(crate) unsafe fn hold(&self, slot: u32, i: u32, held: Held) {
        self.cell(slot, i).with_mut(|cell| {
            // SAFETY: the caller owns the slot and with it the cell (S-3).
            unsafe { (*cell).write(held) };
        });
    }

    /// Takes entry `i` of a slot's list.
    ///
    /// # Safety
    ///
    /// The caller owns the slot's payload, and takes each of its `held` entries once.
    #[inline]
    pub(crate) unsafe fn take_held(&self, slot: u32, i: u32) -> Held {
        self.cell(slot, i).with_mut(|cell| {
            // SAFETY: written before the slot was published, taken once (S-3).
            unsafe { (*cell).assume_init_read() }
        })
    }

    /// Notes that the send in `slot` is unsignalled.
    pub(crate) fn push_unsignaled(&self, slot: u32, generation: u32, seq: u32) {
        let tail = self.ring_tail.load(Ordering::Relaxed);
        let entry = WrId::new(0, slot, generation).0 | u64::from(seq) << 44;
        let mask = self.ring.len() - 1;
        self.ring[usize::try_from(tail).unwrap_or(0) & mask].store(entry, Ordering::Relaxed);
        // Release: the entry is written before the poller sees it counted.
        self.ring_tail.store(tail + 1, Ordering::Release);
    }

    /// Takes the last `push_unsignaled` back: its post failed.
    pub(crate) fn pop_unsignaled(&self) {
        let tail = self.ring_tail.load(Ordering::Relaxed);
        self.ring_tail.store(tail - 1, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn has_unsignaled(&self) -> bool {
        self.ring_head.load(Ordering::Relaxed) != self.ring_tail.load(Ordering::Acquire)
    }

    /// Completes the unsignalled sends posted before position `seq`: a completion of that position came,
    /// and a send queue completes in order (IBTA vol. 1, 10.8.3.3). The caller holds the lock of the
    /// send queue's completion queue.
    #[cold]
    pub(crate) fn retire(&self, seq: u32, sink: &mut Sink<'_>) {
        let tail = self.ring_tail.load(Ordering::Acquire);
        let mut head = self.ring_head.load(Ordering::Relaxed);
        while head != tail {
            let entry =
                self.ring[usize::try_from(head).unwrap_or(0) & (self.ring.len() - 1)].load(Ordering::Relaxed);
            let ahead = (u64::from(seq) << 44).wrapping_sub(entry & !RING_ID) >> 44;
            // Positions are compared modulo 2^20; queues are at most 2^18 deep.
            if ahead == 0 || ahead >= 1 << 19 {
                break;
            }
            head += 1;
            let id = WrId(entry & RING_ID);
            // Stray: it came by itself meanwhile, with an error.
            self.complete(id, &CQE_OF_UNSIGNALED, false, sink);
        }
        self.ring_head.store(head, Ordering::Relaxed);
    }

    /// Dispatches one completion to its slot; false when there is none in flight. The caller holds
    /// the lock of a completion queue that the slot can complete on.
    #[inline]
    pub(crate) fn complete(&self, id: WrId, wc: &ibv_wc, device: bool, sink: &mut Sink<'_>) -> bool {
        let slot = id.slot();
        let exclusive = !matches!(self.kind, Kind::Shared);
        match self.slots.claim(slot, id.generation(), exclusive) {
            Claim::Polled => {
                // SAFETY: claimed.
                let payload = unsafe { self.slots.take_payload(slot) };
                if self.has_unsignaled() && device {
                    self.retire(payload.seq, sink);
                }
                sink.deliver(self, slot, payload, wc);
                // SAFETY: claimed, and `deliver` took the payload's entries.
                let wanted = unsafe { self.slots.release(slot) };
                if wanted {
                    self.take_waiters(sink.deferred);
                }
                true
            }
            Claim::Stray => false,
            claim => {
                self.complete_owned(slot, claim, wc, device, sink);
                true
            }
        }
    }

    /// The part of `complete` for slots that an `Operation` owns or owned.
    fn complete_owned(&self, slot: u32, claim: Claim, wc: &ibv_wc, device: bool, sink: &mut Sink<'_>) {
        if device && self.has_unsignaled() {
            // SAFETY: claimed.
            let seq = unsafe { self.slots.with_payload(slot, |payload| payload.seq) };
            self.retire(seq, sink);
        }
        sink.credits += 1;
        if let Claim::Owned { waiting } = claim {
            // SAFETY: claimed with this answer, finished once.
            match unsafe { self.slots.finish(slot, waiting, *wc) } {
                Ok(waker) => {
                    sink.deferred.wake(waker);
                    return;
                }
                Err(_abandoned) => {}
            }
        }
        self.discard(slot, sink.deferred);
    }

    /// Frees a claimed slot nobody waits for; what it held is dropped later, outside of locks.
    fn discard(&self, slot: u32, deferred: &mut Deferred) {
        // SAFETY: claimed by the caller, who gives it up.
        let payload = unsafe { self.slots.take_payload(slot) };
        for i in 0..u32::from(payload.held) {
            // SAFETY: the payload says how many there are, each is taken once.
            deferred.push(Later::Drop(unsafe { self.take_held(slot, i) }));
        }
        if let Some(keep) = payload.keep {
            deferred.push(Later::Release(keep));
        }
        // SAFETY: claimed, and emptied.
        if unsafe { self.slots.release(slot) } {
            self.take_waiters(deferred);
        }
    }

    #[cold]
    pub(crate) fn wake_waiters(&self) {
        let mut deferred = Deferred::default();
        self.take_waiters(&mut deferred);
        deferred.run();
    }

    #[cold]
    fn take_waiters(&self, deferred: &mut Deferred) {
        deferred.wake(self.waiters.lock().drain(..));
    }

    /// Ends a run of unsignalled sends; gives the credits that were set aside for it.
    pub(crate) fn end_run(&self) -> u32 {
        let mut post = self.lock_post();
        post.unsignaled = 0;
        u32::from(std::mem::take(&mut post.reserved))
    }

    /// Completes everything in flight as flushed: the verb that destroyed or reset the queue
    /// succeeded. Gives the number of slots. The caller holds the lock of the queue's completion queue.
    pub(crate) fn reclaim(&self, wc: &ibv_wc, sink: &mut Sink<'_>) -> u32 {
        let mut count = 0;
        for slot in 0..self.slots.depth() {
            match self.slots.claim_any(slot) {
                Claim::Stray => continue,
                Claim::Polled => {
                    // SAFETY: claimed.
                    let payload = unsafe { self.slots.take_payload(slot) };
                    sink.deliver(self, slot, payload, wc);
                    // SAFETY: claimed, and `deliver` took the payload's entries.
                    if unsafe { self.slots.release(slot) } {
                        self.take_waiters(sink.deferred);
                    }
                }
                claim => self.complete_owned(slot, claim, wc, false, sink),
            }
            count += 1;
        }
        self.ring_head.store(self.ring_tail.load(Ordering::Acquire), Ordering::Relaxed);
        count
    }

    /// Frees everything in flight: the queue was destroyed, no poller can find it any more.
    pub(crate) fn discard_all(&self) {
        let mut deferred = Deferred::default();
        let mut parked = std::collections::VecDeque::new();
        let mut sink = Sink::new(&mut parked, &mut deferred);
        self.reclaim(&flushed(), &mut sink);
        deferred.run();
    }

    /// Takes back a slot whose post failed: what it held, and its payload. `None` if a completion
    /// for it came all the same. The caller is the poster.
    #[cold]
    pub(crate) fn retract(&self, slot: u32, owned: bool) -> Option<(Payload, SmallVec<[Held; 1]>)> {
        let guard = match &self.kind {
            Kind::Send(cq) | Kind::Recv(cq) => Some(cq.lock_state()),
            Kind::Shared => None,
        };
        let claim = self.slots.claim_any(slot);
        drop(guard);
        if claim == Claim::Stray {
            if !owned {
                return None;
            }
            // No `Operation` was made of it, so it is COMPLETED, and ours.
            // SAFETY: the owner is whoever would have made the operation: this poster.
            let _ = unsafe { self.slots.take_result(slot) };
        }
        // SAFETY: claimed, or completed and owned.
        let payload = unsafe { self.slots.take_payload(slot) };
        // SAFETY: as above, each entry once.
        let held = (0..u32::from(payload.held)).map(|i| unsafe { self.take_held(slot, i) }).collect();
        // SAFETY: emptied.
        let _ = unsafe { self.slots.release(slot) };
        Some((payload, held))
    }

    /// Work requests in flight: posted, and their completion not yet polled.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        let slots = 0..self.slots.depth();
        u32::try_from(slots.filter(|&slot| self.slots.is_in_flight(slot)).count()).unwrap_or(u32::MAX)
    }

    /// Ready when a work request can probably be posted: a slot is free, and a credit of the
    /// completion queue. Wakes everyone who waits when that changes; whoever comes first posts.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let post = self.lock_post();
        {
            let mut waiters = self.waiters.lock();
            if self.slots.want(&post.free) {
                if !waiters.iter().any(|w| w.will_wake(cx.waker())) {
                    waiters.push(cx.waker().clone());
                }
                return Poll::Pending;
            }
        }
        match &self.kind {
            Kind::Send(cq) | Kind::Recv(cq) => cq.poll_credit(cx),
            Kind::Shared => Poll::Ready(()),
        }
    }
}

/// What is in flight completes with when its queue is reset or destroyed.
pub(crate) fn flushed() -> ibv_wc {
    let mut wc = CQE_OF_UNSIGNALED;
    wc.status = ibv_wc_status::IBV_WC_WR_FLUSH_ERR;
    wc
}

/// What an unsignalled send completes with: success, said by a later completion.
const CQE_OF_UNSIGNALED: ibv_wc = {
    // SAFETY: integers and a union of integers: all zeroes are a value, and status 0 is success.
    unsafe { std::mem::zeroed() }
};

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // Nobody refers to the queue any more, so what is still in flight was reclaimed already, or
        // is leaked with it (a destroy that failed keeps an Arc for ever). Completed slots belong to
        // their `Operation`, which holds an Arc or a borrow.
        debug_assert_eq!(self.in_flight(), 0);
    }
}

impl std::fmt::Debug for WorkQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkQueue")
            .field("index", &self.index())
            .field("depth", &self.depth())
            .field("max_sge", &self.max_sge)
            .finish_non_exhaustive()
    }
}
