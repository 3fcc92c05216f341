//! Who looks for the completions of a queue that futures wait on.
//!
//! One word, so that every change of who it is and of how many wait is one step. A future that waits may be pending only while somebody
//! looks: a future within its own poll (`SPINS`), the queue's poller (`POLLED`), or whoever takes the event that the queue is armed for
//! (`ARMED`). Whoever stops looking while others wait hands the duty on in the same step.

#[cfg(loom)]
use loom::sync::atomic::{AtomicUsize, Ordering::SeqCst};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A future looks, within its own poll: so it cannot be forgotten while it does.
const SPINS: usize = 1;
/// The poller is awake, or was called.
const POLLED: usize = 2;
/// The next completion raises an event, or an event was raised that has yet to be taken.
const ARMED: usize = 4;
/// The poller's runtime is gone: every future looks for itself.
const ORPHANED: usize = 8;
/// Nobody takes events any more: that it is armed counts for nothing.
const UNSERVED: usize = 16;
/// A future that waits.
const ONE: usize = 32;

/// Whether the queue is armed, and somebody takes its event.
#[inline(always)]
fn tells(word: usize) -> bool {
    word & (ARMED | UNSERVED) == ARMED
}

/// What a future that found nothing is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Look for completions until [`Duty::found`], [`Duty::hand_over`] or [`Duty::sleep`].
    Spin,
    /// Look for its own sake: the others do not count on it, nor it on them.
    SpinApart,
    /// Somebody else looks.
    Rely,
    /// The poller is to look, and has to be called.
    Call,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Duty(AtomicUsize);

impl Duty {
    pub(crate) fn new() -> Duty {
        Duty(AtomicUsize::new(0))
    }

    /// Changes the word by `f`, which also gives the answer.
    #[inline]
    fn change<R>(&self, mut f: impl FnMut(usize) -> (usize, R)) -> R {
        let mut word = self.0.load(SeqCst);
        loop {
            let (next, answer) = f(word);
            if next == word {
                return answer;
            }
            match self.0.compare_exchange(word, next, SeqCst, SeqCst) {
                Ok(_) => return answer,
                Err(now) => word = now,
            }
        }
    }

    /// Whether the poller looks. A hint: see [`Duty::enter`].
    #[inline(always)]
    pub(crate) fn is_polled(&self) -> bool {
        self.0.load(SeqCst) & POLLED != 0
    }

    /// Whether somebody looks on whom a future that counts as waiting may rely.
    #[inline]
    pub(crate) fn is_seen_to(&self) -> bool {
        let word = self.0.load(SeqCst);
        (word & (SPINS | POLLED) != 0 || tells(word)) && word & ORPHANED == 0
    }

    /// Whether others wait besides the caller.
    #[inline]
    pub(crate) fn has_others(&self) -> bool {
        self.0.load(SeqCst) >= 2 * ONE
    }

    /// A future found nothing; it counts as waiting already if it is `counted`, and from now on. Where `all_spin`, those who wait spin by
    /// turns, which the poller does better. `may_rely`: the poller and the future run on the same runtime.
    #[inline]
    pub(crate) fn enter(&self, counted: bool, all_spin: bool, may_rely: impl Fn() -> bool) -> Role {
        let mut relies = None;
        self.change(|word| {
            let counts = if counted { word } else { word + ONE };
            if counts < 2 * ONE {
                // Nobody relies on the poller: the only one who waits spins, which saves it two switches of tasks.
                return (counts & !POLLED | SPINS, Role::Spin);
            }
            if word & ORPHANED != 0 || !*relies.get_or_insert_with(&may_rely) {
                (counts, Role::SpinApart)
            } else if word & (POLLED | SPINS) != 0 {
                (counts, Role::Rely)
            } else if all_spin {
                (counts | POLLED, Role::Call)
            } else {
                (counts | SPINS, Role::Spin)
            }
        })
    }

    /// As `enter`, for a future that does not spin: it only counts. Gives whether the poller looks.
    #[inline]
    pub(crate) fn count(&self) -> bool {
        self.0.fetch_add(ONE, SeqCst) & (POLLED | ORPHANED) == POLLED
    }

    /// Counts a future that found nothing, if the queue is armed: then it may be pending once its waker is registered, for whoever takes the
    /// event dispatches, and then looks who is counted. The lock under which it found nothing is held until then.
    #[inline]
    pub(crate) fn rely_on_event(&self) -> bool {
        if !tells(self.0.load(SeqCst)) {
            return false;
        }
        let relies = tells(self.0.fetch_add(ONE, SeqCst));
        if !relies {
            self.leave(false);
        }
        relies
    }

    /// Joins those who rely on the poller, if it looks and there are some.
    #[inline]
    pub(crate) fn join(&self, may_rely: impl Fn() -> bool) -> bool {
        let mut relies = None;
        self.change(|word| {
            if word & (POLLED | ORPHANED) == POLLED && word >= ONE && *relies.get_or_insert_with(&may_rely) {
                (word + ONE, true)
            } else {
                (word, false)
            }
        })
    }

    /// A future waits no longer. If it `spins`, true tells it to call the poller, because others wait.
    #[inline]
    pub(crate) fn leave(&self, spins: bool) -> bool {
        if !spins {
            self.0.fetch_sub(ONE, SeqCst);
            return false;
        }
        self.change(|word| {
            let next = (word - ONE) & !SPINS;
            let is_due = next >= ONE && next & (POLLED | ORPHANED) == 0 && !tells(next);
            (if is_due { next | POLLED } else { next }, is_due)
        })
    }

    /// Who spins does so no longer, but waits. `None` when nobody else waits; otherwise the poller looks, and true tells to call it.
    pub(crate) fn hand_over(&self) -> Option<bool> {
        self.change(|word| {
            let next = word & !SPINS;
            if next < 2 * ONE || word & ORPHANED != 0 {
                (next, None)
            } else {
                (next | POLLED, Some(word & POLLED == 0))
            }
        })
    }

    /// Who waits goes to sleep. True when the queue has to be armed for that. `None`, and no change, if nobody takes events any more: who spins
    /// does so still.
    #[inline]
    pub(crate) fn sleep(&self, spins: bool) -> Option<bool> {
        self.change(|word| {
            if word & UNSERVED != 0 {
                return (word, None);
            }
            let next = if spins { word & !SPINS } else { word };
            (next | ARMED, Some(word & ARMED == 0))
        })
    }

    /// The queue is to be armed. True when it was not.
    #[inline]
    pub(crate) fn arm(&self) -> bool {
        self.0.fetch_or(ARMED, SeqCst) & ARMED == 0
    }

    /// The event was taken, or the queue could not be armed.
    pub(crate) fn disarm(&self) {
        self.0.fetch_and(!ARMED, SeqCst);
    }

    /// Nobody takes events any more. Those who relied on them have to be woken.
    pub(crate) fn end_service(&self) {
        self.change(|word| (word & !ARMED | UNSERVED, ()));
    }

    /// As `arm`, if somebody waits for whom nobody looks. `may_rely`: the poller runs if it is to look.
    pub(crate) fn rearm(&self, may_rely: bool) -> bool {
        self.change(|word| {
            let is_due = word >= ONE && !(tells(word) || may_rely && word & POLLED != 0);
            (if is_due { word | ARMED } else { word }, is_due)
        })
    }

    /// Several wait: true tells to call the poller.
    pub(crate) fn call(&self) -> bool {
        self.change(|word| {
            let is_due = word >= 2 * ONE && word & (POLLED | ORPHANED) == 0;
            (if is_due { word | POLLED } else { word }, is_due)
        })
    }

    /// The poller stops if nobody waits. True when it is to stop, also because somebody else took over.
    pub(crate) fn retire(&self) -> bool {
        self.change(|word| {
            let stops = word < ONE || word & POLLED == 0;
            (if stops { word & !POLLED } else { word }, stops)
        })
    }

    /// The poller stops if the queue is armed still: those who wait rely on the event. Otherwise the event was taken meanwhile, and left
    /// to the poller, or nobody takes one: false, and it goes on.
    pub(crate) fn rest(&self) -> bool {
        self.change(|word| if tells(word) { (word & !POLLED, true) } else { (word, false) })
    }

    /// The poller stops. Those who relied on it have to be woken.
    pub(crate) fn give_up(&self) {
        self.0.fetch_and(!POLLED, SeqCst);
    }

    /// There is no poller any more. Those who relied on it have to be woken.
    pub(crate) fn orphan(&self) {
        self.change(|word| (word & !POLLED | ORPHANED, ()));
    }
}
