//! Counters as plain numbers: what happened since an object was made.

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

/// What a [`UdEndpoint`](crate::UdEndpoint) did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UdCounters {
    /// Datagrams that were posted.
    pub posted: u64,
    /// Of those, how many left while somebody waited for them.
    pub completed: u64,
    /// Of those, how many ended with an error while somebody waited for them.
    pub failed: u64,
    /// Receives that were posted.
    pub receives_posted: u64,
    /// Datagrams that `recv_from` handed out.
    pub received: u64,
    /// Datagrams that were dropped because their header does not tell their sender.
    pub unreadable: u64,
    /// Times that the send queue was brought back after a failed send (SQE to RTS).
    pub recovered: u64,
}

/// Completions with an error, by status.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    counts: Vec<(Status, u64)>,
}

impl Errors {
    /// The most statuses that are told apart: more than `enum ibv_wc_status` has.
    const MOST: usize = 64;

    pub(crate) fn count(&mut self, status: Status) {
        if let Some((_, count)) = self.counts.iter_mut().find(|(known, _)| *known == status) {
            *count += 1;
        } else if self.counts.len() < Self::MOST {
            self.counts.push((status, 1));
        }
    }

    /// The statuses that came, in that order, and how often.
    pub(crate) fn list(&self) -> Vec<(Status, u64)> {
        self.counts.clone()
    }
}
