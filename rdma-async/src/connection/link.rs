//! What the handle of a connection and its watcher share: the lane, and why it ended.

use std::time::{Duration, Instant};

use rdma_core::{CompletionError, Error, QueuePair, RemoteSlice, Status, WorkRequest, qp::state::Rts};
use tokio::sync::Notify;

use super::transport::Connected;
use crate::{
    counters::ConnectionCounters,
    error::{Ended, OperationError},
    lane::Lane,
    operate::{Operate, Owner},
    receive::Receiver,
    trace,
};

#[derive(Debug)]
pub(super) struct Link<T: Connected> {
    pub(super) qp_num: u32,
    pub(super) lane: Lane<T>,
    /// Notified when the connection ended.
    end: Notify,
}

impl<T: Connected> Link<T> {
    /// Takes `qp`, whose receives are posted in `lane`.
    pub(super) fn new(qp: QueuePair<T, Rts>, lane: Lane<T>) -> Self {
        let qp_num = qp.num();
        lane.lock().qp = Some(qp);
        Link { qp_num, lane, end: Notify::new() }
    }

    /// Why the connection ended, if it did.
    pub(super) fn why_ended(&self) -> Option<Ended> {
        self.lane.lock().ended.clone()
    }

    /// Waits until the connection ended.
    pub(super) async fn until_ended(&self) -> Ended {
        loop {
            let mut end = std::pin::pin!(self.end.notified());
            end.as_mut().enable();
            if let Some(reason) = self.why_ended() {
                return reason;
            }
            end.await;
        }
    }

    /// Ends the connection: what is in flight is flushed, what is posted later refused. The first reason counts.
    pub(super) fn end(&self, reason: Ended) {
        let mut state = self.lane.lock();
        if state.ended.is_some() {
            return;
        }
        trace::connection_ended(self.qp_num, &reason);
        state.ended = Some(reason);
        if let Some(qp) = &state.qp
            && let Err(error) = qp.abort()
        {
            // The watcher destroys the pair when operations do not end.
            trace::abort_failed(self.qp_num, &error);
        }
        let waiting = state.all_in_line();
        drop(state);
        waiting.into_iter().for_each(std::task::Waker::wake);
        self.end.notify_waiters();
    }

    /// An RDMA write of no bytes: it changes nothing at the peer, its key is not looked at (IBTA vol. 1, 9.7.4.1.5), but on RC it is
    /// acknowledged, and everything posted before it is done when it is.
    pub(super) async fn probe(&self) -> Result<(), OperationError> {
        let nowhere = RemoteSlice { addr: 0, rkey: 0, len: 0 };
        Operate::new(self, usize::MAX, (), move |payload| WorkRequest::write(payload, nowhere)).await.0
    }

    /// Reads completions until everything in flight was flushed; after `limit` destroys the pair, which ends the rest.
    /// The connection has ended.
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
        // What was left completes with this.
        while self.lane.lock().in_flight() > 0 && matches!(queue.dispatch(), Ok(1..)) {}
    }

    pub(super) fn counters(&self) -> ConnectionCounters {
        self.lane.lock().counters
    }

    /// Counts a keep-alive, if nothing happened since `before` and nothing is in flight.
    pub(super) fn count_keep_alive(&self, before: ConnectionCounters) -> bool {
        let mut state = self.lane.lock();
        let is_idle = state.counters == before && state.sends_in_flight() == 0;
        state.counters.keep_alives += u64::from(is_idle);
        is_idle
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
            && let Some(reason) = self.why_ended()
        {
            return reason.into();
        }
        self.end(Ended::Failed(error.clone()));
        error.into()
    }

    fn unreadable(&self, error: &Error) -> OperationError {
        let reason = Ended::Queue { reason: error.to_string() };
        self.end(reason.clone());
        reason.into()
    }
}

impl<T: Connected> Receiver for Link<T> {
    async fn ended(&self) -> OperationError {
        self.until_ended().await.into()
    }
}
