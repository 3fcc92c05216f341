//! The queue pairs that somebody has to look after.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::queue_pair::{Listed, NEVER, QueuePair};
use crate::proto::Time;

/// All lists of a device.
#[derive(Debug)]
pub(super) struct Lists {
    /// Those that owe an acknowledgement.
    pub(super) acks: WorkList,
    /// Those that have more to send than their quota allowed, in turn.
    pub(super) runnable: WorkList,
    pub(super) timers: Timers,
}

impl Lists {
    pub(super) fn new() -> Self {
        Lists {
            acks: WorkList::new(|listed| &listed.in_acks),
            runnable: WorkList::new(|listed| &listed.in_runnable),
            timers: Timers::default(),
        }
    }

    /// Whether a queue pair waits for its turn or to send an acknowledgement.
    pub(super) fn has_work(&self) -> bool {
        self.acks.len() > 0 || self.runnable.len() > 0
    }
}

/// A queue of queue pairs, each at most once.
#[derive(Debug)]
pub(super) struct WorkList {
    queue: Mutex<VecDeque<Arc<QueuePair>>>,
    len: AtomicUsize,
    flag: fn(&Listed) -> &AtomicBool,
}

impl WorkList {
    fn new(flag: fn(&Listed) -> &AtomicBool) -> Self {
        WorkList { queue: Mutex::default(), len: AtomicUsize::new(0), flag }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<QueuePair>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    pub(super) fn add(&self, qp: &Arc<QueuePair>) {
        if !(self.flag)(&qp.listed).swap(true, Ordering::AcqRel) {
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
        (self.flag)(&qp.listed).store(false, Ordering::Release);
        Some(qp)
    }
}

/// The queue pairs with a timer. Deadlines move with every packet, so they are kept where that is one
/// store, in the queue pair, and looked up when the earliest that was known has passed.
#[derive(Debug, Default)]
pub(super) struct Timers(Mutex<Vec<Arc<QueuePair>>>);

impl Timers {
    /// Sets the deadline of a queue pair.
    pub(super) fn set(&self, qp: &Arc<QueuePair>, deadline: u64) {
        qp.listed.deadline.store(deadline, Ordering::Relaxed);
        if deadline == NEVER {
            return;
        }
        // Against `take_due`, which clears the flag and then looks at the deadline again.
        fence(Ordering::SeqCst);
        if !qp.listed.in_timers.load(Ordering::Relaxed) {
            let mut timers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if !qp.listed.in_timers.swap(true, Ordering::Relaxed) {
                timers.push(Arc::clone(qp));
            }
        }
    }

    /// Moves those that are due at `now` to `due` and returns the earliest deadline of the others.
    pub(super) fn take_due(&self, now: Time, due: &mut Vec<Arc<QueuePair>>) -> u64 {
        let mut timers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut earliest = NEVER;
        timers.retain(|qp| {
            let deadline = &qp.listed.deadline;
            if deadline.load(Ordering::Relaxed) == NEVER {
                qp.listed.in_timers.store(false, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if deadline.load(Ordering::Relaxed) == NEVER {
                    return false;
                }
                // Set meanwhile, by a thread that may have seen the flag: it stays in the list. If the
                // thread saw it cleared, it waits for this list's lock and finds the flag set.
                qp.listed.in_timers.store(true, Ordering::Relaxed);
            }
            let at = deadline.load(Ordering::Relaxed);
            if at <= now.nanoseconds() {
                due.push(Arc::clone(qp));
            } else {
                earliest = earliest.min(at);
            }
            true
        });
        earliest
    }
}
