//! Creating queue pairs.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_qp_cap, ibv_qp_init_attr};

use super::QueuePair;
use super::inner::{QpInner, QueuePairCapacity, SharedReceives};
use super::state::Reset;
use super::transport::Transport;
use crate::Error;
use crate::cq::{CompletionQueue, KeptPlaces};
use crate::inflight::{Health, Kind, MAX_DEPTH, WorkQueue};
use crate::pd::ProtectionDomain;
use crate::srq::SharedReceiveQueue;

/// How to make a queue pair; see
/// [`ProtectionDomain::queue_pair`](crate::ProtectionDomain::queue_pair).
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct QueuePairBuilder<'a, T: Transport> {
    pd: &'a ProtectionDomain,
    send_cq: &'a CompletionQueue,
    recv_cq: &'a CompletionQueue,
    srq: Option<&'a SharedReceiveQueue>,
    cap: QueuePairCapacity,
    kept: Option<&'a KeptPlaces>,
    transport: PhantomData<fn() -> T>,
}

impl ProtectionDomain {
    /// Starts a queue pair of transport `T` whose sends complete on `send_cq` and receives on `recv_cq`.
    ///
    /// ```
    /// # use rdma_core::{qp::transport::Rc, CompletionQueue, Error, ProtectionDomain};
    /// # fn f(pd: &ProtectionDomain, cq: &CompletionQueue) -> Result<(), Error> {
    /// let qp = pd.queue_pair::<Rc>(cq, cq).max_send(128).build()?;
    /// # Ok(()) }
    /// ```
    pub fn queue_pair<'a, T: Transport>(
        &'a self,
        send_cq: &'a CompletionQueue,
        recv_cq: &'a CompletionQueue,
    ) -> QueuePairBuilder<'a, T> {
        let cap =
            QueuePairCapacity { max_send: 64, max_recv: 64, max_send_sge: 1, max_recv_sge: 1, max_inline: 0 };
        QueuePairBuilder { pd: self, send_cq, recv_cq, srq: None, cap, kept: None, transport: PhantomData }
    }
}

impl<'a, T: Transport> QueuePairBuilder<'a, T> {
    /// Sends in flight; 64 unless set.
    pub fn max_send(mut self, n: u32) -> Self {
        self.cap.max_send = n;
        self
    }

    /// Receives posted; 64 unless set. Without effect with a shared receive queue.
    pub fn max_recv(mut self, n: u32) -> Self {
        self.cap.max_recv = n;
        self
    }

    /// Entries of a send's scatter/gather list; 1 unless set.
    pub fn max_send_sge(mut self, n: u32) -> Self {
        self.cap.max_send_sge = n;
        self
    }

    /// Entries of a receive's scatter/gather list; 1 unless set.
    pub fn max_recv_sge(mut self, n: u32) -> Self {
        self.cap.max_recv_sge = n;
        self
    }

    /// Bytes that a send can carry inline; 0 unless set.
    pub fn max_inline(mut self, n: u32) -> Self {
        self.cap.max_inline = n;
        self
    }

    /// Keeps a place of the receive completion queue for each receive for as long as the pair lives, or until it is reset with receives in
    /// flight. They are taken out of `places`, which must have as many as [`max_recv`](Self::max_recv). Without it, queue pairs that share a
    /// completion queue which is too small for all of them share its places, too: then the sends of one may leave no place for the
    /// receives of another, which they wait for. Without effect with a shared receive queue, whose pairs do so always.
    pub fn keep_receives(mut self, places: &'a KeptPlaces) -> Self {
        self.kept = Some(places);
        self
    }

    /// Takes receives from `srq`.
    pub fn shared_receive_queue(mut self, srq: &'a SharedReceiveQueue) -> Self {
        self.srq = Some(srq);
        self
    }

    /// Creates it (`man ibv_create_qp`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for objects of different contexts, [`Error::InUse`] when `recv_cq` has no room to reserve the depth of the shared
    /// receive queue, or the places that are to be [kept](Self::keep_receives) are too few, not ready, or of another queue, and what
    /// `ibv_create_qp` says.
    pub fn build(self) -> Result<QueuePair<T, Reset>, Error> {
        let context = &self.pd.inner.context;
        let (send_cq, recv_cq) = (&self.send_cq.inner, &self.recv_cq.inner);
        if !Arc::ptr_eq(context, &send_cq.context) || !Arc::ptr_eq(context, &recv_cq.context) {
            return Err(Error::Invalid {
                what: "the completion queue is of another context than the protection domain".to_owned(),
            });
        }
        let srq = self.srq.map(|srq| Arc::clone(&srq.inner));
        if srq.as_ref().is_some_and(|srq| !Arc::ptr_eq(&srq.pd, &self.pd.inner)) {
            return Err(Error::Invalid {
                what: "the shared receive queue is of another protection domain".to_owned(),
            });
        }
        let too_many = || Error::InUse { what: "all of the context's work queue numbers" };
        let sq_index = context.queues.reserve().ok_or_else(too_many)?;
        let rq_index = context.queues.reserve().ok_or_else(too_many)?;
        let asked = self.cap;
        let kept = self.kept.filter(|_| srq.is_none());
        if kept.is_some_and(|kept| !kept.has(recv_cq, asked.max_recv.min(MAX_DEPTH))) {
            return Err(Error::InUse {
                what: "too many places of the receive completion queue: those that are kept must be ready, and as many as receives",
            });
        }
        let reserved = srq.as_ref().map_or(0, |srq| srq.queue.depth());
        if reserved > 0 && !recv_cq.reserve_credits(reserved) {
            return Err(Error::InUse {
                what: "too many credits of the receive completion queue: it must have room for the shared receive queue's depth",
            });
        }
        let mut attr = ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: send_cq.ptr.as_ptr(),
            recv_cq: recv_cq.ptr.as_ptr(),
            srq: srq.as_ref().map_or(std::ptr::null_mut(), |srq| srq.ptr.as_ptr()),
            cap: ibv_qp_cap {
                max_send_wr: asked.max_send,
                max_recv_wr: if srq.is_some() { 0 } else { asked.max_recv },
                max_send_sge: asked.max_send_sge,
                max_recv_sge: asked.max_recv_sge,
                max_inline_data: asked.max_inline,
            },
            qp_type: T::RAW,
            sq_sig_all: 0,
        };
        // SAFETY: domain, queues and shared queue are live (S-1), the attributes complete.
        let ptr = unsafe { (context.verbs.ibv_create_qp)(self.pd.inner.ptr.as_ptr(), &raw mut attr) };
        let Some(ptr) = NonNull::new(ptr) else {
            let error = Error::last("ibv_create_qp");
            recv_cq.return_credits(reserved);
            return Err(error);
        };
        // What was asked for, or less: a grant of more is of no use, and may be a lie.
        let capacity = QueuePairCapacity {
            max_send: asked.max_send.min(attr.cap.max_send_wr).min(MAX_DEPTH),
            max_recv: if srq.is_some() { 0 } else { asked.max_recv.min(attr.cap.max_recv_wr).min(MAX_DEPTH) },
            max_send_sge: asked.max_send_sge.min(attr.cap.max_send_sge),
            max_recv_sge: asked.max_recv_sge.min(attr.cap.max_recv_sge),
            max_inline: attr.cap.max_inline_data,
        };
        let health = Arc::new(Health::default());
        let queue = |index, kind, depth, sge| WorkQueue::new(index, kind, depth, sge, Arc::clone(&health));
        let sq = queue(sq_index, Kind::Send(Arc::clone(send_cq)), capacity.max_send, capacity.max_send_sge);
        sq.prepay();
        context.queues.insert(&sq);
        let rq = match &srq {
            Some(srq) => Arc::clone(&srq.queue),
            None => {
                let kind = Kind::Recv(Arc::clone(recv_cq));
                let rq = queue(rq_index, kind, capacity.max_recv, capacity.max_recv_sge);
                if kept.is_some_and(|kept| kept.take(capacity.max_recv)) {
                    recv_cq.keep(&rq);
                } else {
                    // Not kept, or taken by another pair meanwhile.
                    rq.prepay();
                }
                context.queues.insert(&rq);
                rq
            }
        };
        // SAFETY: just created.
        let num = unsafe { ptr.as_ref() }.qp_num;
        let inner = Arc::new(QpInner {
            ptr,
            post_send: context.data_path.post_send,
            post_recv: context.data_path.post_recv,
            num,
            capacity,
            sq,
            rq,
            send_cq: Arc::clone(send_cq),
            recv_cq: Arc::clone(recv_cq),
            reserved,
            srq,
            shared: SharedReceives::default(),
            health,
            groups: parking_lot::Mutex::default(),
            windows: parking_lot::Mutex::default(),
            pd: Arc::clone(&self.pd.inner),
        });
        let queue_pair = QueuePair::new(inner);
        context.qps.lock().insert(ptr.addr(), queue_pair.handle());
        Ok(queue_pair)
    }
}
