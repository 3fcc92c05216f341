//! The verbs of the data path, read once per context.
//!
//! The inline functions of `verbs.h` look each up in the context's table at every call. Providers fill that table before
//! `ibv_open_device` returns it and leave it alone from then on (S-7).

use std::ffi::c_int;
use std::ptr::NonNull;

use verbs_sys::{ibv_context, ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_wc, inline};

pub(crate) type PostSend =
    unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;
pub(crate) type PostRecv =
    unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;
pub(crate) type PollCq = unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int;

/// What a context's table says, or a function that says that it says nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataPath {
    pub(crate) post_send: PostSend,
    pub(crate) post_recv: PostRecv,
    pub(crate) poll_cq: PollCq,
}

impl DataPath {
    /// # Safety
    ///
    /// The context is live.
    pub(crate) unsafe fn of(context: NonNull<ibv_context>) -> DataPath {
        // SAFETY: the caller's promise.
        let ops = &unsafe { context.as_ref() }.ops;
        DataPath {
            post_send: ops.post_send.unwrap_or(no_post_send),
            post_recv: ops.post_recv.unwrap_or(no_post_recv),
            poll_cq: ops.poll_cq.unwrap_or(no_poll_cq),
        }
    }
}

unsafe extern "C" fn no_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller's arguments; the table has no such verb, so this says that.
    unsafe { inline::ibv_post_send(qp, wr, bad) }
}

unsafe extern "C" fn no_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as above.
    unsafe { inline::ibv_post_recv(qp, wr, bad) }
}

unsafe extern "C" fn no_poll_cq(cq: *mut ibv_cq, count: c_int, wcs: *mut ibv_wc) -> c_int {
    // SAFETY: as above.
    unsafe { inline::ibv_poll_cq(cq, count, wcs) }
}
