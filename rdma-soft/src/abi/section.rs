//! Critical sections that begin with one call of the program's and end with another: `wr_start` to `wr_complete` or `wr_abort`
//! (`man ibv_wr_post`), `start_poll` to `end_poll` (`man ibv_create_cq_ex`).

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RawMutex;
use parking_lot::lock_api::RawMutex as _;

/// One thread is inside at a time; others wait where they enter. The thread that entered leaves: for another one that is not inside.
pub(crate) struct Section {
    lock: RawMutex,
    /// The thread that is inside, or 0.
    inside: AtomicUsize,
}

/// A number that no other thread has that lives; not 0.
fn this_thread() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

impl Section {
    pub(crate) fn new() -> Self {
        Section { lock: RawMutex::INIT, inside: AtomicUsize::new(0) }
    }

    /// Waits until nobody is inside, then is. A thread that is inside already stays so: it would wait for itself.
    pub(crate) fn enter(&self) {
        if !self.is_inside() {
            self.lock.lock();
            self.inside.store(this_thread(), Ordering::Relaxed);
        }
    }

    /// Whether the calling thread is inside. Nobody else is then.
    #[inline]
    pub(crate) fn is_inside(&self) -> bool {
        // Only a thread itself stores its number, and takes it back.
        self.inside.load(Ordering::Relaxed) == this_thread()
    }

    /// Ends it, if the calling thread is inside.
    pub(crate) fn leave(&self) {
        if self.is_inside() {
            self.inside.store(0, Ordering::Relaxed);
            // SAFETY: locked by this thread in `enter`, and not unlocked since: it is inside.
            unsafe { self.lock.unlock() };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn one_thread_is_inside_at_a_time() {
        let (section, is_taken) = (Section::new(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000 {
                        assert!(!section.is_inside());
                        section.enter();
                        assert!(!is_taken.swap(true, Ordering::Relaxed));
                        if round % 3 == 0 {
                            section.enter();
                        }
                        assert!(section.is_inside());
                        is_taken.store(false, Ordering::Relaxed);
                        section.leave();
                    }
                });
            }
        });
    }

    #[test]
    fn others_do_not_end_it() {
        let (section, left) = (Section::new(), Cell::new(false));
        section.enter();
        std::thread::scope(|scope| scope.spawn(|| section.leave()).join()).unwrap();
        assert!(section.is_inside());
        section.leave();
        left.set(!section.is_inside());
        section.leave();
        assert!(left.get());
        section.enter();
        section.leave();
    }
}
