//! Queue pairs: the state machine in the types.

mod any;
mod bind;
mod builder;
mod chain;
mod connect;
mod handle;
mod inner;
mod post;
mod query;
mod recv;
mod refusal;
mod request;
mod split;
pub mod state;
mod transition;
pub mod transport;

use std::marker::PhantomData;
use std::sync::Arc;

pub use any::AnyQueuePair;
pub use builder::QueuePairBuilder;
pub(crate) use chain::Link;
pub use connect::{ConnectOptions, Endpoint, EndpointOptions};
pub use handle::{Observed, QueuePairHandle};
pub(crate) use inner::QpInner;
pub use inner::QueuePairCapacity;
pub use query::QueuePairAttributes;
pub(crate) use recv::{RecvTarget, post_recv};
pub use refusal::{PostError, PostErrorKind};
pub use request::{Payload, RecvRequest, WorkRequest};
pub use split::{RecvHalf, SendHalf};
pub use transition::TransitionError;

use crate::cq::Status;
use crate::inflight::{Operation, QueueRef, WorkQueue};
use state::{CanRecv, CanSend, State};
use transport::Transport;

/// A queue pair of transport `T` in state `S` (`man ibv_create_qp`).
///
/// The state is the one last *commanded*. The hardware may have moved to ERR since: posting then still
/// works and completes with a flush error; [`observe`](QueuePair::observe) tells.
///
/// Dropping it destroys the pair. What is in flight then is completed as flushed: operations
/// finish, completions of `post_*` can still be polled.
pub struct QueuePair<T: Transport, S: State> {
    pub(crate) inner: Arc<QpInner>,
    marker: PhantomData<fn() -> (T, S)>,
}

impl<T: Transport, S: State> QueuePair<T, S> {
    pub(crate) fn new(inner: Arc<QpInner>) -> QueuePair<T, S> {
        QueuePair { inner, marker: PhantomData }
    }

    /// The number that peers address it by, 24 bits.
    #[must_use]
    pub fn num(&self) -> u32 {
        self.inner.num
    }

    /// What it was granted.
    #[must_use]
    pub fn capacity(&self) -> QueuePairCapacity {
        self.inner.capacity
    }

    /// A handle without types, for supervisors: it can abort and observe, and does not keep the pair alive.
    #[must_use]
    pub fn handle(&self) -> QueuePairHandle {
        QueuePairHandle::new(&self.inner)
    }

    /// The status of the first completion that failed by itself, since the last reset.
    #[must_use]
    pub fn first_error(&self) -> Option<Status> {
        self.inner.health.first().map(|(status, _)| Status(status))
    }

    /// The send queue's in-flight table.
    #[must_use]
    pub fn send_queue(&self) -> &Arc<WorkQueue> {
        &self.inner.sq
    }

    /// The receive queue's in-flight table: the shared one's, where the pair has that.
    #[must_use]
    pub fn recv_queue(&self) -> &Arc<WorkQueue> {
        &self.inner.rq
    }

    /// Posts a receive; its completion goes to [`CompletionQueue::poll`](crate::CompletionQueue::poll).
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    #[inline]
    pub fn post_recv(&self, request: impl Into<RecvRequest>) -> Result<(), PostError<RecvRequest>>
    where
        S: CanRecv,
    {
        self.inner.post_recv(request.into(), false).map(drop)
    }

    /// Posts a receive that an [`Operation`] owns.
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    #[inline]
    pub fn start_recv(
        &self,
        request: impl Into<RecvRequest>,
    ) -> Result<Operation<QueueRef<'_>>, PostError<RecvRequest>>
    where
        S: CanRecv,
    {
        let slot = self.inner.post_recv(request.into(), true)?;
        // SAFETY: just published as owned in this queue.
        Ok(unsafe { Operation::new(QueueRef(&self.inner.rq), slot) })
    }

    /// Posts a work request; its completion goes to
    /// [`CompletionQueue::poll`](crate::CompletionQueue::poll).
    ///
    /// ```
    /// # use rdma_core::{qp::{state::Rts, transport::Rc}, Buffer, QueuePair, WorkRequest};
    /// # fn f(qp: &QueuePair<Rc, Rts>, buffer: Buffer, other: Buffer) -> Result<(), rdma_core::Error> {
    /// qp.post_send(buffer)?; // a SEND
    /// qp.post_send(WorkRequest::send_with_imm(other, 7).id(1).solicited())?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    #[inline]
    pub fn post_send<'d>(
        &self,
        request: impl Into<WorkRequest<'d, T>>,
    ) -> Result<(), PostError<WorkRequest<'d, T>>>
    where
        S: CanSend,
    {
        self.inner.post_send(request.into(), false).map(drop)
    }

    /// Posts a work request that an [`Operation`] owns.
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    #[inline]
    pub fn start_send<'d>(
        &self,
        request: impl Into<WorkRequest<'d, T>>,
    ) -> Result<Operation<QueueRef<'_>>, PostError<WorkRequest<'d, T>>>
    where
        S: CanSend,
    {
        let slot = self.inner.post_send(request.into(), true)?;
        // SAFETY: just published as owned in this queue.
        Ok(unsafe { Operation::new(QueueRef(&self.inner.sq), slot) })
    }

    /// Posts work requests as one chain, with one doorbell, in order. Those that were posted are taken out
    /// of the front of `requests`; what is left was not posted. Gives how many were.
    ///
    /// An empty batch posts nothing.
    ///
    /// # Errors
    ///
    /// Why the first that is left in `requests` could not be posted; those before it were.
    pub fn post_batch(&self, requests: &mut Vec<WorkRequest<'_, T>>) -> Result<usize, PostErrorKind>
    where
        S: CanSend,
    {
        batch(&self.inner, requests, false, |_| ())
    }

    /// As [`post_batch`](QueuePair::post_batch), with an [`Operation`] for each, added to `operations`.
    ///
    /// # Errors
    ///
    /// Why the first that is left in `requests` could not be posted; those before it were.
    pub fn start_batch<'q>(
        &'q self,
        requests: &mut Vec<WorkRequest<'_, T>>,
        operations: &mut Vec<Operation<QueueRef<'q>>>,
    ) -> Result<usize, PostErrorKind>
    where
        S: CanSend,
    {
        let queue = QueueRef(&self.inner.sq);
        // SAFETY: each slot was just published as owned in this queue.
        batch(&self.inner, requests, true, |slot| operations.push(unsafe { Operation::new(queue, slot) }))
    }
}

impl<T: Transport, S: State> std::fmt::Debug for QueuePair<T, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("num", &self.inner.num)
            .field("transport", &T::NAME)
            .field("state", &S::NAME)
            .finish_non_exhaustive()
    }
}

/// Posts a batch and takes what was posted out of it.
fn batch<T: Transport>(
    inner: &QpInner,
    requests: &mut Vec<WorkRequest<'_, T>>,
    owned: bool,
    posted: impl FnMut(u32),
) -> Result<usize, PostErrorKind> {
    let (done, refusal) = inner.post_chain(requests, owned, posted);
    requests.drain(..done);
    match refusal {
        None => Ok(done),
        Some(kind) => Err(kind),
    }
}
