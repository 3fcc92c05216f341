//! What a test can turn: calls that fail, and answers that are not what they should be.

use core::ffi::c_int;
use core::fmt;

use parking_lot::Mutex;

/// How one verb of a device fails.
///
/// An `errno` is passed on as it is, also 0 (a null pointer without a reason) and values that no
/// `errno` has. A verb that returns a pointer gives null and sets `errno`; one that returns a
/// number gives the `errno`, or -1 with `errno` set, as its manual page says; `poll_cq` gives the
/// negated number.
#[derive(Debug, Default)]
pub struct Fault {
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// Calls that work before any fails.
    works: u64,
    /// Calls that fail after those.
    fails: u64,
    errno: c_int,
    /// Calls so far.
    calls: u64,
}

impl Fault {
    /// Every call fails from now on.
    pub fn fail(&self, errno: c_int) {
        self.set(0, u64::MAX, errno);
    }

    /// The next `times` calls fail, and those after them work.
    pub fn fail_times(&self, times: u64, errno: c_int) {
        self.set(0, times, errno);
    }

    /// The next `works` calls work, and every one after them fails. For `post_send`, `post_recv`
    /// and `post_srq_recv` work requests count, not calls, so that a chain breaks in the middle.
    pub fn fail_after(&self, works: u64, errno: c_int) {
        self.set(works, u64::MAX, errno);
    }

    /// The next `works` calls work, counted as by [`fail_after`](Fault::fail_after), and the one after them fails.
    pub fn fail_once_after(&self, works: u64, errno: c_int) {
        self.set(works, 1, errno);
    }

    /// Every call works again.
    pub fn work(&self) {
        self.set(0, 0, 0);
    }

    /// How often the verb was called (for the posting verbs: work requests), failed or not.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.plan.lock().calls
    }

    fn set(&self, works: u64, fails: u64, errno: c_int) {
        let mut plan = self.plan.lock();
        *plan = Plan { works, fails, errno, calls: plan.calls };
    }

    /// Counts one call: the `errno` that it fails with.
    pub(super) fn strike(&self) -> Option<c_int> {
        let mut plan = self.plan.lock();
        plan.calls += 1;
        if plan.works > 0 {
            plan.works -= 1;
            return None;
        }
        if plan.fails == 0 {
            return None;
        }
        plan.fails -= 1;
        Some(plan.errno)
    }
}

/// An answer of the device that a test can falsify.
pub struct Lie<T> {
    teller: Mutex<Option<Teller<T>>>,
}

type Teller<T> = Box<dyn FnMut(&mut T) + Send>;

impl<T> Lie<T> {
    /// Every answer passes through `change` from now on, on the thread that asks. `change` must
    /// not call the device's verbs.
    pub fn tell(&self, change: impl FnMut(&mut T) + Send + 'static) {
        *self.teller.lock() = Some(Box::new(change));
    }

    /// Answers are true again.
    pub fn stop(&self) {
        *self.teller.lock() = None;
    }

    pub(super) fn apply(&self, answer: &mut T) {
        if let Some(change) = &mut *self.teller.lock() {
            change(answer);
        }
    }
}

impl<T> Default for Lie<T> {
    fn default() -> Lie<T> {
        Lie { teller: Mutex::new(None) }
    }
}

impl<T> fmt::Debug for Lie<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lie").field("told", &self.teller.lock().is_some()).finish()
    }
}
