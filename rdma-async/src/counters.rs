//! Counters as plain numbers: what happened since an object was made.

use std::sync::{Mutex, PoisonError};

use rdma_core::Status;

/// What futures did while they waited on one completion queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueCounters {
    /// Polls in vain by spinning futures.
    pub spins: u64,
    /// Times that a future went to sleep.
    pub sleeps: u64,
    /// Times that the queue was armed to raise an event (`ibv_req_notify_cq`).
    pub arms: u64,
    /// Events taken from the completion channel: wake-ups.
    pub events: u64,
}

/// What a connection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionCounters {
    /// Sends, writes, reads and atomics that were posted.
    pub posted: u64,
    /// Of those, how many ended well while somebody waited for them.
    pub completed: u64,
    /// Of those, how many ended with an error while somebody waited for them.
    pub failed: u64,
    /// Receives that were posted.
    pub receives_posted: u64,
    /// Messages that `recv` handed out.
    pub received: u64,
    /// Keep-alives sent because the connection was idle.
    pub keep_alives: u64,
}

/// Completions with an error, by status. Errors are rare: a lock is no loss.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    counts: Mutex<Vec<(Status, u64)>>,
}

impl Errors {
    /// The most statuses that are told apart: more than `enum ibv_wc_status` has.
    const MOST: usize = 64;

    pub(crate) fn count(&self, status: Status) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, count)) = counts.iter_mut().find(|(known, _)| *known == status) {
            *count += 1;
        } else if counts.len() < Self::MOST {
            counts.push((status, 1));
        }
    }

    /// The statuses that came, in that order, and how often.
    pub(crate) fn list(&self) -> Vec<(Status, u64)> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
