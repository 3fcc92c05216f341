//! Queue pairs: the state machine in the types.
//!
//! # The states
//!
//! A queue pair is a send queue and a receive queue, driven by its owner through the states of IBTA vol. 1,
//! 10.3.1. Here they are types: a [`QueuePair`] has its transport and its state as parameters, each step consumes
//! the pair and gives it back in the next state, and what a state does not allow is no method of it.
//!
//! ```text
//!             init            rtr              rts
//!   RESET ----------> INIT ----------> RTR ----------> RTS <----------.
//!     ^                 |                |              |  \           | resume
//!     |                 |                |          sqd |   \          |
//!     |                 |                |              v    \         |
//!     |                 |                |             SQD ---+------->|
//!     |                 |                |                     \       |
//!     |                 |                |   a send failed      v      |
//!     |                 |                |   (UC, UD)         SQE -----'
//!     |                 |                |                      |
//!     |                 '------- fail, drain, abort ------------'   or the hardware, at any time
//!     |                                  |
//!     |              reset               v
//!     '------------------------------- ERR
//! ```
//!
//! | state | receives may be posted | sends may be posted | packets |
//! |---|---|---|---|
//! | [`Reset`](state::Reset) | no | no | dropped |
//! | [`Init`](state::Init) | yes | no | dropped |
//! | [`Rtr`](state::Rtr) | yes | no | taken and answered |
//! | [`Rts`](state::Rts) | yes | yes | taken and sent |
//! | [`Sqd`](state::Sqd) | yes | no | taken; sends begun are finished |
//! | [`Sqe`](state::Sqe) | yes | no | taken; sends are flushed (UC and UD only) |
//! | [`Errored`](state::Errored) | no | no | dropped; what was posted completes as flushed |
//!
//! # The steps
//!
//! Each needs its own attributes, which differ by transport ([`transport`]): a structure per step, complete, so that none
//! is forgotten and none is given that does not apply. Step by step, on UD:
//!
//! ```
//! # use rdma_core::{Error, QueuePair};
//! # use rdma_core::qp::{state::{Reset, Rts}, transport::{Ud, UdInit, UdRtr, UdRts}};
//! fn ready(pair: QueuePair<Ud, Reset>) -> Result<QueuePair<Ud, Rts>, Error> {
//!     let pair = pair.init(&UdInit { port: 1, pkey_index: 0, qkey: 0x1ee7 })?;
//!     let pair = pair.rtr(&UdRtr {})?;
//!     Ok(pair.rts(&UdRts { sq_psn: 0 })?)
//! }
//! ```
//!
//! RC and UC have a peer. Each side makes an [`Endpoint`], tells it to the other by whatever means there are, and `connect`
//! does the rest:
//!
//! ```
//! # use rdma_core::{ConnectOptions, Endpoint, EndpointOptions, Error, QueuePair};
//! # use rdma_core::qp::{state::{Reset, Rts}, transport::Rc};
//! fn connect(
//!     pair: QueuePair<Rc, Reset>,
//!     exchange: impl FnOnce(Endpoint) -> Endpoint,
//! ) -> Result<QueuePair<Rc, Rts>, Error> {
//!     let local = pair.endpoint(&EndpointOptions::default())?;
//!     let remote = exchange(local);
//!     Ok(pair.connect(&local, &remote, &ConnectOptions::default())?)
//! }
//! ```
//!
//! A step can fail for reasons that pass (the peer's address is not resolved yet): [`TransitionError`] gives the pair back.
//! Skipping one does not compile:
//!
//! ```compile_fail
//! # use rdma_core::{Error, QueuePair};
//! # use rdma_core::qp::{state::{Init, Rts}, transport::{Ud, UdRts}};
//! fn skip(pair: QueuePair<Ud, Init>) -> Result<QueuePair<Ud, Rts>, Error> {
//!     Ok(pair.rts(&UdRts { sq_psn: 0 })?) // a queue pair in state `Init` cannot go to RTS
//! }
//! ```
//!
//! # What a type cannot know
//!
//! The type is the state last *commanded*. A device moves a pair to ERR by itself: a peer that does not answer, a request that
//! must not be, an [`abort`](QueuePair::abort) through a [handle](QueuePairHandle). So nothing that matters for memory rests on the type:
//! posting to a pair that has failed works, and the work request completes as flushed.
//! [`observe`](QueuePair::observe) asks the hardware; [`first_error`](QueuePair::first_error) says what went wrong before the flushes.
//!
//! # The end
//!
//! [`drain`](QueuePair::drain) commands ERR and waits until all that was posted has completed; [`reset`](QueuePair::reset)
//! goes on to RESET, for another life. Dropping a pair destroys it: what is in flight then completes as flushed, whether or not
//! the peer has it; unsignalled sends, too, of which the device had not said that they succeeded. Drain first where that matters.

mod any;
mod bind;
mod builder;
mod chain;
mod connect;
mod drain;
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
#[cfg(doctest)]
mod typestate;

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

    /// Posts receives as one chain, with one call, in order. Those that were posted are taken out of the front of `requests`; what is
    /// left was not posted. Gives how many were.
    ///
    /// # Errors
    ///
    /// Why the first that is left in `requests` could not be posted; those before it were. [`PostErrorKind::Unclear`]: some of those that are
    /// not left were not posted either.
    pub fn post_recv_batch(&self, requests: &mut Vec<RecvRequest>) -> Result<usize, PostErrorKind>
    where
        S: CanRecv,
    {
        let (done, refusal) = self.inner.post_recv_chain(requests);
        requests.drain(..done).for_each(RecvRequest::drop_posted);
        refusal.map_or(Ok(done), Err)
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
    /// Why the first that is left in `requests` could not be posted; those before it were. [`PostErrorKind::Unclear`]: some of those that are
    /// not left were not posted either.
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
    /// Why the first that is left in `requests` could not be posted; those before it were. [`PostErrorKind::Unclear`]: some of those that are
    /// not left were not posted either.
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
    requests.drain(..done).for_each(WorkRequest::drop_posted);
    refusal.map_or(Ok(done), Err)
}
