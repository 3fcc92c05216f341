//! The work request that a poster fills again and again.

use std::ptr::NonNull;

use verbs_sys::{ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wr_opcode};

use super::slot::WrId;

/// A request of one buffer, a SEND or a receive: only the fields that differ are written each time. It has a place of its own, so
/// that the address of the list is written once.
pub(crate) struct Scratch(NonNull<Request>);

/// What the verbs read.
struct Request {
    send: ibv_send_wr,
    recv: ibv_recv_wr,
    sge: ibv_sge,
}

impl Scratch {
    pub(super) fn new() -> Scratch {
        let request = Request {
            send: ibv_send_wr { num_sge: 1, opcode: ibv_wr_opcode::IBV_WR_SEND, ..Default::default() },
            recv: ibv_recv_wr { num_sge: 1, ..Default::default() },
            sge: ibv_sge::default(),
        };
        let this = NonNull::from(Box::leak(Box::new(request)));
        // SAFETY: a place inside the request.
        let sge = unsafe { &raw mut (*this.as_ptr()).sge };
        // SAFETY: just allocated; nobody else has it.
        unsafe { (*this.as_ptr()).send.sg_list = sge };
        // SAFETY: as above.
        unsafe { (*this.as_ptr()).recv.sg_list = sge };
        Scratch(this)
    }

    /// The request, the poster's while it holds the lock of its queue.
    #[inline(always)]
    pub(crate) fn request(&self) -> RequestPtr {
        RequestPtr(self.0)
    }
}

/// The request of a [`Scratch`], in the hands of the poster.
pub(crate) struct RequestPtr(NonNull<Request>);

impl RequestPtr {
    /// Says what memory.
    ///
    /// # Safety
    ///
    /// As for the others: the queue is live, and the caller its poster.
    #[inline(always)]
    pub(crate) unsafe fn set_sge(&self, sge: ibv_sge) {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.as_ptr()).sge = sge };
    }

    /// A SEND with these.
    ///
    /// # Safety
    ///
    /// As above.
    #[inline(always)]
    pub(crate) unsafe fn send(&self, id: WrId, flags: u32) -> *mut ibv_send_wr {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.as_ptr()).send.wr_id = id.0 };
        // SAFETY: as above.
        unsafe { (*self.0.as_ptr()).send.send_flags = flags };
        // SAFETY: a place inside the request.
        unsafe { &raw mut (*self.0.as_ptr()).send }
    }

    /// A receive with this.
    ///
    /// # Safety
    ///
    /// As above.
    #[inline(always)]
    pub(crate) unsafe fn recv(&self, id: WrId) -> *mut ibv_recv_wr {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.as_ptr()).recv.wr_id = id.0 };
        // SAFETY: a place inside the request.
        unsafe { &raw mut (*self.0.as_ptr()).recv }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: of a box, freed once.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}
