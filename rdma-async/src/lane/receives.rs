//! The receives that a lane keeps posted, and the messages that arrived.

use std::task::Waker;

use rdma_core::{Buffer, PostErrorKind, RecvRequest};

use super::{Carries, Lane, State};
use crate::{
    error::{Ended, OperationError},
    waiter::IN_A_ROW,
};

/// What is left of receives that were to be posted at once.
#[derive(Default)]
struct NotPosted {
    /// To be dropped outside of the lock.
    requests: Vec<RecvRequest>,
    /// Nobody knows which of the others are posted, until they are flushed.
    unclear: Option<PostErrorKind>,
}

impl<T: Carries> Lane<T> {
    /// Hands out messages that have arrived, in order, at most `limit`, for the price of one lock.
    pub(crate) fn take_many(&self, limit: usize, take: impl FnMut(T::Mail)) {
        // The lock is gone with this statement.
        let NotPosted { requests, unclear } = self.lock().take_all_arrived(self, limit, take);
        drop(requests);
        if let Some(kind) = unclear {
            self.end(Ended::Device { reason: kind.to_string() });
        }
    }
}

impl<T: Carries> State<T> {
    /// The next message. In its place a receive is posted before the message is looked at: the peer may be waiting for that.
    #[inline(always)]
    pub(crate) fn take_arrived(&mut self, lane: &Lane<T>) -> Option<T::Mail> {
        let mail = self.arrived.take()?;
        if !self.more.is_empty() {
            self.arrived = self.more.pop_front();
        }
        self.received += 1;
        if self.post_one(lane) {
            if self.missing > 0 {
                self.refill(lane);
            }
        } else {
            self.missing += 1;
        }
        Some(mail)
    }

    /// Hands out the messages that have arrived, at most `limit` of them; then posts receives in the places of all. Fewer when it is the turn of others.
    fn take_all_arrived(&mut self, lane: &Lane<T>, limit: usize, mut take: impl FnMut(T::Mail)) -> NotPosted {
        let until_turn = self.received.next_multiple_of(IN_A_ROW) - self.received;
        let limit = usize::try_from(until_turn).unwrap_or(usize::MAX).min(limit).min(self.more.len() + 1);
        let Some(first) = self.arrived.take_if(|_| limit > 0) else { return NotPosted::default() };
        take(first);
        self.more.drain(..limit - 1).for_each(take);
        self.arrived = self.more.pop_front();
        self.received += limit as u64;
        self.missing += u32::try_from(limit).unwrap_or(u32::MAX);
        self.refill_at_once(lane)
    }

    /// As `refill`, with one call.
    fn refill_at_once(&mut self, lane: &Lane<T>) -> NotPosted {
        if self.refused.is_some() {
            self.refill(lane);
            return NotPosted::default();
        }
        let Some(qp) = self.qp.as_ref().filter(|_| self.ended.is_none()) else { return NotPosted::default() };
        let mut requests = std::mem::take(&mut self.requests);
        let add = |buffer| requests.push(RecvRequest::new(buffer).id(lane.receive_id()));
        lane.pool.try_acquire_many(self.missing as usize, add);
        let all = requests.len();
        let result = qp.post_recv_batch(&mut requests);
        self.missing -= u32::try_from(all - requests.len()).unwrap_or(0);
        match result {
            Ok(_) => {
                self.requests = requests;
                NotPosted::default()
            }
            Err(kind @ PostErrorKind::Unclear { .. }) => NotPosted { requests, unclear: Some(kind) },
            // What keeps receives from being posted shows when none is left.
            Err(_) => NotPosted { requests, unclear: None },
        }
    }

    #[inline(always)]
    pub(crate) fn has_arrived(&self) -> bool {
        self.arrived.is_some()
    }

    /// Receives posted that have not completed.
    pub(super) fn receives(&self) -> u32 {
        let arrived = u32::from(self.arrived.is_some()) + u32::try_from(self.more.len()).unwrap_or(u32::MAX);
        self.receive_depth.saturating_sub(self.missing).saturating_sub(arrived)
    }

    /// Whether a message arrived, or can still arrive without a buffer being posted.
    #[inline]
    pub(crate) fn expects(&self) -> bool {
        self.missing < self.expected_depth
    }

    /// The queue pair is gone, and what completed was read: nothing arrives any more. Gives those who wait, to be woken.
    pub(crate) fn expect_no_more(&mut self) -> Vec<Waker> {
        self.expected_depth = 0;
        self.receivers.all().collect()
    }

    /// Whether there are receives to post.
    pub(crate) fn is_missing(&self) -> bool {
        self.missing > 0
    }

    /// A receive was posted.
    pub(crate) fn receive_posted(&mut self) {
        self.missing = self.missing.saturating_sub(1);
    }

    /// Posts receives as long as the pool has buffers and the queue room. What keeps a receive from being posted (a credit of a shared
    /// completion queue, the connection's end) shows when none is left.
    #[inline(never)]
    pub(crate) fn refill(&mut self, lane: &Lane<T>) {
        while self.missing > 0 && self.post_one(lane) {
            self.missing -= 1;
        }
    }

    /// Posts a receive with a buffer of the pool, if there is one.
    #[inline(always)]
    fn post_one(&mut self, lane: &Lane<T>) -> bool {
        let Some(qp) = self.qp.as_ref().filter(|_| self.ended.is_none()) else { return false };
        let buffer = if self.refused.is_none() { lane.pool.try_acquire() } else { self.refused.take() };
        let Some(buffer) = buffer else { return false };
        let posted = qp.post_recv(RecvRequest::new(buffer).id(lane.receive_id()));
        posted.map_err(|error| self.keep(error.request)).is_ok()
    }

    /// Keeps the buffer of a receive that was not accepted, the first to be tried again: it cannot be dropped under the lock.
    #[cold]
    fn keep(&mut self, request: RecvRequest) {
        self.refused = request.into_payload().into_buffers().next();
    }

    /// For the place of `post_recv`, and back.
    pub(crate) fn take_refused(&mut self) -> Option<Buffer> {
        self.refused.take()
    }

    pub(crate) fn keep_refused(&mut self, buffer: Option<Buffer>) {
        self.refused = buffer;
    }

    /// Posts a receive.
    pub(crate) fn post_recv(
        &mut self,
        lane: &Lane<T>,
        buffer: Buffer,
    ) -> Result<(), (OperationError, Option<Buffer>)> {
        let Some(qp) = self.qp.as_ref().filter(|_| self.ended.is_none()) else {
            return Err((self.gone(), Some(buffer)));
        };
        match qp.post_recv(RecvRequest::new(buffer).id(lane.receive_id())) {
            Ok(()) => {
                self.receive_posted();
                Ok(())
            }
            Err(error) => Err((error.kind.into(), error.request.into_payload().into_buffers().next())),
        }
    }
}
