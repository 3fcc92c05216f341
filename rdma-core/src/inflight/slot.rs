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
//! * The *poster* is whoever holds the queue's post lock; it owns a slot from `acquire` to `publish`.
//! * The *poller* is whoever holds the lock of a completion queue the slot can complete on. It owns
//!   the payload and the result from a successful `claim` on.
//! * The *owner* is the one `Operation` made for the slot. It owns the waker cell while the state is
//!   SUBMITTED, and everything once it is COMPLETED.
//!
//! A slot's generation changes whenever it is released, so a completion that comes twice, late, or
//! from nowhere finds another generation and claims nothing.

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};

use crate::sync::{AtomicU32, Ordering, UnsafeCell};

/// Bits of a generation.
pub(crate) const GENERATION_BITS: u32 = 24;

const FREE: u32 = 0;
const POLLED: u32 = 1;
const SUBMITTED: u32 = 2;
const WAITING: u32 = 3;
const IGNORED: u32 = 4;
const COMPLETING: u32 = 5;
const COMPLETED: u32 = 6;
const CLAIMED: u32 = 7;
const ABANDONED: u32 = 8;
const STATE_MASK: u32 = 0xff;

/// A cell's content, where it has one.
fn init<T>(cell: *mut MaybeUninit<T>) -> *mut T {
    cell.cast()
}

/// The part of a slot that every work request uses: one cache line for the payload of a work queue.
#[repr(C, align(64))]
struct Slot<P> {
    payload: UnsafeCell<MaybeUninit<P>>,
    /// Generation (24 bits) and state (8 bits).
    word: AtomicU32,
}

/// The part of a slot that only operations use.
struct Cold<R> {
    waker: UnsafeCell<MaybeUninit<Waker>>,
    result: UnsafeCell<MaybeUninit<R>>,
}

/// A slot that the poster acquired.
pub(crate) struct FreeSlot<'a, P> {
    slot: &'a Slot<P>,
    pub(crate) index: u32,
    word: u32,
}

impl<P> FreeSlot<'_, P> {
    /// The payload, the poster's until `publish`.
    #[inline(always)]
    pub(crate) fn payload(&self) -> *mut P {
        self.slot.payload.with_mut(|cell| cell.cast())
    }

    /// Marks the filled slot as in flight; its generation is the answer. Must come before the verb
    /// that posts, whose completion may arrive before it returns.
    #[inline(always)]
    pub(crate) fn publish(&self, owned: bool) -> u32 {
        // Release: the payload is written before anyone can claim it.
        self.slot.word.store(self.word | if owned { SUBMITTED } else { POLLED }, Ordering::Release);
        self.word >> 8
    }
}

/// A slot claimed by `claim_polled`.
pub(crate) struct PolledSlot<'a, P> {
    slot: &'a Slot<P>,
    word: u32,
}

impl<P> PolledSlot<'_, P> {
    /// The payload, the caller's until `release`.
    #[inline(always)]
    pub(crate) fn payload(&self) -> *mut P {
        self.slot.payload.with_mut(|cell| cell.cast())
    }

    /// Gives the slot back; the caller has taken the payload.
    #[inline(always)]
    pub(crate) fn release(self) {
        // Release: what we did to the slot happens before the poster's use of it.
        self.slot.word.store((self.word & !STATE_MASK).wrapping_add(1 << 8) | FREE, Ordering::Release);
    }
}

/// What a completion found at its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Posted for whoever polls; the caller takes the payload and releases the slot.
    Polled,
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

/// The slots of one work queue. `P` is what a work request keeps alive, `R` its result.
///
/// They are used in a ring, as the device uses its own, so that finding a free one costs a look at
/// the next.
pub(crate) struct SlotTable<P, R> {
    slots: Box<[Slot<P>]>,
    /// Made with the first operation: queues that are only polled do without.
    cold: OnceLock<Box<[Cold<R>]>>,
}

// SAFETY: cells are accessed by one party at a time, as the state says (S-3 in docs/SAFETY.md);
// what they hold is Send.
unsafe impl<P: Send, R: Send> Send for SlotTable<P, R> {}
// SAFETY: as above; the states pass from thread to thread through acquire and release.
unsafe impl<P: Send, R: Send> Sync for SlotTable<P, R> {}

impl<P, R> SlotTable<P, R> {
    /// A table of `depth` free slots.
    pub(crate) fn new(depth: u32) -> SlotTable<P, R> {
        let slots = (0..depth)
            .map(|_| Slot { payload: UnsafeCell::new(MaybeUninit::uninit()), word: AtomicU32::new(1 << 8) })
            .collect();
        SlotTable { slots, cold: OnceLock::new() }
    }

    pub(crate) fn depth(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
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

    /// A free slot, at `cursor` or, when that is taken, after it; `None` when there is none.
    ///
    /// In a queue that completes in order (`fifo`), a slot in flight at the cursor is the oldest, and
    /// the search ends: whatever else is free will be found once that completed.
    #[inline]
    pub(crate) fn acquire(&self, cursor: &mut u32, fifo: bool) -> Option<FreeSlot<'_, P>> {
        let index = *cursor;
        let slot = self.slots.get(index as usize)?;
        // Acquire: what the party that released the slot did to it happened before.
        let word = slot.word.load(Ordering::Acquire);
        if word & STATE_MASK != FREE {
            return self.search(cursor, fifo);
        }
        *cursor = self.after(index);
        Some(FreeSlot { slot, index, word })
    }

    #[inline]
    fn after(&self, index: u32) -> u32 {
        if index as usize + 1 == self.slots.len() { 0 } else { index + 1 }
    }

    #[cold]
    fn search(&self, cursor: &mut u32, fifo: bool) -> Option<FreeSlot<'_, P>> {
        let mut index = *cursor;
        for _ in 0..self.slots.len() {
            let slot = &self.slots[index as usize];
            let word = slot.word.load(Ordering::Acquire);
            match word & STATE_MASK {
                FREE => {
                    *cursor = self.after(index);
                    return Some(FreeSlot { slot, index, word });
                }
                POLLED | SUBMITTED | WAITING | IGNORED if fifo => return None,
                _ => index = self.after(index),
            }
        }
        None
    }

    /// Whether `acquire` would find a slot.
    pub(crate) fn has_free(&self, cursor: u32, fifo: bool) -> bool {
        self.acquire(&mut { cursor }, fifo).is_some()
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

    /// The payload of the slot that a completion names, if it was posted for whoever polls and is in
    /// flight: the common case of `claim`, with `exclusive`. The caller gives it up to [`PolledSlot::release`].
    #[inline(always)]
    pub(crate) fn claim_polled(&self, index: u32, generation: u32) -> Option<PolledSlot<'_, P>> {
        let slot = self.slots.get(index as usize)?;
        let expected = generation << 8 | POLLED;
        // Acquire: see `publish`.
        if slot.word.load(Ordering::Acquire) != expected {
            return None;
        }
        Some(PolledSlot { slot, word: expected })
    }

    /// Claims the slot a completion names. `exclusive` says that only this poller can complete
    /// slots of this table (a queue with one completion queue), which spares an atomic exchange.
    #[inline]
    pub(crate) fn claim(&self, index: u32, generation: u32, exclusive: bool) -> Claim {
        let Some(slot) = self.slots.get(index as usize) else { return Claim::Stray };
        // Acquire: see `publish`.
        let word = slot.word.load(Ordering::Acquire);
        if exclusive && word == (generation << 8 | POLLED) {
            return Claim::Polled;
        }
        Self::claim_slow(slot, word, generation)
    }

    /// Completes the slot if its owner has left no waker, as it does when it polls the completion queue itself: `claim` and
    /// `finish` in one exchange. In any other state nothing happens, and the result comes back.
    ///
    /// # Safety
    ///
    /// Only this poller can complete slots of this table.
    #[inline]
    pub(crate) unsafe fn complete_submitted(&self, index: u32, generation: u32, result: R) -> Result<(), R> {
        let Some(slot) = self.slots.get(index as usize) else { return Err(result) };
        let expected = generation << 8 | SUBMITTED;
        // Acquire: see `publish`.
        if slot.word.load(Ordering::Acquire) != expected {
            return Err(result);
        }
        let cold = self.cold(index);
        cold.result.with_mut(|cell| {
            // SAFETY: nobody reads the result before COMPLETED, and nobody else can complete the slot (S-3).
            unsafe { (*cell).write(result) };
        });
        match slot.word.compare_exchange(
            expected,
            generation << 8 | COMPLETED,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => Ok(()),
            // The owner left a waker or went away meanwhile.
            Err(_) => Err(cold.result.with_mut(|cell| {
                // SAFETY: written above, and the slot is not COMPLETED: nobody else reads it.
                unsafe { init(cell).read() }
            })),
        }
    }

    fn claim_slow(slot: &Slot<P>, mut word: u32, generation: u32) -> Claim {
        loop {
            if word >> 8 != generation {
                return Claim::Stray;
            }
            let (next, claim) = match word & STATE_MASK {
                POLLED => (CLAIMED, Claim::Polled),
                SUBMITTED => (COMPLETING, Claim::Owned { waiting: false }),
                WAITING => (COMPLETING, Claim::Owned { waiting: true }),
                IGNORED => (CLAIMED, Claim::Ignored),
                _ => return Claim::Stray,
            };
            match slot.word.compare_exchange(
                word,
                generation << 8 | next,
                Ordering::Acquire,
                Ordering::Acquire,
            ) {
                Ok(_) => return claim,
                Err(now) => word = now,
            }
        }
    }

    /// Claims whatever is in flight at `index`: the queue was destroyed or reset, the device no
    /// longer touches it. The generation is the one to `finish` with.
    pub(crate) fn claim_any(&self, index: u32) -> Claim {
        let slot = &self.slots[index as usize];
        let word = slot.word.load(Ordering::Acquire);
        Self::claim_slow(slot, word, word >> 8)
    }

    /// Whether the slot is in flight: posted, and its completion not yet seen.
    pub(crate) fn is_in_flight(&self, index: u32) -> bool {
        let word = self.slots[index as usize].word.load(Ordering::Acquire);
        matches!(word & STATE_MASK, POLLED | SUBMITTED | WAITING | IGNORED)
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
        let generation = slot.word.load(Ordering::Relaxed) >> 8;
        let from = generation << 8 | COMPLETING;
        match slot.word.compare_exchange(
            from,
            generation << 8 | COMPLETED,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
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
        let next = (word.load(Ordering::Relaxed) & !STATE_MASK).wrapping_add(1 << 8) | FREE;
        // Release: what we did to the slot happens before the poster's use of it.
        word.store(next, Ordering::Release);
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
        let generation = word & !STATE_MASK;
        let cold = self.cold(index);
        match word & STATE_MASK {
            COMPLETED => return Poll::Ready(()),
            WAITING => {
                // Take the waker cell back; failing means that the poller has it now.
                if slot
                    .word
                    .compare_exchange(word, generation | SUBMITTED, Ordering::Acquire, Ordering::Acquire)
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
            .compare_exchange(
                generation | SUBMITTED,
                generation | WAITING,
                Ordering::Release,
                Ordering::Acquire,
            )
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
            let generation = word & !STATE_MASK;
            match word & STATE_MASK {
                COMPLETED => return false,
                WAITING => {
                    match slot.word.compare_exchange(
                        word,
                        generation | SUBMITTED,
                        Ordering::Acquire,
                        Ordering::Acquire,
                    ) {
                        Ok(_) => {
                            self.cold(index).waker.with_mut(|cell| {
                                // SAFETY: SUBMITTED gives the owner the cell; WAITING left a waker in it.
                                unsafe { init(cell).drop_in_place() };
                            });
                            word = generation | SUBMITTED;
                        }
                        Err(now) => word = now,
                    }
                }
                // COMPLETING: the poller sees it when it wants to finish. A second completion of the
                // same slot, possible on a shared queue, must not claim it: hence another state.
                state => {
                    let next = if state == COMPLETING { ABANDONED } else { IGNORED };
                    match slot.word.compare_exchange(
                        word,
                        generation | next,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    ) {
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
        f.debug_struct("SlotTable").field("depth", &self.slots.len()).finish_non_exhaustive()
    }
}
