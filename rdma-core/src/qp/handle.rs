//! What can be done to a pair that others hold.

use std::sync::{Arc, Weak};

use verbs_sys::{ibv_qp_attr_mask as M, ibv_qp_state};

use super::QueuePair;
use super::inner::QpInner;
use super::state::State;
use super::transport::Transport;
use crate::Error;

/// What the hardware says of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Observed {
    /// It has not failed: the state it was commanded into, by name.
    Ready(&'static str),
    /// SQE: a send failed, receives go on (UC and UD only).
    SendFailed,
    /// ERR.
    Failed,
    /// A value that this library does not know.
    Unknown(u32),
}

impl QpInner {
    pub(crate) fn observe(&self) -> Result<Observed, Error> {
        let state = self.query(M::IBV_QP_STATE)?.qp_state;
        Ok(match state {
            ibv_qp_state::IBV_QPS_RESET => Observed::Ready("RESET"),
            ibv_qp_state::IBV_QPS_INIT => Observed::Ready("INIT"),
            ibv_qp_state::IBV_QPS_RTR => Observed::Ready("RTR"),
            ibv_qp_state::IBV_QPS_RTS => Observed::Ready("RTS"),
            ibv_qp_state::IBV_QPS_SQD => Observed::Ready("SQD"),
            ibv_qp_state::IBV_QPS_SQE => Observed::SendFailed,
            ibv_qp_state::IBV_QPS_ERR => Observed::Failed,
            other => Observed::Unknown(other.0),
        })
    }

    pub(crate) fn abort(&self) -> Result<(), Error> {
        self.command(ibv_qp_state::IBV_QPS_ERR).map_err(|error| Error::verb("ibv_modify_qp", error))
    }
}

impl<T: Transport, S: State> QueuePair<T, S> {
    /// Commands ERR while others hold the pair: everything in flight is flushed, and so is what is posted
    /// later. For deadlines and supervisors; see also [`handle`](QueuePair::handle).
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says.
    pub fn abort(&self) -> Result<(), Error> {
        self.inner.abort()
    }

    /// Asks the hardware which state the pair is in.
    ///
    /// # Errors
    ///
    /// What `ibv_query_qp` says.
    pub fn observe(&self) -> Result<Observed, Error> {
        self.inner.observe()
    }
}

/// A queue pair without its types, for whoever watches over it. It does not keep the pair alive: once it
/// is destroyed, `abort` has nothing to do and `observe` gives `None`.
#[derive(Debug, Clone)]
pub struct QueuePairHandle {
    inner: Weak<QpInner>,
    num: u32,
}

impl QueuePairHandle {
    pub(crate) fn new(inner: &Arc<QpInner>) -> QueuePairHandle {
        QueuePairHandle { inner: Arc::downgrade(inner), num: inner.num }
    }

    /// The device has given back the last receive that the pair took from its shared queue.
    pub(crate) fn note_last_receive(&self) {
        if let Some(inner) = self.inner.upgrade() {
            inner.shared.clear();
        }
    }

    /// The pair's number.
    #[must_use]
    pub fn num(&self) -> u32 {
        self.num
    }

    /// Commands ERR; see [`QueuePair::abort`].
    ///
    /// # Errors
    ///
    /// What `ibv_modify_qp` says.
    pub fn abort(&self) -> Result<(), Error> {
        self.inner.upgrade().map_or(Ok(()), |inner| inner.abort())
    }

    /// Which state the hardware says it is in; `None` when it is destroyed.
    ///
    /// # Errors
    ///
    /// What `ibv_query_qp` says.
    pub fn observe(&self) -> Result<Option<Observed>, Error> {
        self.inner.upgrade().map(|inner| inner.observe()).transpose()
    }
}
