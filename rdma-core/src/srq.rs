//! Shared receive queues.

use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_srq, ibv_srq_attr, ibv_srq_attr_mask, ibv_srq_init_attr};

use crate::inflight::{Health, Kind, MAX_DEPTH, Operation, QueueRef, WorkQueue};
use crate::pd::{PdInner, ProtectionDomain};
use crate::qp::{PostError, RecvRequest, RecvTarget, post_recv};
use crate::{Error, leak};

/// A live shared receive queue.
#[derive(Debug)]
pub(crate) struct SrqInner {
    pub(crate) ptr: NonNull<ibv_srq>,
    pub(crate) queue: Arc<WorkQueue>,
    pub(crate) pd: Arc<PdInner>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for SrqInner {}
// SAFETY: as above.
unsafe impl Sync for SrqInner {}

impl Drop for SrqInner {
    fn drop(&mut self) {
        let context = &self.pd.context;
        context.srqs.lock().remove(&self.ptr.addr());
        // SAFETY: created once, destroyed once; its queue pairs hold an Arc (S-1).
        let code = unsafe { (context.verbs.ibv_destroy_srq)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_destroy_srq", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.queue));
            std::mem::forget(Arc::clone(&self.pd));
            return;
        }
        context.queues.remove(&self.queue);
        context.queues.synchronize();
        self.queue.discard_all();
    }
}

/// A shared receive queue (`man ibv_create_srq`): receives that any of its queue pairs may take.
///
/// Every pair reserves its whole depth on the pair's receive completion queue. Receives that a pair
/// had taken when it was destroyed may never complete; they are freed with the queue. Cloning gives
/// another handle to the same queue.
#[derive(Debug, Clone)]
pub struct SharedReceiveQueue {
    pub(crate) inner: Arc<SrqInner>,
}

impl ProtectionDomain {
    /// Creates a shared receive queue for `depth` receives of at most `max_sge` entries each.
    ///
    /// # Errors
    ///
    /// What `ibv_create_srq` says.
    pub fn shared_receive_queue(&self, depth: u32, max_sge: u32) -> Result<SharedReceiveQueue, Error> {
        let context = &self.inner.context;
        let index = context
            .queues
            .reserve()
            .ok_or(Error::InUse { what: "all of the context's work queue numbers" })?;
        let mut attr = ibv_srq_init_attr {
            srq_context: std::ptr::null_mut(),
            attr: ibv_srq_attr { max_wr: depth, max_sge, srq_limit: 0 },
        };
        // SAFETY: the domain is live (S-1), the attributes are complete.
        let ptr = unsafe { (context.verbs.ibv_create_srq)(self.inner.ptr.as_ptr(), &raw mut attr) };
        let ptr = NonNull::new(ptr).ok_or_else(|| Error::last("ibv_create_srq"))?;
        // What was asked for, or less: a grant of more is of no use, and may be a lie.
        let depth = depth.min(attr.attr.max_wr).min(MAX_DEPTH);
        let max_sge = max_sge.min(attr.attr.max_sge);
        let queue = WorkQueue::new(index, Kind::Shared, depth, max_sge, Arc::new(Health::default()));
        context.queues.insert(&queue);
        let inner = Arc::new(SrqInner { ptr, queue, pd: Arc::clone(&self.inner) });
        context.srqs.lock().insert(ptr.addr(), Arc::downgrade(&inner));
        Ok(SharedReceiveQueue { inner })
    }
}

impl SharedReceiveQueue {
    /// Receives it holds.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.inner.queue.depth()
    }

    /// Its in-flight table.
    #[must_use]
    pub fn work_queue(&self) -> &Arc<WorkQueue> {
        &self.inner.queue
    }

    /// Posts a receive; its completion goes to
    /// [`CompletionQueue::poll`](crate::CompletionQueue::poll) of the pair that took it.
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    pub fn post_recv(&self, request: impl Into<RecvRequest>) -> Result<(), PostError<RecvRequest>> {
        self.post(request.into(), false).map(drop)
    }

    /// Posts a receive that an [`Operation`] owns.
    ///
    /// # Errors
    ///
    /// [`PostError`], with the request and its buffers.
    pub fn start_recv(
        &self,
        request: impl Into<RecvRequest>,
    ) -> Result<Operation<QueueRef<'_>>, PostError<RecvRequest>> {
        let slot = self.post(request.into(), true)?;
        // SAFETY: just published as owned in this queue.
        Ok(unsafe { Operation::new(QueueRef(&self.inner.queue), slot) })
    }

    fn post(&self, request: RecvRequest, owned: bool) -> Result<u32, PostError<RecvRequest>> {
        let target = RecvTarget::Shared(self.inner.ptr.as_ptr());
        // SAFETY: the queue is live (S-1), and `queue` is its side here.
        unsafe { post_recv(&self.inner.queue, target, request, owned) }
    }

    /// Asks for one [`SrqLimitReached`](crate::EventKind::SrqLimitReached) event when fewer than `limit`
    /// receives are left (`man ibv_modify_srq`); 0 asks for none.
    ///
    /// # Errors
    ///
    /// What `ibv_modify_srq` says.
    pub fn arm_limit(&self, limit: u32) -> Result<(), Error> {
        let mut attr = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: limit };
        let mask = i32::try_from(ibv_srq_attr_mask::IBV_SRQ_LIMIT.0).unwrap_or(0);
        // SAFETY: the queue is live (S-1), the attributes are complete for the mask.
        let code = unsafe {
            (self.inner.pd.context.verbs.ibv_modify_srq)(self.inner.ptr.as_ptr(), &raw mut attr, mask)
        };
        Error::check("ibv_modify_srq", code)
    }

    /// The limit that is armed (`man ibv_query_srq`): 0 once its event was raised.
    ///
    /// # Errors
    ///
    /// What `ibv_query_srq` says.
    pub fn limit(&self) -> Result<u32, Error> {
        let mut attr = ibv_srq_attr::default();
        // SAFETY: the queue is live (S-1), the output valid for writes.
        let code =
            unsafe { (self.inner.pd.context.verbs.ibv_query_srq)(self.inner.ptr.as_ptr(), &raw mut attr) };
        Error::check("ibv_query_srq", code)?;
        Ok(attr.srq_limit)
    }
}
