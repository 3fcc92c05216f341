//! The slots of one work queue: who owns which part of a slot in which state.
//!
//! ```text
//!            acquire, fill (poster)    publish                claim (poller)
//!   FREE ------------------------------------> POLLED ------------------------> release
//!                                        \
//!                                         `---> SUBMITTED <-> WAITING             (owned by an Operation)
//!                                                  |   \        |
//!                                     ignore (drop)|    \       | claim (poller)
//!                                                  v     `------v
//!                                               IGNORED     COMPLETING --> COMPLETED --> take --> release
//!                                                               `--> ABANDONED (dropped meanwhile)
//! ```
//!
//! SIMPLE is as POLLED, of a slot that holds one buffer and whose completion has nothing else to see to; it tells the opcode as well. So does
//! PLACED, which holds its position in the order of posting besides: of a send that a later one completes, or that completes earlier ones.
//!
//! * The *poster* is whoever holds the queue's post lock; it owns a slot from `acquire` to `publish`.
//! * The *poller* is whoever holds the lock of a completion queue the slot can complete on. It owns
//!   the payload and the result from a successful `claim` on.
//! * The *owner* is the one `Operation` made for the slot. It owns the waker cell while the state is
//!   SUBMITTED, and everything once it is COMPLETED.
//!
//! A slot's generation changes whenever it is posted, so a completion that comes twice, late, or
//! from nowhere finds a free slot or another generation, and claims nothing.

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use crate::sync::{AtomicU64, Ordering, UnsafeCell};

/// Bits of a state; as many as an offset within a slot has, so that a slot's index, shifted by them, is its offset in bytes.
const STATE_BITS: u32 = 6;
/// Bits of a slot's index.
pub(crate) const SLOT_BITS: u32 = 16;
/// Bits of a queue's index.
pub(crate) const QUEUE_BITS: u32 = 20;
const QUEUE_SHIFT: u32 = STATE_BITS + SLOT_BITS;
const GENERATION_SHIFT: u32 = QUEUE_SHIFT + QUEUE_BITS;
/// One generation on; what does not fit falls off the top.
const GENERATION: u64 = 1 << GENERATION_SHIFT;

const FREE: u64 = 0;
const POLLED: u64 = 1;
const SUBMITTED: u64 = 2;
const WAITING: u64 = 3;
const IGNORED: u64 = 4;
const COMPLETING: u64 = 5;
const COMPLETED: u64 = 6;
const CLAIMED: u64 = 7;
const ABANDONED: u64 = 8;
/// A bit that no other state has; the bits below it are the opcode.
const SIMPLE: u64 = 1 << 5;
const SIMPLE_LAST: u64 = STATE_MASK;
/// The same.
const PLACED: u64 = 1 << 4;
const PLACED_LAST: u64 = SIMPLE - 1;
const OPCODE_MASK: u8 = 7;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
/// The word of a slot that no work request ever gets: no queue has its index.
const UNUSED: u64 = u64::MAX;

/// A `wr_id`: generation (22 bits), queue (20), slot (16), and the state in which the slot was posted (6). A slot's word
/// is the same, with the state that it is in now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrId(pub(crate) u64);

impl WrId {
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "masked to 20 bits")]
    pub(crate) fn queue(self) -> usize {
        (self.0 >> QUEUE_SHIFT) as usize & ((1 << QUEUE_BITS) - 1)
    }

    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "masked to 16 bits")]
    pub(crate) fn slot(self) -> u32 {
        (self.0 >> STATE_BITS) as u32 & ((1 << SLOT_BITS) - 1)
    }

    /// The offset of the queue's entry in a table of entries of `1 << shift` bytes.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "masked to 20 bits and the shift")]
    pub(crate) fn queue_offset(self, shift: u32) -> usize {
        (self.0 >> (QUEUE_SHIFT - shift)) as usize & (((1 << QUEUE_BITS) - 1) << shift)
    }

    /// The opcode of what was posted as simple, or as placed.
    pub(crate) fn opcode(self) -> u8 {
        self.0.to_le_bytes()[0] & OPCODE_MASK
    }

    /// The same with another queue: 20 bits of any use.
    pub(crate) fn with_queue(self, queue: u32) -> WrId {
        let mask = ((1 << QUEUE_BITS) - 1) << QUEUE_SHIFT;
        WrId(self.0 & !mask | u64::from(queue) << QUEUE_SHIFT & mask)
    }
}

/// How a slot is posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Posted {
    /// For whoever polls: one buffer, and no unsignalled sends before it wait for it. With the opcode, of 3 bits.
    Simple(u8),
    /// The same, of an unsignalled send, or with such sends before it.
    Placed(u8),
    /// For whoever polls.
    Polled,
    /// For an `Operation`.
    Owned,
}

impl Posted {
    #[inline(always)]
    pub(crate) fn new(owned: bool) -> Posted {
        if owned { Posted::Owned } else { Posted::Polled }
    }

    /// What is added to the word of a free slot: the next generation, in this state.
    #[inline(always)]
    pub(crate) const fn step(self) -> u64 {
        let state = match self {
            Posted::Simple(opcode) => SIMPLE | opcode as u64,
            Posted::Placed(opcode) => PLACED | opcode as u64,
            Posted::Polled => POLLED,
            Posted::Owned => SUBMITTED,
        };
        GENERATION + state
    }
}

/// A cell's content, where it has one.
fn init<T>(cell: *mut MaybeUninit<T>) -> *mut T {
    cell.cast()
}

/// The part of a slot that every work request uses: one cache line for the payload of a work queue.
#[repr(C, align(64))]
pub(crate) struct Slot<P> {
    payload: UnsafeCell<MaybeUninit<P>>,
    /// See [`WrId`].
    word: AtomicU64,
}

/// The part of a slot that only operations use.
struct Cold<R> {
    waker: UnsafeCell<MaybeUninit<Waker>>,
    result: UnsafeCell<MaybeUninit<R>>,
}

/// A slot that the poster acquired.
pub(crate) struct FreeSlot<'a, P> {
    slot: &'a Slot<P>,
    word: u64,
}

impl<P> FreeSlot<'_, P> {
    #[inline(always)]
    pub(crate) fn index(&self) -> u32 {
        WrId(self.word).slot()
    }

    /// The payload, the poster's until `publish`.
    #[inline(always)]
    pub(crate) fn payload(&self) -> *mut P {
        self.slot.payload.with_mut(|cell| cell.cast())
    }

    /// Marks the filled slot as in flight; the answer names it. Must come before the verb that posts, whose
    /// completion may arrive before it returns. `step` is of [`Posted::step`].
    #[inline(always)]
    pub(crate) fn publish(&self, step: u64) -> WrId {
        let word = self.word.wrapping_add(step);
        // Release: the payload is written before anyone can claim it.
        self.slot.word.store(word, Ordering::Release);
        WrId(word)
    }
}

/// A slot claimed by `claim_simple` or `claim_placed`.
pub(crate) struct SimpleSlot<'a, P> {
    slot: &'a Slot<P>,
    /// The word of the free slot.
    free: u64,
}

impl<P> SimpleSlot<'_, P> {
    /// The payload, the caller's until `release`.
    #[inline(always)]
    pub(crate) fn payload(&self) -> *mut P {
        self.slot.payload.with_mut(|cell| cell.cast())
    }

    /// Gives the slot back; the caller has taken the payload.
    #[inline(always)]
    pub(crate) fn release(self) {
        // Release: what we did to the slot happens before the poster's use of it.
        self.slot.word.store(self.free, Ordering::Release);
    }
}

/// What a completion found at its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Posted for whoever polls; the caller takes the payload and releases the slot.
    Polled,
    /// The same, posted as simple, with this opcode.
    Simple(u8),
    /// The same, posted as placed.
    Placed(u8),
    /// An `Operation` waits for it; the caller calls `finish`.
    Owned {
        /// Its waker is registered.
        waiting: bool,
    },
    /// Its `Operation` was dropped; the caller takes the payload and releases the slot.
    Ignored,
    /// Nothing that is in flight: a stray, repeated or late completion.
    Stray,
}

impl Claim {
    /// The opcode of a slot posted as simple, or as placed.
    pub(crate) fn simple(self) -> Option<u8> {
        match self {
            Claim::Simple(opcode) | Claim::Placed(opcode) => Some(opcode),
            _ => None,
        }
    }
}

/// The slots of one work queue. `P` is what a work request keeps alive, `R` its result.
///
/// They are used in a ring, as the device uses its own, so that finding a free one costs a look at
/// the next.
pub(crate) struct SlotTable<P, R> {
    /// More than `depth`, which are used, and at least as many as a power of two.
    slots: Box<[Slot<P>]>,
    depth: u32,
    /// Made with the first operation: queues that are only polled do without.
    cold: OnceLock<Box<[Cold<R>]>>,
}

// SAFETY: cells are accessed by one party at a time, as the state says (S-3 in docs/SAFETY.md);
// what they hold is Send.
unsafe impl<P: Send, R: Send> Send for SlotTable<P, R> {}
// SAFETY: as above; the states pass from thread to thread through acquire and release.
unsafe impl<P: Send, R: Send> Sync for SlotTable<P, R> {}

/// Where the slots of a table are, for who looks many up: no bounds to check, as every number leads to a slot.
pub(crate) struct Slots<P> {
    pub(crate) first: *const Slot<P>,
    /// The bits of a `wr_id` that are the slot's.
    pub(crate) mask: u64,
}

impl<P> Slots<P> {
    /// The slot that a completion names, if it was posted as simple and is in flight. The caller gives it up to
    /// [`SimpleSlot::release`].
    ///
    /// # Safety
    ///
    /// The table lives for `'a`.
    #[inline(always)]
    pub(crate) unsafe fn claim_simple<'a>(&self, id: WrId) -> Option<SimpleSlot<'a, P>> {
        // SAFETY: the caller's promise.
        unsafe { self.claim_word(id.0 | SIMPLE) }
    }

    /// The same of one posted as placed.
    ///
    /// # Safety
    ///
    /// The table lives for `'a`.
    #[inline(always)]
    pub(crate) unsafe fn claim_placed<'a>(&self, id: WrId) -> Option<SimpleSlot<'a, P>> {
        // SAFETY: the caller's promise.
        unsafe { self.claim_word(id.0 | PLACED) }
    }

    /// # Safety
    ///
    /// The table lives for `'a`.
    #[inline(always)]
    unsafe fn claim_word<'a>(&self, word: u64) -> Option<SimpleSlot<'a, P>> {
        // An index of as many bits as the table's length, or that in bytes.
        let offset = usize::try_from(word & self.mask).unwrap_or(0);
        let slot = if size_of::<Slot<P>>() == 1 << STATE_BITS {
            self.first.wrapping_byte_add(offset)
        } else {
            self.first.wrapping_add(offset >> STATE_BITS)
        };
        // SAFETY: inside the table, so not null: the compiler does not see that.
        unsafe { std::hint::assert_unchecked(!slot.is_null()) };
        // SAFETY: inside the table, which the caller keeps alive.
        let slot = unsafe { &*slot };
        // Acquire: see `publish`.
        if slot.word.load(Ordering::Acquire) != word {
            return None;
        }
        Some(SimpleSlot { slot, free: word & !STATE_MASK })
    }
}

/// The poster's place in the ring of slots.
#[derive(Debug)]
pub(crate) struct Cursor<P> {
    /// The slot to look at, or `end`, where there is a slot that is never free: then the place is `kept`.
    next: *const Slot<P>,
    kept: *const Slot<P>,
    first: *const Slot<P>,
    end: *const Slot<P>,
}

impl<P> Clone for Cursor<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Cursor<P> {}

impl<P> Cursor<P> {
    /// The slot at the cursor, if it is free and the cursor open; then the cursor moves on.
    ///
    /// # Safety
    ///
    /// The cursor's table lives for `'a`, and the caller is its poster.
    #[inline(always)]
    pub(crate) unsafe fn next<'a>(&mut self) -> Option<FreeSlot<'a, P>> {
        let next = self.next;
        // SAFETY: a slot of the table.
        let slot = unsafe { &*next };
        // Acquire: what the party that released the slot did to it happened before.
        let word = slot.word.load(Ordering::Acquire);
        if word & STATE_MASK != FREE {
            return None;
        }
        let after = next.wrapping_add(1);
        self.next = if after == self.end { self.first } else { after };
        Some(FreeSlot { slot, word })
    }

    /// As `next`, of a cursor that may be closed: for a poster who sees to the reasons.
    ///
    /// # Safety
    ///
    /// As for `next`.
    #[inline(always)]
    pub(crate) unsafe fn next_of_closed<'a>(&mut self) -> Option<FreeSlot<'a, P>> {
        let place = self.place();
        // SAFETY: a slot of the table.
        let slot = unsafe { &*place };
        // Acquire: as in `next`.
        let word = slot.word.load(Ordering::Acquire);
        if word & STATE_MASK != FREE {
            return None;
        }
        let after = place.wrapping_add(1);
        self.set_place(if after == self.end { self.first } else { after });
        Some(FreeSlot { slot, word })
    }

    /// Lets `next` find slots, or none: one test for the poster, who may have other reasons than a full queue.
    pub(crate) fn set_open(&mut self, is_open: bool) {
        let place = self.place();
        self.kept = place;
        self.next = if is_open { place } else { self.end };
    }

    #[inline]
    fn place(&self) -> *const Slot<P> {
        if self.next == self.end { self.kept } else { self.next }
    }

    #[inline]
    fn set_place(&mut self, place: *const Slot<P>) {
        self.kept = place;
        if self.next != self.end {
            self.next = place;
        }
    }

    fn index(&self) -> usize {
        (self.place().addr() - self.first.addr()) / size_of::<Slot<P>>()
    }
}

impl<P, R> SlotTable<P, R> {
    /// A table of `depth` free slots, of the work queue with this index.
    pub(crate) fn new(queue: u32, depth: u32) -> SlotTable<P, R> {
        let depth = depth.min(1 << SLOT_BITS);
        let word = |slot| u64::from(queue) << QUEUE_SHIFT | u64::from(slot) << STATE_BITS | FREE;
        let slots = (0..depth.next_power_of_two().max(depth + 1))
            .map(|slot| Slot {
                payload: UnsafeCell::new(MaybeUninit::uninit()),
                word: AtomicU64::new(if slot < depth { word(slot) } else { UNUSED }),
            })
            .collect();
        SlotTable { slots, depth, cold: OnceLock::new() }
    }

    /// The cursor of the poster, of whom there is one. It is not open.
    pub(crate) fn cursor(&self) -> Cursor<P> {
        let first = self.slots.as_ptr();
        let end = first.wrapping_add(self.depth as usize);
        Cursor { next: end, kept: first, first, end }
    }

    /// See [`Slots`].
    #[inline(always)]
    pub(crate) fn slots(&self) -> Slots<P> {
        let mask = (self.depth.next_power_of_two() - 1) << STATE_BITS;
        Slots { first: self.slots.as_ptr(), mask: u64::from(mask) }
    }

    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// The owner's part of a slot. Operations exist only after `prepare_owned`.
    #[inline]
    fn cold(&self, index: u32) -> &Cold<R> {
        match self.cold.get() {
            Some(cold) => &cold[index as usize],
            None => unreachable!("an owned slot without its owner's part"),
        }
    }

    // ---- the poster ----

    /// Makes room for the owners' parts: one allocation per queue, at its first operation.
    #[inline]
    pub(crate) fn prepare_owned(&self) {
        if self.cold.get().is_none() {
            self.cold.get_or_init(|| {
                let cold = || Cold {
                    waker: UnsafeCell::new(MaybeUninit::uninit()),
                    result: UnsafeCell::new(MaybeUninit::uninit()),
                };
                self.slots.iter().map(|_| cold()).collect()
            });
        }
    }

    /// A free slot, at the cursor or, when that is taken, after it; `None` when there is none.
    ///
    /// In a queue that completes in order (`fifo`), a slot in flight at the cursor is the oldest, and
    /// the search ends: whatever else is free will be found once that completed.
    pub(crate) fn search(&self, cursor: &mut Cursor<P>, fifo: bool) -> Option<FreeSlot<'_, P>> {
        let start = cursor.index();
        let (before, from) = self.slots[..self.depth as usize].split_at(start);
        for slot in from.iter().chain(before) {
            let word = slot.word.load(Ordering::Acquire);
            match word & STATE_MASK {
                FREE => {
                    self.set_cursor(cursor, self.after(WrId(word).slot()));
                    return Some(FreeSlot { slot, word });
                }
                SIMPLE..=SIMPLE_LAST | PLACED..=PLACED_LAST | POLLED | SUBMITTED | WAITING | IGNORED
                    if fifo =>
                {
                    return None;
                }
                _ => {}
            }
        }
        None
    }

    fn after(&self, index: u32) -> u32 {
        if index + 1 == self.depth { 0 } else { index + 1 }
    }

    /// Puts the cursor at a slot.
    pub(crate) fn set_cursor(&self, cursor: &mut Cursor<P>, index: u32) {
        cursor.set_place(&raw const self.slots[index as usize]);
    }

    /// Whether `search` would find a slot.
    pub(crate) fn has_free(&self, cursor: &Cursor<P>, fifo: bool) -> bool {
        self.search(&mut { *cursor }, fifo).is_some()
    }

    /// The payload's cell.
    ///
    /// # Safety
    ///
    /// The caller owns the payload (S-3): it is the claimer, or the owner of a COMPLETED slot.
    #[inline]
    pub(crate) unsafe fn payload(&self, index: u32) -> *mut P {
        self.slots[index as usize].payload.with_mut(|cell| cell.cast())
    }

    // ---- the poller ----

    /// Claims the slot a completion names. `exclusive` says that only this poller can complete
    /// slots of this table (a queue with one completion queue), which spares an atomic exchange.
    #[inline]
    pub(crate) fn claim(&self, id: WrId, exclusive: bool) -> Claim {
        let Some(slot) = self.slots.get(id.slot() as usize) else { return Claim::Stray };
        // Acquire: see `publish`.
        let word = slot.word.load(Ordering::Acquire);
        let tag = id.0 & !STATE_MASK;
        if exclusive && word == (tag | POLLED) {
            return Claim::Polled;
        }
        Self::claim_slow(slot, word, tag)
    }

    /// Completes the slot if its owner has left no waker, as it does when it polls the completion queue itself: `claim` and
    /// `finish` in one exchange. In any other state nothing happens, and the result comes back.
    ///
    /// # Safety
    ///
    /// Only this poller can complete slots of this table.
    #[inline]
    pub(crate) unsafe fn complete_submitted(&self, id: WrId, result: R) -> Result<(), R> {
        let Some(slot) = self.slots.get(id.slot() as usize) else { return Err(result) };
        let tag = id.0 & !STATE_MASK;
        // Acquire: see `publish`.
        if slot.word.load(Ordering::Acquire) != tag | SUBMITTED {
            return Err(result);
        }
        let cold = self.cold(id.slot());
        cold.result.with_mut(|cell| {
            // SAFETY: nobody reads the result before COMPLETED, and nobody else can complete the slot (S-3).
            unsafe { (*cell).write(result) };
        });
        let exchanged =
            slot.word.compare_exchange(tag | SUBMITTED, tag | COMPLETED, Ordering::AcqRel, Ordering::Acquire);
        match exchanged {
            Ok(_) => Ok(()),
            // The owner left a waker or went away meanwhile.
            Err(_) => Err(cold.result.with_mut(|cell| {
                // SAFETY: written above, and the slot is not COMPLETED: nobody else reads it.
                unsafe { init(cell).read() }
            })),
        }
    }

    fn claim_slow(slot: &Slot<P>, mut word: u64, tag: u64) -> Claim {
        loop {
            if word & !STATE_MASK != tag {
                return Claim::Stray;
            }
            let (next, claim) = match word & STATE_MASK {
                POLLED => (CLAIMED, Claim::Polled),
                simple @ SIMPLE..=SIMPLE_LAST => (CLAIMED, Claim::Simple(WrId(simple).opcode())),
                placed @ PLACED..=PLACED_LAST => (CLAIMED, Claim::Placed(WrId(placed).opcode())),
                SUBMITTED => (COMPLETING, Claim::Owned { waiting: false }),
                WAITING => (COMPLETING, Claim::Owned { waiting: true }),
                IGNORED => (CLAIMED, Claim::Ignored),
                _ => return Claim::Stray,
            };
            match slot.word.compare_exchange(word, tag | next, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return claim,
                Err(now) => word = now,
            }
        }
    }

    /// Claims whatever is in flight at `index`: the queue was destroyed or reset, the device no
    /// longer touches it.
    pub(crate) fn claim_any(&self, index: u32) -> Claim {
        let slot = &self.slots[index as usize];
        let word = slot.word.load(Ordering::Acquire);
        Self::claim_slow(slot, word, word & !STATE_MASK)
    }

    /// Whether the slot is in flight: posted, and its completion not yet seen.
    pub(crate) fn is_in_flight(&self, index: u32) -> bool {
        let word = self.slots[index as usize].word.load(Ordering::Acquire);
        let state = word & STATE_MASK;
        matches!(state, SIMPLE..=SIMPLE_LAST | PLACED..=PLACED_LAST | POLLED | SUBMITTED | WAITING | IGNORED)
    }

    /// Stores the result of an `Owned` claim and gives the waker to call, if there is one. `Err`
    /// gives the result back when the owner went away meanwhile: then the caller takes the payload
    /// and releases the slot.
    ///
    /// # Safety
    ///
    /// The caller claimed the slot with this answer and calls this once.
    pub(crate) unsafe fn finish(&self, index: u32, waiting: bool, result: R) -> Result<Option<Waker>, R> {
        let slot = &self.slots[index as usize];
        let cold = self.cold(index);
        let waker = waiting.then(|| {
            cold.waker.with_mut(|cell| {
                // SAFETY: WAITING passed a written waker to the claimer (S-3).
                unsafe { init(cell).read() }
            })
        });
        cold.result.with_mut(|cell| {
            // SAFETY: the claimer owns the result until COMPLETED (S-3).
            unsafe { (*cell).write(result) };
        });
        let tag = slot.word.load(Ordering::Relaxed) & !STATE_MASK;
        let exchanged = slot.word.compare_exchange(
            tag | COMPLETING,
            tag | COMPLETED,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match exchanged {
            Ok(_) => Ok(waker),
            // ABANDONED while we completed it: the owner left the slot to us.
            Err(_) => Err(cold.result.with_mut(|cell| {
                // SAFETY: written above, and the owner that would read it is gone.
                unsafe { init(cell).read() }
            })),
        }
    }

    /// Gives a slot back.
    ///
    /// # Safety
    ///
    /// The caller owns the slot (claimer, or owner of a COMPLETED slot) and has taken its payload.
    #[inline]
    pub(crate) unsafe fn release(&self, index: u32) {
        let word = &self.slots[index as usize].word;
        let free = word.load(Ordering::Relaxed) & !STATE_MASK | FREE;
        // Release: what we did to the slot happens before the poster's use of it.
        word.store(free, Ordering::Release);
    }

    // ---- the owner ----

    /// Whether the operation completed; registers the waker when it did not.
    ///
    /// # Safety
    ///
    /// The caller is the owner of this slot and has not given it up.
    pub(crate) unsafe fn poll(&self, index: u32, cx: &mut Context<'_>) -> Poll<()> {
        let slot = &self.slots[index as usize];
        let word = slot.word.load(Ordering::Acquire);
        let tag = word & !STATE_MASK;
        let cold = self.cold(index);
        match word & STATE_MASK {
            COMPLETED => return Poll::Ready(()),
            WAITING => {
                // Take the waker cell back; failing means that the poller has it now.
                if slot
                    .word
                    .compare_exchange(word, tag | SUBMITTED, Ordering::Acquire, Ordering::Acquire)
                    .is_err()
                {
                    return self.completing(index, cx);
                }
                cold.waker.with_mut(|cell| {
                    // SAFETY: SUBMITTED gives the owner the cell; WAITING left a waker in it (S-3).
                    let waker = unsafe { &mut *init(cell) };
                    waker.clone_from(cx.waker());
                });
            }
            SUBMITTED => cold.waker.with_mut(|cell| {
                // SAFETY: SUBMITTED gives the owner the cell, which is empty (S-3).
                unsafe { (*cell).write(cx.waker().clone()) };
            }),
            _ => return self.completing(index, cx),
        }
        // Release: the waker is written before the poller can take it.
        if slot
            .word
            .compare_exchange(tag | SUBMITTED, tag | WAITING, Ordering::Release, Ordering::Acquire)
            .is_ok()
        {
            return Poll::Pending;
        }
        cold.waker.with_mut(|cell| {
            // SAFETY: the poller claimed a slot without a waker, so this one stayed ours.
            unsafe { init(cell).drop_in_place() };
        });
        self.completing(index, cx)
    }

    /// The poller is at the slot: done, or done in a few instructions. Rather than spin on another
    /// thread's progress, ask to be polled again.
    fn completing(&self, index: u32, cx: &mut Context<'_>) -> Poll<()> {
        // Acquire: the result and payload that the poller left.
        if self.slots[index as usize].word.load(Ordering::Acquire) & STATE_MASK == COMPLETED {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Whether the operation completed.
    #[inline]
    pub(crate) fn is_completed(&self, index: u32) -> bool {
        self.slots[index as usize].word.load(Ordering::Acquire) & STATE_MASK == COMPLETED
    }

    /// The result of a completed operation; the payload is still to be taken, then released.
    ///
    /// # Safety
    ///
    /// The caller is the owner, and `poll` or `is_completed` said that it completed.
    #[inline]
    pub(crate) unsafe fn take_result(&self, index: u32) -> R {
        self.cold(index).result.with_mut(|cell| {
            // SAFETY: COMPLETED gives the owner the written result (S-3), taken once.
            unsafe { init(cell).read() }
        })
    }

    /// The result of a completed operation, in place.
    ///
    /// # Safety
    ///
    /// The caller is the owner, `poll` or `is_completed` said that it completed, and the slot is not given up meanwhile.
    #[inline]
    pub(crate) unsafe fn result(&self, index: u32) -> &R {
        self.cold(index).result.with_mut(|cell| {
            // SAFETY: COMPLETED gives the owner the written result (S-3).
            unsafe { &*init(cell) }
        })
    }

    /// Gives up interest: true when the slot is the poller's now, false when the operation had
    /// completed, and then the caller takes result and payload and releases.
    ///
    /// # Safety
    ///
    /// The caller is the owner and does not use the slot again when told true.
    pub(crate) unsafe fn ignore(&self, index: u32) -> bool {
        let slot = &self.slots[index as usize];
        let mut word = slot.word.load(Ordering::Acquire);
        loop {
            let tag = word & !STATE_MASK;
            match word & STATE_MASK {
                COMPLETED => return false,
                WAITING => {
                    match slot.word.compare_exchange(
                        word,
                        tag | SUBMITTED,
                        Ordering::Acquire,
                        Ordering::Acquire,
                    ) {
                        Ok(_) => {
                            self.cold(index).waker.with_mut(|cell| {
                                // SAFETY: SUBMITTED gives the owner the cell; WAITING left a waker in it.
                                unsafe { init(cell).drop_in_place() };
                            });
                            word = tag | SUBMITTED;
                        }
                        Err(now) => word = now,
                    }
                }
                // COMPLETING: the poller sees it when it wants to finish. A second completion of the
                // same slot, possible on a shared queue, must not claim it: hence another state.
                state => {
                    let next = if state == COMPLETING { ABANDONED } else { IGNORED };
                    match slot.word.compare_exchange(word, tag | next, Ordering::AcqRel, Ordering::Acquire) {
                        Ok(_) => return true,
                        Err(now) => word = now,
                    }
                }
            }
        }
    }
}

impl<P, R> std::fmt::Debug for SlotTable<P, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlotTable").field("depth", &self.depth).finish_non_exhaustive()
    }
}
