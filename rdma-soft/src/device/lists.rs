//! The queue pairs that somebody has to look after.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::queue_pair::{Listed, NEVER, QueuePair};
use crate::proto::Time;

/// All lists of a device.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// How many queue pairs were destroyed: who keeps one to find it faster looks whether it still exists.
    pub(super) destroyed: AtomicU64,
    /// Those that have more to send than their quota allowed, in turn.
    pub(super) runnable: WorkList,
    pub(super) timers: Timers,
}

/// A queue of queue pairs, each at most once.
#[derive(Debug, Default)]
pub(super) struct WorkList {
    queue: Mutex<VecDeque<Arc<QueuePair>>>,
    len: AtomicUsize,
}

impl WorkList {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<QueuePair>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    pub(super) fn add(&self, qp: &Arc<QueuePair>) {
        if !qp.listed.in_runnable.swap(true, Ordering::AcqRel) {
            let mut queue = self.lock();
            queue.push_back(Arc::clone(qp));
            self.len.store(queue.len(), Ordering::Release);
        }
    }

    /// Takes the first; what is added for it from now on enters it again.
    pub(super) fn pop(&self) -> Option<Arc<QueuePair>> {
        let mut queue = self.lock();
        let qp = queue.pop_front()?;
        self.len.store(queue.len(), Ordering::Release);
        drop(queue);
        qp.listed.in_runnable.store(false, Ordering::Release);
        Some(qp)
    }
}

/// The queue pairs with a timer.
///
/// Deadlines move with every packet, nearly always to later. So each queue pair keeps one that is never too
/// late, which is changed only when it has to become earlier; when it has passed, the queue pair is asked
/// for its true one.
#[derive(Debug, Default)]
pub(super) struct Timers(Mutex<Vec<Arc<QueuePair>>>);

impl Timers {
    /// Makes sure that the queue pair is looked at by `deadline`; false if it is anyway.
    #[inline]
    pub(super) fn set(&self, qp: &Arc<QueuePair>, deadline: u64) -> bool {
        if deadline >= qp.listed.deadline.load(Ordering::Relaxed) {
            return false;
        }
        self.bring_forward(qp, deadline);
        true
    }

    #[inline(never)]
    fn bring_forward(&self, qp: &Arc<QueuePair>, deadline: u64) {
        let listed = &qp.listed;
        listed.deadline.fetch_min(deadline, Ordering::Relaxed);
        // Against `take_due`, which clears the flag and then looks at the deadline again.
        fence(Ordering::SeqCst);
        if !listed.in_timers.load(Ordering::Relaxed) {
            let mut timers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !listed.in_timers.swap(true, Ordering::Relaxed) {
                timers.push(Arc::clone(qp));
            }
        }
    }

    /// Moves those that are due at `now` to `due`, their deadlines cleared, and returns the earliest deadline
    /// of the others.
    pub(super) fn take_due(&self, now: Time, due: &mut Vec<Arc<QueuePair>>) -> u64 {
        let mut timers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut earliest = NEVER;
        timers.retain(|qp| {
            let Listed { deadline, in_timers, .. } = &qp.listed;
            let at = deadline.load(Ordering::Relaxed);
            if at <= now.nanoseconds() {
                deadline.store(NEVER, Ordering::Relaxed);
                due.push(Arc::clone(qp));
                // It stays in the list: it is about to set a new deadline, most likely.
                return true;
            }
            if at == NEVER {
                in_timers.store(false, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if deadline.load(Ordering::Relaxed) == NEVER {
                    return false;
                }
                // Set meanwhile, by a thread that may have seen the flag: it stays in the list. If the
                // thread saw it cleared, it waits for this list's lock and finds the flag set.
                in_timers.store(true, Ordering::Relaxed);
            }
            earliest = earliest.min(deadline.load(Ordering::Relaxed));
            true
        });
        earliest
    }
}
