//! The pair itself, without types: what all handles share.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use verbs_sys::{ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_state};

use crate::cq::CqInner;
use crate::inflight::{Health, WorkQueue};
use crate::mw::WindowInner;
use crate::ops::{PostRecv, PostSend};
use crate::pd::PdInner;
use crate::port::Gid;
use crate::srq::SrqInner;
use crate::{Error, leak};

/// What a queue pair was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuePairCapacity {
    /// Sends in flight.
    pub max_send: u32,
    /// Receives posted; 0 with a shared receive queue.
    pub max_recv: u32,
    /// Entries of a send's scatter/gather list.
    pub max_send_sge: u32,
    /// Entries of a receive's scatter/gather list.
    pub max_recv_sge: u32,
    /// Bytes that a send can carry inline.
    pub max_inline: u32,
}

/// What a pair may hold of its shared receive queue.
#[derive(Debug, Default)]
pub(crate) struct SharedReceives {
    /// It may have taken receives, and the device has not said that it gave back the last.
    awaited: AtomicBool,
}

impl SharedReceives {
    /// From RTR on the pair takes receives, if it has a shared queue.
    pub(super) fn take_from(&self, has_queue: bool) {
        self.awaited.store(has_queue, Ordering::Relaxed);
    }

    /// The device has given back the last, or the pair was reset.
    pub(crate) fn clear(&self) {
        self.awaited.store(false, Ordering::Relaxed);
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed)
    }
}

/// A live queue pair.
pub(crate) struct QpInner {
    pub(crate) ptr: NonNull<ibv_qp>,
    pub(super) post_send: PostSend,
    pub(super) post_recv: PostRecv,
    pub(crate) num: u32,
    pub(crate) capacity: QueuePairCapacity,
    pub(crate) sq: Arc<WorkQueue>,
    /// Its own receive queue, or the shared one's.
    pub(crate) rq: Arc<WorkQueue>,
    pub(crate) srq: Option<Arc<SrqInner>>,
    pub(crate) send_cq: Arc<CqInner>,
    pub(crate) recv_cq: Arc<CqInner>,
    /// Receive credits that the pair reserved for its shared receive queue.
    pub(crate) reserved: u32,
    pub(crate) shared: SharedReceives,
    pub(crate) health: Arc<Health>,
    /// Multicast groups that it is in, with their LIDs: it cannot be destroyed while it is in one.
    pub(crate) groups: Mutex<Vec<(Gid, u16)>>,
    /// Windows of type 2 of which binds were posted here: those that are bound here go first.
    pub(crate) windows: Mutex<Vec<Weak<WindowInner>>>,
    pub(crate) pd: Arc<PdInner>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for QpInner {}
// SAFETY: as above.
unsafe impl Sync for QpInner {}

impl QpInner {
    /// `ibv_modify_qp`.
    pub(crate) fn modify(
        &self,
        attr: &mut ibv_qp_attr,
        mask: ibv_qp_attr_mask,
    ) -> Result<(), std::io::Error> {
        let mask = i32::try_from(mask.0).unwrap_or(i32::MAX);
        // SAFETY: the pair is live (S-1), the attributes are complete for the mask.
        let code = unsafe { (self.pd.context.verbs.ibv_modify_qp)(self.ptr.as_ptr(), attr, mask) };
        if code == 0 { Ok(()) } else { Err(crate::error::from_return(code)) }
    }

    /// Commands a state that needs no other attributes.
    pub(crate) fn command(&self, state: ibv_qp_state) -> Result<(), std::io::Error> {
        let mut attr = raw_attr();
        attr.qp_state = state;
        self.modify(&mut attr, ibv_qp_attr_mask::IBV_QP_STATE)
    }

    /// `ibv_query_qp`.
    pub(crate) fn query(&self, mask: ibv_qp_attr_mask) -> Result<ibv_qp_attr, Error> {
        let mut attr = raw_attr();
        // SAFETY: integers and pointers: all zeroes are a value.
        let mut init: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        let mask = i32::try_from(mask.0).unwrap_or(i32::MAX);
        let query = self.pd.context.verbs.ibv_query_qp;
        // SAFETY: the pair is live (S-1), the outputs are valid for writes.
        let code = unsafe { query(self.ptr.as_ptr(), &raw mut attr, mask, &raw mut init) };
        Error::check("ibv_query_qp", code)?;
        Ok(attr)
    }

    /// `ibv_attach_mcast`.
    pub(crate) fn attach(&self, gid: Gid, lid: u16) -> Result<(), Error> {
        let raw = gid.raw();
        let attach = self.pd.context.verbs.ibv_attach_mcast;
        let mut groups = self.groups.lock();
        // SAFETY: the pair is live (S-1), the GID valid for reads.
        Error::check("ibv_attach_mcast", unsafe { attach(self.ptr.as_ptr(), &raw const raw, lid) })?;
        if !groups.contains(&(gid, lid)) {
            groups.push((gid, lid));
        }
        Ok(())
    }

    /// `ibv_detach_mcast`.
    pub(crate) fn detach(&self, gid: Gid, lid: u16) -> Result<(), Error> {
        let raw = gid.raw();
        let detach = self.pd.context.verbs.ibv_detach_mcast;
        let mut groups = self.groups.lock();
        // SAFETY: the pair is live (S-1), the GID valid for reads.
        Error::check("ibv_detach_mcast", unsafe { detach(self.ptr.as_ptr(), &raw const raw, lid) })?;
        groups.retain(|group| *group != (gid, lid));
        Ok(())
    }

    /// Completes what is in flight as flushed: the verb that reset or destroyed the pair succeeded.
    pub(crate) fn reclaim(&self, destroyed: bool) {
        self.send_cq.reclaim(&self.sq, destroyed);
        if self.srq.is_none() {
            self.recv_cq.reclaim(&self.rq, destroyed);
        }
    }
}

/// Attributes, all zero.
pub(crate) fn raw_attr() -> ibv_qp_attr {
    // SAFETY: integers and unions of integers: all zeroes are a value.
    unsafe { std::mem::zeroed() }
}

impl Drop for QpInner {
    fn drop(&mut self) {
        let context = &self.pd.context;
        context.qps.lock().remove(&self.ptr.addr());
        for (gid, lid) in std::mem::take(self.groups.get_mut()) {
            if let Err(error) = self.detach(gid, lid) {
                tracing::warn!(%error, "a queue pair that goes could not leave its multicast group");
            }
        }
        let windows = std::mem::take(self.windows.get_mut());
        let windows: Vec<_> = windows.iter().filter_map(Weak::upgrade).collect();
        if !windows.is_empty() {
            // The device holds on to a pair with a window (rxe waits for most of a minute). ERR ends what is in flight, so that no bind
            // finds its window gone; a pair that cannot be moved there is destroyed all the same.
            let _ = self.command(ibv_qp_state::IBV_QPS_ERR);
            windows.iter().for_each(|window| window.go_with(self.ptr.addr()));
        }
        let context = &self.pd.context;
        // SAFETY: created once, destroyed once; every handle holds an Arc (S-1).
        let code = unsafe { (context.verbs.ibv_destroy_qp)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_destroy_qp", code) {
            leak(&error);
            // The device may still use all of it: slots with their buffers, queues, the domain.
            std::mem::forget(Arc::clone(&self.sq));
            std::mem::forget(Arc::clone(&self.rq));
            std::mem::forget(Arc::clone(&self.send_cq));
            std::mem::forget(Arc::clone(&self.recv_cq));
            std::mem::forget(self.srq.clone());
            std::mem::forget(Arc::clone(&self.pd));
            return;
        }
        self.reclaim(true);
        context.queues.remove(&self.sq);
        match &self.srq {
            None => context.queues.remove(&self.rq),
            Some(srq) => {
                // Its completions may still be in the queue, and name the shared queue's slots.
                let index = Arc::clone(srq.queue.queue_index());
                self.recv_cq.lock_state().add_zombie(self.reserved, Some(index));
            }
        }
        context.queues.synchronize();
    }
}

impl std::fmt::Debug for QpInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("num", &self.num)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}
