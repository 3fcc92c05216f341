//! Memory windows.

use std::ffi::c_int;
use std::sync::Arc;

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::domain::{DomainUse, domain};
use super::object::{Object, null};
use super::qp;
use crate::device::{Handle, WindowType};
use crate::proto::{BindRequest, Data, PostError, SendFlags, SendOperation, SendRequest};

/// Our part of a memory window.
pub(crate) struct MwData {
    device: Arc<Handle>,
    window_type: WindowType,
    _domain: DomainUse,
    _counted: Counted,
}

type Mw = Object<ibv_mw, MwData>;

pub(crate) unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: ibv_mw_type) -> *mut ibv_mw {
    let window_type = match kind {
        ibv_mw_type::IBV_MW_TYPE_1 => WindowType::One,
        ibv_mw_type::IBV_MW_TYPE_2 => WindowType::Two,
        _ => return null(libc::EINVAL),
    };
    // SAFETY: the caller passes a live protection domain.
    let data = unsafe { domain(pd) };
    // SAFETY: a live protection domain's context is live.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let counted = Counted::new(unsafe { context_data(context) });
    let Ok(rkey) = data.device.memory.add_window(data.domain.id, window_type) else {
        return null(libc::ENOMEM);
    };
    let c = ibv_mw { context, pd, rkey, handle: rkey >> 8, type_: kind };
    Mw::allocate(
        c,
        MwData {
            device: Arc::clone(&data.device),
            window_type,
            _domain: DomainUse::new(&data.domain),
            _counted: counted,
        },
    )
}

pub(crate) unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: the caller passes a live window and uses it no more.
    let handle = unsafe { (*mw).handle };
    // SAFETY: as above.
    let data = unsafe { Mw::free(mw) };
    match data.device.memory.remove_window(handle << 8) {
        Ok(()) => 0,
        Err(_) => libc::EINVAL,
    }
}

/// What a work request that binds says: of type 2 windows only.
///
/// # Safety
///
/// `mw` is a live window or null, and the region in `info` is live or null.
pub(crate) unsafe fn bind_request(
    mw: *mut ibv_mw,
    rkey: u32,
    info: &ibv_mw_bind_info,
) -> Result<BindRequest, c_int> {
    // SAFETY: the caller's promise.
    unsafe { bind_request_of(WindowType::Two, mw, rkey, info) }
}

/// What a bind of a window of this type says, for the send queue.
///
/// # Safety
///
/// As [`bind_request`].
unsafe fn bind_request_of(
    window_type: WindowType,
    mw: *mut ibv_mw,
    rkey: u32,
    info: &ibv_mw_bind_info,
) -> Result<BindRequest, c_int> {
    // SAFETY: the caller's promise.
    if mw.is_null() || unsafe { Mw::data(mw) }.window_type != window_type {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller's promise.
    let window = unsafe { (*mw).handle };
    // SAFETY: as above.
    let lkey = if info.mr.is_null() { 0 } else { unsafe { (*info.mr).lkey } };
    Ok(BindRequest { window, rkey, lkey, access: info.mw_access_flags, addr: info.addr, length: info.length })
}

/// `man ibv_bind_mw`: a type 1 window, and no other, gets a new key, and the bind goes through the send queue.
pub(crate) unsafe extern "C" fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: the caller passes a valid bind.
    let bind = unsafe { &*bind };
    // SAFETY: and a live window.
    let rkey = verbs_sys::inline::ibv_inc_rkey(unsafe { (*mw).rkey });
    // SAFETY: as above, and a live region or none.
    let request = match unsafe { bind_request_of(WindowType::One, mw, rkey, &bind.bind_info) } {
        Ok(request) => request,
        Err(errno) => return errno,
    };
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { qp::data(qp) };
    let request = SendRequest {
        wr_id: bind.wr_id,
        operation: SendOperation::BindWindow(request),
        flags: super::post::send_flags(bind.send_flags) & (SendFlags::SIGNALED | SendFlags::FENCE),
        data: Data::Gather(&[]),
        destination: None,
    };
    let mut result = Err(PostError::InvalidOperation);
    data.device.post_send(&data.qp, |poster| result = poster.post(&request));
    match result {
        Ok(()) => {
            // SAFETY: the caller owns the window; its key is the new one from now on.
            unsafe { (*mw).rkey = rkey };
            0
        }
        Err(e) => super::post::errno_of(e),
    }
}
