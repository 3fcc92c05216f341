//! The end of a pair's work: everything that was posted completes.

use std::time::{Duration, Instant};

use verbs_sys::{ibv_qp_attr_mask as M, ibv_qp_state, ibv_qp_type};

use super::inner::QpInner;
use super::post::SIGNALED;
use super::request::{Action, Payload, WorkRequest};
use super::state::{Errored, Reset, State};
use super::transition::{TransitionError, explain};
use super::transport::Transport;
use super::{PostErrorKind, QueuePair};
use crate::Error;
use crate::ah::{AddressHandle, AddressVector, GlobalRoute};
use crate::context::Context;
use crate::inflight::{Operation, QueueRef};
use crate::pd::ProtectionDomain;

impl<T: Transport, S: State> QueuePair<T, S> {
    /// Commands ERR and polls until everything in flight has completed, at most `limit`. Completions of
    /// `post_*` stay for [`CompletionQueue::poll`](crate::CompletionQueue::poll).
    ///
    /// Unsignalled sends that succeeded are told apart from those that were flushed: a signalled one is posted
    /// behind them, which never leaves the queue.
    ///
    /// A pair with a shared receive queue waits for the device's word that it has given back the last receive it took
    /// ([`LastWqeReached`](crate::EventKind::LastWqeReached)). Other events that come meanwhile are kept for
    /// [`AsyncEvents::next_event`](crate::AsyncEvents::next_event). A device that does not give its word within `limit` costs that time,
    /// but is no error: receives that never complete are freed with the shared queue.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, a poll that failed, [`Error::TimedOut`], each with the pair; except for the first the
    /// pair is in ERR whatever its type says.
    pub fn drain(self, limit: Duration) -> Result<QueuePair<T, Errored>, TransitionError<Self>> {
        if let Err(error) = self.inner.command(ibv_qp_state::IBV_QPS_ERR) {
            return Err(TransitionError { error: explain(S::NAME, Errored::NAME, error), queue_pair: self });
        }
        match self.inner.wait_idle::<T>(limit) {
            Ok(()) => Ok(QueuePair::new(self.inner)),
            Err(error) => Err(TransitionError { error, queue_pair: self }),
        }
    }

    /// Back to RESET, by way of ERR so that everything in flight completes (a bare reset drops work
    /// requests without completions). Waits at most `limit` for the flush, as [`drain`](QueuePair::drain) does; what has not come
    /// by then is completed as flushed once the reset succeeded.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair, which is in ERR then.
    pub fn reset(self, limit: Duration) -> Result<QueuePair<T, Reset>, TransitionError<Self>> {
        let to_error = self.inner.command(ibv_qp_state::IBV_QPS_ERR);
        if to_error.is_ok() {
            match self.inner.wait_idle::<T>(limit) {
                Ok(()) | Err(Error::TimedOut { .. }) => {}
                Err(error) => return Err(TransitionError { error, queue_pair: self }),
            }
        }
        if let Err(error) = self.inner.command(ibv_qp_state::IBV_QPS_RESET) {
            return Err(TransitionError { error: explain(S::NAME, Reset::NAME, error), queue_pair: self });
        }
        self.inner.reclaim(false);
        self.inner.health.clear();
        self.inner.shared.clear();
        Ok(QueuePair::new(self.inner))
    }
}

impl QpInner {
    /// Polls until nothing of a pair in ERR is in flight.
    fn wait_idle<T: Transport>(&self, limit: Duration) -> Result<(), Error> {
        let start = Instant::now();
        let (mut marked, mut fewest) = (false, u32::MAX);
        loop {
            let given_back = self.has_given_back();
            let polled = self.send_cq.dispatch()? + self.recv_cq.dispatch()?;
            marked = marked || self.mark_end::<T>();
            let busy = self.sq.in_flight() + if self.srq.is_none() { self.rq.in_flight() } else { 0 };
            // Completions of receives are in the queue before the device's word that they were the last.
            if busy == 0 && given_back && polled == 0 {
                return Ok(());
            }
            if start.elapsed() >= limit && busy >= fewest {
                if busy == 0 {
                    tracing::warn!(
                        qp_num = self.num,
                        "the device did not say that it gave back the last shared receive"
                    );
                    return Ok(());
                }
                return Err(Error::TimedOut { what: "the flush of what was in flight", limit });
            }
            fewest = fewest.min(busy);
            if polled == 0 {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the device holds no more receives of the shared queue for this pair, as far as it says.
    fn has_given_back(&self) -> bool {
        if !self.shared.is_awaited() {
            return true;
        }
        let context = Context { inner: std::sync::Arc::clone(&self.pd.context) };
        if let Err(error) = context.events().and_then(|events| events.pump()) {
            tracing::warn!(%error, "the device's events cannot be read");
        }
        !self.shared.is_awaited()
    }

    /// Ends a run of unsignalled sends: behind them, posts a signalled one, which a pair in ERR flushes. It completes
    /// after them, so those that did not fail by then have succeeded. False when there is no room yet.
    fn mark_end<T: Transport>(&self) -> bool {
        if self.sq.lock_post().unsignaled() == 0 {
            return true;
        }
        let mut request = WorkRequest::<T>::of_parts(0, Action::Send, SIGNALED, Payload::empty());
        if T::RAW == ibv_qp_type::IBV_QPT_UD {
            // Providers look at the address when a request is posted.
            match self.own_address() {
                Ok(address) => {
                    request.action = Action::SendTo { address, qp_num: self.num, qkey: 0, imm: None }
                }
                Err(error) => {
                    tracing::debug!(%error, "unsignalled sends may be reported as flushed");
                    return true;
                }
            }
        }
        let mut slot = None;
        let (_, refusal) = self.post_chain(&mut [request], true, |posted| slot = Some(posted));
        if let Some(slot) = slot {
            // SAFETY: just published as owned in this queue. Dropped: nobody waits for this one.
            drop(unsafe { Operation::new(QueueRef(&self.sq), slot) });
        }
        match refusal {
            Some(PostErrorKind::QueueFull) => false,
            Some(error) => {
                tracing::debug!(%error, "unsignalled sends may be reported as flushed");
                true
            }
            None => true,
        }
    }

    /// The address of the pair's own port.
    fn own_address(&self) -> Result<AddressHandle, Error> {
        let context = Context { inner: std::sync::Arc::clone(&self.pd.context) };
        let number = self.query(M::IBV_QP_PORT)?.port_num;
        let port = context.port(number)?;
        let vector = if port.needs_gid() {
            let chosen = context.choose_gid(number)?.entry;
            AddressVector::global(
                number,
                GlobalRoute::new(chosen.gid, u8::try_from(chosen.index).unwrap_or(0)),
            )
        } else {
            AddressVector::local(number, port.lid)
        };
        ProtectionDomain { inner: std::sync::Arc::clone(&self.pd) }.address_handle(&vector)
    }
}
