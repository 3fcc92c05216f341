//! Transitions: each consumes the pair and gives it back in the next state, or as it was.

use std::fmt;

use verbs_sys::{ibv_qp_attr_mask as M, ibv_qp_state};

use super::QueuePair;
use super::inner::raw_attr;
use super::state::{CanInit, CanRtr, CanRts, Errored, Init, Rtr, Rts, Sqd, Sqe, State};
use super::transport::sealed::Fill;
use super::transport::{SendQueueError, Transport};
use crate::Error;

/// A transition failed; the pair is as it was, for another attempt.
pub struct TransitionError<Q> {
    /// Why.
    pub error: Error,
    /// The pair, in the state it was in.
    pub queue_pair: Q,
}

impl<Q> fmt::Debug for TransitionError<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TransitionError").field(&self.error).finish()
    }
}

impl<Q> fmt::Display for TransitionError<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<Q> std::error::Error for TransitionError<Q> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl<Q> From<TransitionError<Q>> for Error {
    fn from(error: TransitionError<Q>) -> Error {
        error.error
    }
}

/// What `ibv_modify_qp` may mean by an errno on the way from one state to another.
pub(super) fn explain(from: &str, to: &str, error: std::io::Error) -> Error {
    let code = error.raw_os_error().unwrap_or(0);
    let hint = match (to, code) {
        ("INIT", libc::EINVAL) => "the port does not exist, or the P_Key index is outside its table",
        ("RTR", libc::EINVAL) => {
            "look at the own GID index (does it exist, is it of the peer's type?), the path MTU (at most the port's active MTU), the port, and max_dest_rd_atomic (at most the device's max_qp_rd_atom)"
        }
        ("RTR", libc::ETIMEDOUT | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL) => {
            "the peer's GID could not be resolved to an address on the network: is the peer up, is the GID right, is there a route? Trying again may work"
        }
        ("RTS", libc::EINVAL) => {
            "max_rd_atomic is above the device's max_qp_init_rd_atom, or a timer or retry count is out of range"
        }
        (_, libc::EINVAL) => "the pair may have left the state it was last commanded into: observe it",
        _ => "",
    };
    match Error::verb("ibv_modify_qp", error) {
        Error::Verb { verb, source, mut advice } => {
            advice.push_str(&format!("; on the way from {from} to {to}"));
            if !hint.is_empty() {
                advice.push_str(": ");
                advice.push_str(hint);
            }
            Error::Verb { verb, source, advice }
        }
        error => error,
    }
}

impl<T: Transport, S: State> QueuePair<T, S> {
    fn step<N: State>(
        self,
        to: ibv_qp_state,
        attributes: &impl Fill,
        extra: M,
    ) -> Result<QueuePair<T, N>, TransitionError<Self>> {
        let mut attr = raw_attr();
        let mask = attributes.fill(&mut attr);
        attr.qp_state = to;
        match self.inner.modify(&mut attr, M(M::IBV_QP_STATE.0 | mask.0 | extra.0)) {
            Ok(()) => Ok(QueuePair::new(self.inner)),
            Err(error) => Err(TransitionError { error: explain(S::NAME, N::NAME, error), queue_pair: self }),
        }
    }

    /// Commands ERR: everything in flight is flushed.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair.
    pub fn fail(self) -> Result<QueuePair<T, Errored>, TransitionError<Self>> {
        self.step(ibv_qp_state::IBV_QPS_ERR, &Nothing, M(0))
    }
}

/// A step without attributes of its own.
struct Nothing;

impl Fill for Nothing {
    fn fill(&self, _: &mut verbs_sys::ibv_qp_attr) -> M {
        M(0)
    }
}

/// To SQD: with an event when the queue has drained.
struct Drained;

impl Fill for Drained {
    fn fill(&self, attr: &mut verbs_sys::ibv_qp_attr) -> M {
        attr.en_sqd_async_notify = 1;
        M::IBV_QP_EN_SQD_ASYNC_NOTIFY
    }
}

impl<T: Transport, S: State> QueuePair<T, S> {
    /// RESET to INIT: receives can be posted from then on.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair.
    pub fn init(self, attributes: &T::Init) -> Result<QueuePair<T, Init>, TransitionError<Self>>
    where
        S: CanInit,
    {
        self.step(ibv_qp_state::IBV_QPS_INIT, attributes, M(0))
    }

    /// INIT to RTR: packets of the peer are taken from then on.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair: `ETIMEDOUT` when the peer's address is not resolved in
    /// time, and then another attempt is worth it.
    pub fn rtr(self, attributes: &T::Rtr) -> Result<QueuePair<T, Rtr>, TransitionError<Self>>
    where
        S: CanRtr,
    {
        let pair = self.step(ibv_qp_state::IBV_QPS_RTR, attributes, M(0))?;
        pair.inner.shared.take_from(pair.inner.srq.is_some());
        Ok(pair)
    }

    /// RTR to RTS: sends can be posted from then on.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair.
    pub fn rts(self, attributes: &T::Rts) -> Result<QueuePair<T, Rts>, TransitionError<Self>>
    where
        S: CanRts,
    {
        self.step(ibv_qp_state::IBV_QPS_RTS, attributes, M(0))
    }
}

impl<T: Transport> QueuePair<T, Rts> {
    /// RTS to SQD: sends in flight finish, later ones wait. When the last has finished the device reports
    /// `SendQueueDrained`.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair; not every provider has SQD.
    pub fn sqd(self) -> Result<QueuePair<T, Sqd>, TransitionError<Self>> {
        self.step(ibv_qp_state::IBV_QPS_SQD, &Drained, M(0))
    }
}

impl<T: Transport> QueuePair<T, Sqd> {
    /// SQD to RTS.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair.
    pub fn resume(self) -> Result<QueuePair<T, Rts>, TransitionError<Self>> {
        self.step(ibv_qp_state::IBV_QPS_RTS, &Nothing, M(0))
    }
}

impl<T: Transport> QueuePair<T, Rts> {
    /// Takes note that a failed send moved the pair to SQE: receives go on, sends are flushed.
    /// [`observe`](QueuePair::observe) says whether it is there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the pair is not in SQE; what `ibv_query_qp` says; with the pair.
    pub fn send_failed(self) -> Result<QueuePair<T, Sqe>, TransitionError<Self>>
    where
        T: SendQueueError,
    {
        let error = match self.inner.query(M::IBV_QP_STATE) {
            Ok(attr) if attr.qp_state == ibv_qp_state::IBV_QPS_SQE => return Ok(QueuePair::new(self.inner)),
            Ok(attr) => {
                Error::Invalid { what: format!("the queue pair is not in SQE but in {:?}", attr.qp_state) }
            }
            Err(error) => error,
        };
        Err(TransitionError { error, queue_pair: self })
    }
}

impl<T: SendQueueError> QueuePair<T, Sqe> {
    /// SQE back to RTS.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says, with the pair.
    pub fn resume(self) -> Result<QueuePair<T, Rts>, TransitionError<Self>> {
        self.step(ibv_qp_state::IBV_QPS_RTS, &Nothing, M(0))
    }
}
