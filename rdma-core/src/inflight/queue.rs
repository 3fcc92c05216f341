//! A work queue as the library keeps it: what is posted, what it keeps alive, who waits.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::task::{Context, Poll, Waker};

use parking_lot::{Mutex, MutexGuard};
use verbs_sys::{ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status};

use super::health::Health;
use super::held::{Held, HeldList};
use super::payload::{Meta, SlotPayload, Taken};
use super::scratch::Scratch;
use super::slot::{Claim, Cursor, FreeSlot, Posted, SlotTable, WrId};
use super::table::QueueIndex;
use crate::cq::{CqInner, Later, Opcode, Parked, Sink, WorkCompletion};
use crate::mr::Buffer;
use crate::qp::Link;
use crate::sync::UnsafeCell;

/// What only the poster touches.
pub(crate) struct PostState {
    /// The queue's whole depth is reserved on its completion queue: the poster's copy of `WorkQueue::unpaid`.
    is_prepaid: bool,
    /// Where the next slot is looked for. Open while nothing but a slot is needed to post: it has a credit, and no unsignalled
    /// sends are before it.
    pub(crate) cursor: Cursor<SlotPayload>,
    /// What the posting of a plain request, a SEND or a receive, as simple adds to a slot's word.
    pub(crate) plain_step: u64,
    /// The next work request's position.
    pub(crate) seq: u32,
    /// Unsignalled sends since the last signalled one.
    unsignaled: u32,
    /// Of those in the ring, the last that the poller was not told of yet.
    untold: u32,
    /// A credit is set aside for the signalled send that ends the run.
    pub(crate) reserved: bool,
    /// Scratch for chains and scatter/gather lists.
    pub(crate) sges: Vec<ibv_sge>,
    /// Of the chain that is being built the first `count`; those behind are of longer ones before.
    pub(crate) chain: Vec<ibv_send_wr>,
    pub(crate) count: usize,
    pub(crate) recv_chain: Vec<ibv_recv_wr>,
    pub(crate) links: Vec<Link>,
    pub(crate) scratch: Scratch,
}

impl PostState {
    /// Unsignalled sends since the last signalled one.
    #[inline]
    pub(crate) fn unsignaled(&self) -> u32 {
        self.unsignaled
    }

    #[inline]
    pub(crate) fn set_unsignaled(&mut self, unsignaled: u32) {
        let was = std::mem::replace(&mut self.unsignaled, unsignaled);
        if (was == 0) != (unsignaled == 0) {
            self.cursor.set_open(self.is_prepaid && unsignaled == 0);
        }
    }

    fn set_prepaid(&mut self, is_prepaid: bool) {
        self.is_prepaid = is_prepaid;
        self.cursor.set_open(is_prepaid && self.unsignaled == 0);
    }

    /// Fills a slot with one buffer, and publishes the slot: `step` is what that adds to its word if it is not owned, then of
    /// [`Posted::Simple`] with the opcode.
    ///
    /// # Safety
    ///
    /// The caller is the poster of the queue that the slot is of, and acquired it.
    #[inline(always)]
    pub(crate) unsafe fn fill_buffer<const OWNED: bool>(
        &mut self,
        free: &FreeSlot<'_, SlotPayload>,
        id: u64,
        opcode: Opcode,
        step: u64,
        buffer: Buffer,
    ) -> WrId {
        let payload = free.payload();
        if !OWNED {
            // SAFETY: the poster owns the payload until `publish`; what was there was taken out before the slot was
            // released.
            unsafe { SlotPayload::put_simple(payload, id, buffer) };
            return free.publish(step);
        }
        // SAFETY: as above.
        let first = unsafe { SlotPayload::first(payload) };
        // SAFETY: as above.
        unsafe { first.write(Held::Buffer(buffer)) };
        // SAFETY: a place inside the payload.
        let meta = unsafe { &raw mut (*payload).meta };
        // SAFETY: as above.
        unsafe { meta.write(Meta { id, keep: None, seq: self.seq, held: 1, opcode }) };
        free.publish(const { Posted::Owned.step() })
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

/// In `WorkQueue::special`: someone waits for a slot.
const WANTED: u32 = 1;
/// In `WorkQueue::special`: one unsignalled send in flight.
const UNSIGNALED: u32 = 2;

/// A send, receive or shared receive queue: its slots and what they hold.
pub struct WorkQueue {
    pub(crate) slots: SlotTable<SlotPayload, ibv_wc>,
    /// The completion queue, as an address to compare; null for a shared queue.
    owner: *const CqInner,
    /// 0 while the queue's whole depth is reserved on its completion queue: then a slot is as good as a credit. Else 1,
    /// the credits that a work request holds. Changed with `post` and the completion queue locked.
    unpaid: AtomicU32,
    /// It keeps its places on its completion queue.
    is_kept: AtomicBool,
    /// What a completion has to see to besides its slot: 0 in the common case. `WANTED`, and the number of
    /// unsignalled sends in flight times `UNSIGNALED`.
    special: AtomicU32,
    /// Entries after the first of longer scatter/gather lists, `max_sge - 1` for each slot.
    more: Box<[UnsafeCell<MaybeUninit<Held>>]>,
    max_sge: u32,
    index: Arc<QueueIndex>,
    pub(crate) kind: Kind,
    post: Mutex<PostState>,
    /// Unsignalled sends in the order of posting: written by the poster at `tail`, read by the
    /// poller at `head`. An entry is a `wr_id` with 20 bits of the position in place of the queue.
    ring: Box<[AtomicU64]>,
    ring_tail: AtomicU32,
    ring_head: AtomicU32,
    pub(crate) health: Arc<Health>,
    waiters: Mutex<Waiters>,
}

/// Who waits for a slot.
#[derive(Default)]
struct Waiters {
    wakers: Vec<Waker>,
    /// The queue is in the table of its context.
    is_listed: bool,
}

// SAFETY: the pointers of the scratch requests and of the cursor are used only while the post lock is held.
unsafe impl Send for PostState {}

// SAFETY: `more` follows the state of its slot (S-3); `owner` is only compared; all else is Send and Sync.
unsafe impl Send for WorkQueue {}
// SAFETY: as above.
unsafe impl Sync for WorkQueue {}

impl WorkQueue {
    pub(crate) fn new(
        index: Arc<QueueIndex>,
        kind: Kind,
        depth: u32,
        max_sge: u32,
        health: Arc<Health>,
    ) -> Arc<WorkQueue> {
        let max_sge = max_sge.max(1);
        let cells = depth as usize * (max_sge as usize - 1);
        let ring = if matches!(kind, Kind::Send(_)) { depth.next_power_of_two() as usize } else { 0 };
        let simple = if matches!(kind, Kind::Send(_)) { Opcode::Send } else { Opcode::Recv };
        let owner = match &kind {
            Kind::Send(cq) | Kind::Recv(cq) => Arc::as_ptr(cq),
            Kind::Shared => std::ptr::null(),
        };
        let slots = SlotTable::new(index.index, depth);
        let cursor = slots.cursor();
        let queue = Arc::new(WorkQueue {
            slots,
            owner,
            unpaid: AtomicU32::new(u32::from(!owner.is_null())),
            is_kept: AtomicBool::new(false),
            special: AtomicU32::new(0),
            more: (0..cells).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
            max_sge,
            index,
            kind,
            post: Mutex::new(PostState {
                is_prepaid: false,
                cursor,
                plain_step: Posted::Simple(simple as u8).step(),
                seq: 0,
                unsignaled: 0,
                untold: 0,
                reserved: false,
                sges: Vec::new(),
                chain: Vec::new(),
                count: 0,
                recv_chain: Vec::new(),
                links: Vec::new(),
                scratch: Scratch::new(),
            }),
            ring: (0..ring).map(|_| AtomicU64::new(0)).collect(),
            ring_tail: AtomicU32::new(0),
            ring_head: AtomicU32::new(0),
            health,
            waiters: Mutex::default(),
        });
        // From where the slots stay.
        queue.lock_post().cursor = queue.slots.cursor();
        queue
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

    #[inline]
    pub(crate) fn lock_post(&self) -> MutexGuard<'_, PostState> {
        self.post.lock()
    }

    /// Whether completions come in the order of posting.
    #[inline]
    fn is_fifo(&self) -> bool {
        !self.owner.is_null()
    }

    /// A free slot.
    #[inline]
    pub(crate) fn acquire(&self, post: &mut PostState) -> Option<FreeSlot<'_, SlotPayload>> {
        // SAFETY: the cursor is of our table, the caller the poster.
        if let Some(free) = unsafe { post.cursor.next_of_closed() } {
            return Some(free);
        }
        self.slots.search(&mut post.cursor, self.is_fifo())
    }

    /// A free slot, and a credit for it.
    #[inline]
    pub(crate) fn acquire_paid(&self, post: &mut PostState) -> Option<FreeSlot<'_, SlotPayload>> {
        if let Some(free) = self.acquire_plain(post) {
            return Some(free);
        }
        self.acquire_slow(post)
    }

    /// As `acquire_paid` where nothing but a slot is needed and the next one is free.
    #[inline(always)]
    pub(crate) fn acquire_plain(&self, post: &mut PostState) -> Option<FreeSlot<'_, SlotPayload>> {
        // SAFETY: the cursor is of our table, the caller the poster.
        unsafe { post.cursor.next() }
    }

    #[inline(never)]
    fn acquire_slow(&self, post: &mut PostState) -> Option<FreeSlot<'_, SlotPayload>> {
        let cursor = post.cursor;
        let free = self.acquire(post)?;
        if !self.take_credits(1) {
            post.cursor = cursor;
            return None;
        }
        Some(free)
    }

    /// Credits that a work request holds: 0 or 1.
    #[inline(always)]
    pub(crate) fn unpaid(&self) -> u32 {
        self.unpaid.load(Ordering::Relaxed)
    }

    fn cq(&self) -> Option<&CqInner> {
        match &self.kind {
            Kind::Send(cq) | Kind::Recv(cq) => Some(cq),
            Kind::Shared => None,
        }
    }

    /// Takes `n` credits of the completion queue, where that counts them. The caller is the poster.
    #[inline]
    pub(crate) fn take_credits(&self, n: u32) -> bool {
        self.unpaid() == 0 || self.cq().is_none_or(|cq| cq.take_credits(n))
    }

    /// Gives them back.
    pub(crate) fn return_credits(&self, n: u32) {
        if let Some(cq) = self.cq()
            && self.unpaid() != 0
        {
            cq.return_credits(n);
        }
    }

    /// Reserves the whole depth on the completion queue, so that posts and polls need not count; if there is no room for
    /// that, all its queues count. The queue is new.
    pub(crate) fn prepay(self: &Arc<WorkQueue>) {
        let Some(cq) = self.cq() else { return };
        if !cq.prepay(self) {
            cq.count_all();
        }
    }

    /// The whole depth was reserved. The caller holds the lock of the completion queue; the queue is new.
    pub(crate) fn set_prepaid(&self, post: &mut PostState) {
        self.unpaid.store(0, Ordering::Relaxed);
        post.set_prepaid(true);
    }

    /// It keeps its reservation also when others come to count. The caller holds the lock of the completion queue; the queue is new.
    pub(crate) fn set_kept(&self) {
        self.is_kept.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.is_kept.load(Ordering::Relaxed)
    }

    /// Credits that were reserved and are in no use: the queue counts from now on. The caller holds the lock of the
    /// completion queue too.
    pub(crate) fn unprepay(&self, post: &mut PostState, in_flight: u32) -> u32 {
        post.set_prepaid(false);
        if self.unpaid.swap(1, Ordering::Relaxed) != 0 {
            return 0;
        }
        // A credit set aside has no slot yet; it may be one more than was reserved, until there is a slot for it.
        self.depth().wrapping_sub(in_flight + u32::from(post.reserved))
    }

    /// Of the reserved credits, those in no use.
    pub(crate) fn idle_credits(&self) -> u32 {
        let post = self.lock_post();
        if self.unpaid() != 0 {
            return 0;
        }
        self.depth().saturating_sub(self.in_flight() + u32::from(post.reserved))
    }

    #[inline]
    fn cell(&self, slot: u32, i: u32) -> &UnsafeCell<MaybeUninit<Held>> {
        &self.more[slot as usize * (self.max_sge as usize - 1) + i as usize - 1]
    }

    /// Keeps entry `i`, 1 or more, of a slot's list.
    ///
    /// # Safety
    ///
    /// The caller is the poster, acquired the slot and has not published it; `0 < i < max_sge`.
    pub(crate) unsafe fn hold_more(&self, slot: u32, i: u32, held: Held) {
        self.cell(slot, i).with_mut(|cell| {
            // SAFETY: the caller owns the slot and with it the cell (S-3).
            unsafe { (*cell).write(held) };
        });
    }

    /// Takes the entries after the first.
    ///
    /// # Safety
    ///
    /// The caller owns the slot's payload, which has `held` entries, and takes them once.
    pub(crate) unsafe fn take_more(&self, slot: u32, held: u16) -> impl Iterator<Item = Held> {
        (1..u32::from(held)).map(move |i| {
            self.cell(slot, i).with_mut(|cell| {
                // SAFETY: written before the slot was published, taken once (S-3).
                unsafe { cell.cast::<Held>().read() }
            })
        })
    }

    /// Takes all that a slot holds.
    ///
    /// # Safety
    ///
    /// The caller owns the slot's payload, and gives it up. `simple` is the opcode of one that was posted so.
    #[inline]
    pub(crate) unsafe fn take(&self, slot: u32, simple: Option<u8>) -> Taken {
        // SAFETY: the caller owns it.
        let payload = unsafe { self.slots.payload(slot) };
        if let Some(opcode) = simple {
            // SAFETY: the caller's promise.
            let (id, buffer) = unsafe { SlotPayload::take_simple(payload) };
            let held = HeldList { first: Some(Held::Buffer(buffer)), rest: Vec::new() };
            return Taken { id, opcode: Opcode::of(opcode), held, keep: None };
        }
        // SAFETY: filled before the slot was published.
        let SlotPayload { first, meta } = unsafe { payload.read() };
        let mut held = HeldList::default();
        if meta.held > 0 {
            // SAFETY: `held` says that it was written.
            held.first = Some(unsafe { first.assume_init() });
        }
        if meta.held > 1 {
            // SAFETY: the caller's promise.
            held.rest = unsafe { self.take_rest(slot, meta.held) };
        }
        Taken { id: meta.id, opcode: meta.opcode, held, keep: meta.keep }
    }

    /// # Safety
    ///
    /// As for `take_more`.
    #[inline(never)]
    unsafe fn take_rest(&self, slot: u32, held: u16) -> Vec<Held> {
        // SAFETY: the caller's promise.
        unsafe { self.take_more(slot, held) }.collect()
    }

    /// Notes that the send is unsignalled. The caller is the poster; `tell_unsignaled` must follow before the verb.
    #[inline]
    pub(crate) fn push_unsignaled(&self, post: &mut PostState, id: WrId, seq: u32) {
        let tail = self.ring_tail.load(Ordering::Relaxed).wrapping_add(post.untold);
        let entry = id.with_queue(seq).0;
        self.ring[tail as usize & (self.ring.len() - 1)].store(entry, Ordering::Relaxed);
        post.untold += 1;
    }

    /// Tells the poller of the unsignalled sends that are about to be posted: once for all, as it takes an atomic addition.
    #[inline]
    pub(crate) fn tell_unsignaled(&self, post: &mut PostState) {
        let count = std::mem::take(&mut post.untold);
        if count > 0 {
            self.special.fetch_add(count * UNSIGNALED, Ordering::Relaxed);
            let tail = self.ring_tail.load(Ordering::Relaxed);
            // Release: the entries are written before the poller sees them counted.
            self.ring_tail.store(tail.wrapping_add(count), Ordering::Release);
        }
    }

    /// Takes the last `push_unsignaled` back: its post failed, or it is signalled after all. The caller is the poster.
    pub(crate) fn pop_unsignaled(&self, post: &mut PostState) {
        if post.untold > 0 {
            post.untold -= 1;
            return;
        }
        // A completion that nothing was posted for may have retired it.
        let guard = self.cq().map(CqInner::lock_state);
        let tail = self.ring_tail.load(Ordering::Relaxed);
        if self.ring_head.load(Ordering::Relaxed) != tail {
            self.special.fetch_sub(UNSIGNALED, Ordering::Relaxed);
            self.ring_tail.store(tail.wrapping_sub(1), Ordering::Relaxed);
        }
        drop(guard);
    }

    /// Completes the unsignalled sends posted before position `seq`: a completion of that position came,
    /// and a send queue completes in order (IBTA vol. 1, 10.8.3.3). The caller holds the lock of the
    /// send queue's completion queue. `after_release` must follow.
    fn retire(&self, seq: u32, sink: &mut impl Sink) {
        let tail = self.ring_tail.load(Ordering::Acquire);
        let first = self.ring_head.load(Ordering::Relaxed);
        let (slots, unpaid) = (self.slots.slots(), self.unpaid());
        let mask = self.ring.len() - 1;
        let mut head = first;
        while head != tail {
            let entry = WrId(self.ring[head as usize & mask].load(Ordering::Relaxed));
            // Positions are compared modulo 2^20; queues are at most 2^18 deep.
            let ahead = (seq as usize).wrapping_sub(entry.queue()) % (1 << 20);
            if ahead == 0 || ahead >= 1 << 19 {
                break;
            }
            head = head.wrapping_add(1);
            let id = entry.with_queue(self.index());
            // SAFETY: of this table; and the caller holds the lock under which all completions of this queue come.
            if let Some(slot) = unsafe { slots.claim_placed(id) } {
                // SAFETY: claimed as placed, and given up.
                let (number, buffer) = unsafe { SlotPayload::take_simple(slot.payload()) };
                slot.release();
                sink.count(unpaid);
                let held = HeldList { first: Some(Held::Buffer(buffer)), rest: Vec::new() };
                let opcode = Opcode::of(id.opcode());
                let completion = WorkCompletion::success(SUCCESS, opcode);
                sink.deliver(completion, Taken { id: number, opcode, held, keep: None });
                continue;
            }
            // Stray: it came by itself meanwhile, with an error.
            let claim = self.slots.claim(id, true);
            self.complete_claimed(entry.slot(), claim, &SUCCESS, sink);
        }
        self.special.fetch_sub(head.wrapping_sub(first) * UNSIGNALED, Ordering::Relaxed);
        self.ring_head.store(head, Ordering::Relaxed);
    }

    /// Dispatches one completion to its slot; false when there is none in flight. The caller holds
    /// the lock of `cq`.
    pub(crate) fn complete(&self, cq: *const CqInner, id: WrId, wc: &ibv_wc, sink: &mut impl Sink) -> bool {
        // Completions of a queue with one completion queue come under that one's lock, or are strays.
        let exclusive = std::ptr::eq(self.owner, cq);
        if !exclusive && !self.owner.is_null() {
            return false;
        }
        let slot = id.slot();
        if exclusive
            && wc.status == ibv_wc_status::IBV_WC_SUCCESS
            && self.special.load(Ordering::Relaxed) < UNSIGNALED
            // SAFETY: the caller holds the lock under which all completions of this queue come.
            && unsafe { self.slots.complete_submitted(id, *wc) }.is_ok()
        {
            sink.count(self.unpaid());
            return true;
        }
        let claim = self.slots.claim(id, exclusive);
        if claim == Claim::Stray {
            return false;
        }
        if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
            self.health.note(wc);
        }
        // A simple send has no position: one that does comes between it and unsignalled ones before it.
        let retires =
            !matches!(claim, Claim::Simple(_)) && self.special.load(Ordering::Relaxed) >= UNSIGNALED;
        if retires {
            // SAFETY: claimed.
            let payload = unsafe { self.slots.payload(slot) };
            // SAFETY: filled before it was published, and not as simple.
            let seq = unsafe { SlotPayload::seq(payload) };
            self.retire(seq, sink);
        }
        if self.complete_claimed(slot, claim, wc, sink) || retires {
            self.after_release(sink);
        }
        true
    }

    /// Completes a claimed slot, of whatever kind. When it gives true, `after_release` must follow.
    fn complete_claimed(&self, slot: u32, claim: Claim, wc: &ibv_wc, sink: &mut impl Sink) -> bool {
        match claim {
            Claim::Stray => return false,
            Claim::Polled | Claim::Simple(_) | Claim::Placed(_) => {
                // SAFETY: claimed, and given up.
                let taken = unsafe { self.take(slot, claim.simple()) };
                sink.count(self.unpaid());
                sink.deliver(WorkCompletion::new(*wc, taken.opcode, &self.health), taken);
                // SAFETY: claimed, and emptied.
                unsafe { self.slots.release(slot) };
            }
            Claim::Owned { waiting } => {
                sink.count(self.unpaid());
                // SAFETY: claimed with this answer, finished once.
                match unsafe { self.slots.finish(slot, waiting, *wc) } {
                    Ok(None) => {}
                    Ok(Some(waker)) => sink.defer(Later::Wake(waker)),
                    Err(_abandoned) => {
                        self.discard(slot, sink);
                        return true;
                    }
                }
                return false;
            }
            Claim::Ignored => {
                sink.count(self.unpaid());
                self.discard(slot, sink);
            }
        }
        true
    }

    /// Frees a claimed slot nobody waits for; what it held is dropped later, outside of locks. `after_release` must follow.
    fn discard(&self, slot: u32, sink: &mut impl Sink) {
        // SAFETY: claimed by the caller, who gives it up.
        let taken = unsafe { self.take(slot, None) };
        for held in taken.held {
            sink.defer(Later::Drop(held));
        }
        if let Some(keep) = taken.keep {
            sink.defer(Later::Release(keep));
        }
        // SAFETY: claimed, and emptied.
        unsafe { self.slots.release(slot) };
    }

    /// Wakes who waits for a slot, after one was released.
    fn after_release(&self, sink: &mut impl Sink) {
        // Orders the release before the look at WANTED; its counterpart is in `poll_ready`.
        fence(Ordering::SeqCst);
        if self.special.load(Ordering::Relaxed) & WANTED != 0 {
            for waker in self.take_waiters() {
                sink.defer(Later::Wake(waker));
            }
        }
    }

    /// As `after_release`, for the owner of an operation, outside of locks.
    #[inline]
    pub(crate) fn wake_after_release(&self) {
        fence(Ordering::SeqCst);
        if self.special.load(Ordering::Relaxed) & WANTED != 0 {
            for waker in self.take_waiters() {
                waker.wake();
            }
        }
    }

    #[cold]
    fn take_waiters(&self) -> Vec<Waker> {
        let mut waiters = self.waiters.lock();
        self.special.fetch_and(!WANTED, Ordering::Relaxed);
        if waiters.is_listed {
            self.index.lend_to(self.owner);
        }
        std::mem::take(&mut waiters.wakers)
    }

    /// The queue is in the table of its context from now on, or no longer: then no poller finds it, nor its slots.
    pub(super) fn set_listed(&self, is_listed: bool) {
        let mut waiters = self.waiters.lock();
        waiters.is_listed = is_listed;
        self.index.lend_to(if is_listed { self.owner } else { std::ptr::null() });
    }

    /// Completes everything in flight as flushed: the verb that destroyed or reset the queue
    /// succeeded. Gives the number of slots. The caller holds the lock of the queue's completion queue.
    pub(crate) fn reclaim(&self, sink: &mut impl Sink) -> u32 {
        let wc = flushed();
        let mut count = 0;
        for slot in 0..self.slots.depth() {
            let claim = self.slots.claim_any(slot);
            count += u32::from(claim != Claim::Stray);
            self.complete_claimed(slot, claim, &wc, sink);
        }
        self.after_release(sink);
        let tail = self.ring_tail.load(Ordering::Acquire);
        let left = tail.wrapping_sub(self.ring_head.load(Ordering::Relaxed));
        self.ring_head.store(tail, Ordering::Relaxed);
        self.special.fetch_sub(left * UNSIGNALED, Ordering::Relaxed);
        count
    }

    /// Frees everything in flight: the queue was destroyed, no poller can find it any more.
    pub(crate) fn discard_all(&self) {
        let mut parked = VecDeque::<Parked>::new();
        let mut deferred = Vec::new();
        self.reclaim(&mut crate::cq::Parking::new(&mut parked, &mut deferred));
        crate::cq::run(deferred);
    }

    /// Takes back a slot whose post failed: what it held, if a completion that came all the same did not take it, and whether one came,
    /// which has returned a credit. The caller is the poster.
    #[cold]
    pub(crate) fn retract(&self, slot: u32, owned: bool) -> (Option<Taken>, bool) {
        let guard = self.cq().map(CqInner::lock_state);
        let claim = self.slots.claim_any(slot);
        drop(guard);
        let is_completed = claim == Claim::Stray;
        if is_completed {
            if !owned {
                return (None, true);
            }
            // No `Operation` was made of it, so it is COMPLETED, and ours.
            // SAFETY: the owner is whoever would have made the operation: this poster.
            let _ = unsafe { self.slots.take_result(slot) };
        }
        // SAFETY: claimed, or completed and owned.
        let taken = unsafe { self.take(slot, claim.simple()) };
        // SAFETY: emptied.
        unsafe { self.slots.release(slot) };
        (Some(taken), is_completed)
    }

    /// Work requests in flight: posted, and their completion not yet polled. Looks at every slot.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        let slots = 0..self.slots.depth();
        u32::try_from(slots.filter(|&slot| self.slots.is_in_flight(slot)).count()).unwrap_or(u32::MAX)
    }

    /// Ready when a work request can probably be posted: a slot is free, and a credit of the
    /// completion queue. Otherwise everyone who waits is woken when that changes; whoever comes first posts.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let cq = self.cq();
        let post = self.lock_post();
        if !self.slots.has_free(&post.cursor, self.is_fifo()) {
            // A poller releases slots of this queue under the lock, so that it need not look for
            // waiters with a fence in between.
            let guard = cq.map(|cq| cq.lock_state());
            {
                let mut waiters = self.waiters.lock();
                if !waiters.wakers.iter().any(|w| w.will_wake(cx.waker())) {
                    waiters.wakers.push(cx.waker().clone());
                }
                self.special.fetch_or(WANTED, Ordering::Relaxed);
                if waiters.is_listed {
                    self.index.lend_to(std::ptr::null());
                }
            }
            drop(guard);
            // Orders the note before the second look; its counterpart is in `after_release`.
            fence(Ordering::SeqCst);
            if !self.slots.has_free(&post.cursor, self.is_fifo()) {
                return Poll::Pending;
            }
        }
        match cq {
            Some(cq) if self.unpaid() != 0 => cq.poll_credit(cx),
            _ => Poll::Ready(()),
        }
    }
}

/// What is in flight completes with when its queue is reset or destroyed.
fn flushed() -> ibv_wc {
    let mut wc = SUCCESS;
    wc.status = ibv_wc_status::IBV_WC_WR_FLUSH_ERR;
    wc
}

/// What an unsignalled send completes with: success, said by a later completion.
const SUCCESS: ibv_wc = {
    // SAFETY: integers and a union of integers: all zeroes are a value, and status 0 is success.
    unsafe { std::mem::zeroed() }
};

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // Nobody refers to the queue any more, so what was in flight was reclaimed already, or is
        // leaked with it (a destroy that failed keeps an Arc for ever). Completed slots belong to
        // their `Operation`, which holds an Arc or a borrow, or is forgotten: then they leak.
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
