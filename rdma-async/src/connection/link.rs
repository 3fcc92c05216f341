//! What the handle of a connection and its watcher share: the lane, and why it ended.

use std::{
    task::Waker,
    time::{Duration, Instant},
};

use super::transport::Connected;
use crate::{
    counters::ConnectionCounters,
    error::{Ended, OperationError},
    lane::Lane,
    operate::{Operate, Owner},
    publish::Snapshot,
    receive::Receiver,
};
use rdma_core::{
    CompletionError, Error, Payload, QueuePair, RemoteSlice, Status, WorkRequest, qp::state::Rts,
};

#[derive(Debug)]
pub(super) struct Link<T: Connected> {
    pub(super) qp_num: u32,
    pub(super) lane: Lane<T>,
}

impl<T: Connected> Link<T> {
    /// Takes `qp`, whose receives are posted in `lane`.
    pub(super) fn new(qp: QueuePair<T, Rts>, lane: Lane<T>) -> Self {
        let qp_num = qp.num();
        lane.lock().qp = Some(qp);
        Link { qp_num, lane }
    }

    /// Carries out a [`write_nowhere`]: on RC it is acknowledged, and everything posted before it is done when it is.
    pub(super) async fn probe(&self) -> Result<(), OperationError> {
        Operate::new(self, usize::MAX, (), write_nowhere).await.0
    }

    /// Reads completions until everything in flight was flushed; after `limit` destroys the pair, which ends the rest.
    /// The connection has ended. Several may do this at once.
    pub(super) async fn settle(&self, limit: Duration) {
        let queue = &self.lane.queue.shared;
        let start = Instant::now();
        while self.lane.lock().in_flight() > 0 && start.elapsed() < limit {
            match queue.dispatch() {
                Ok(0) => tokio::time::sleep(Duration::from_millis(1)).await,
                Ok(_) => tokio::task::yield_now().await,
                Err(_) => break,
            }
        }
        drop(self.lane.take_qp());
        // What was left completes with this, unless the driver failed: then those who wait for messages wait in vain.
        while self.lane.lock().in_flight() > 0 && matches!(queue.dispatch(), Ok(1..)) {}
        let waiting = self.lane.lock().expect_no_more();
        waiting.into_iter().for_each(Waker::wake);
    }

    pub(super) fn counters(&self) -> ConnectionCounters {
        self.lane.lock().counters()
    }

    /// Counts a keep-alive, if nothing happened since `before` and nothing is in flight.
    pub(super) fn count_keep_alive(&self, before: ConnectionCounters) -> bool {
        let mut state = self.lane.lock();
        let is_idle = state.counters() == before && state.sends_in_flight() == 0;
        state.keep_alives += u64::from(is_idle);
        is_idle
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            qp_num: self.qp_num,
            connection: self.counters(),
            errors: self.errors_by_status(),
            queue: self.lane.queue.counters(),
        }
    }

    pub(super) fn errors_by_status(&self) -> Vec<(Status, u64)> {
        self.lane.lock().errors.list()
    }
}

impl<T: Connected> Owner for Link<T> {
    type Transport = T;

    #[inline(always)]
    fn lane(&self) -> &Lane<T> {
        &self.lane
    }

    /// It ends the connection, unless it is a consequence of that.
    fn failed(&self, error: CompletionError) -> OperationError {
        if error.is_flush()
            && let Some(reason) = self.lane.why_ended()
        {
            return reason.into();
        }
        self.lane.end(Ended::Failed(error.clone()));
        error.into()
    }

    fn unreadable(&self, error: &Error) -> OperationError {
        let reason = Ended::Queue { reason: error.to_string() };
        self.lane.end(reason.clone());
        reason.into()
    }
}

impl<T: Connected> Receiver for Link<T> {
    async fn ended(&self) -> OperationError {
        self.lane.until_ended().await.into()
    }
}

/// An RDMA write of no bytes, if that is what `payload` has: it changes nothing at the peer, its key is not looked at (IBTA vol. 1,
/// 9.7.4.1.5).
pub(super) fn write_nowhere<T: Connected>(payload: Payload<'static>) -> WorkRequest<'static, T> {
    WorkRequest::write(payload, RemoteSlice { addr: 0, rkey: 0, len: 0 })
}
