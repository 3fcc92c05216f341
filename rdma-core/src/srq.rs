//! Shared receive queues.

use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::ibv_srq;

use crate::inflight::WorkQueue;
use crate::pd::PdInner;
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

/// A shared receive queue.
#[derive(Debug, Clone)]
pub struct SharedReceiveQueue {
    pub(crate) inner: Arc<SrqInner>,
}
