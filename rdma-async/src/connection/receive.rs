//! The receives of a connection: kept posted, handed out in order.

use std::{
    collections::VecDeque,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll},
};

use rdma_core::{
    Error, PostErrorKind, QueuePair,
    inflight::{Finished, Operation},
    qp::state::Init,
};

use super::{check, link::Link, transport::Connected};
use crate::{
    error::{Ended, OperationError},
    message::Message,
    pool::BufferPool,
    queue::Waiter,
};

/// Receives in the order of posting, which is the order in which messages arrive: a connected transport completes its
/// receive queue in order (IBTA vol. 1, 10.8.3.3).
///
/// The future that waits does so on the first one, under an asynchronous lock, and takes it out only when it completed:
/// a dropped future leaves everything as it was.
#[derive(Debug)]
pub(super) struct Receives {
    /// `None` only while the first one is being taken.
    posted: VecDeque<Option<Operation>>,
}

impl Receives {
    /// As many receives as the queue takes and the pool has buffers.
    pub(super) fn new<T: Connected>(pair: &QueuePair<T, Init>, pool: &BufferPool) -> Result<Self, Error> {
        let depth = pair.capacity().max_recv as usize;
        let mut posted = VecDeque::with_capacity(depth);
        while posted.len() < depth {
            let Some(buffer) = pool.try_acquire() else { break };
            match pair.start_recv(buffer) {
                Ok(operation) => posted.push_back(Some(operation.detach())),
                Err(error) if error.kind == PostErrorKind::QueueFull => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Receives { posted })
    }

    /// Posts receives as long as the pool has buffers and the queue room.
    pub(super) fn refill<T: Connected>(&mut self, link: &Link<T>) -> Result<(), OperationError> {
        while self.posted.len() < link.receive_depth {
            let Some(buffer) = link.pool.try_acquire() else { break };
            match link.start_recv(buffer) {
                Ok(operation) => self.posted.push_back(Some(operation)),
                // The slot of a receive that completed a moment ago, or a credit of a shared completion queue.
                Err(OperationError::Post(PostErrorKind::QueueFull)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn poll_first(&mut self, cx: Option<&mut Context<'_>>) -> Poll<Finished> {
        let Some(first) = self.posted.front_mut() else { return Poll::Pending };
        let finished = check(first, cx);
        if finished.is_ready() {
            self.posted.pop_front();
        }
        finished
    }
}

/// The next message. Cancel safe: whatever a dropped call took out of the pool goes back.
pub(super) async fn next<T: Connected>(link: &Link<T>) -> Result<Message, OperationError> {
    let mut receives = match link.receives.try_lock() {
        Ok(receives) => receives,
        // Others wait for messages too: they are served in the order of asking.
        Err(_) => link.receives.lock().await,
    };
    if receives.posted.is_empty() {
        // Every buffer of the pool is elsewhere, or the connection ended. Wait for one to come back.
        let buffer = tokio::select! {
            biased;
            ended = link.ended() => return Err(ended.into()),
            buffer = link.pool.acquire() => buffer,
        };
        let operation = link.start_recv(buffer)?;
        receives.posted.push_back(Some(operation));
    }
    let mut waiter = Waiter::new(&link.queue.shared);
    let finished = std::future::poll_fn(|cx| waiter.poll(cx, |cx| receives.poll_first(cx))).await;
    let finished = finished.map_err(|error| link.fail_queue(&error))?;
    // The next receive is posted before this message is looked at: the peer may be waiting for it. Should that fail, the
    // next call says so: this one has a message to deliver.
    let _ = receives.refill(link);
    drop(receives);
    message(link, finished)
}

fn message<T: Connected>(link: &Link<T>, finished: Finished) -> Result<Message, OperationError> {
    let (imm, written) = match finished.result() {
        Ok(success) => (success.imm(), success.is_write_with_imm().then(|| success.len())),
        Err(error) => return Err(link.fail(error)),
    };
    let Some(mut buffer) = finished.into_buffer() else {
        // Receives are posted with a buffer each, so a completion without one is not ours.
        return Err(OperationError::Ended(Ended::Closed));
    };
    if written.is_some() {
        buffer.truncate(0);
    }
    link.counters.received.fetch_add(1, Relaxed);
    Ok(Message { buffer, imm, written })
}
