//! Which provider an object belongs to.

use std::ffi::CStr;

use verbs_sys::{Verbs, ibv_context, ibv_device};

/// The system's verbs, where there are any. In the drop-in form this library is the system's.
pub(crate) fn system() -> Option<&'static Verbs> {
    if cfg!(feature = "drop-in") { None } else { Verbs::load().ok() }
}

/// The table of the provider that `device` came from.
///
/// # Safety
///
/// `device` is an entry of a device list that has not been freed, or the device of a live context.
pub(crate) unsafe fn of_device(device: *const ibv_device) -> &'static Verbs {
    // SAFETY: a device is live (contract above).
    let name = unsafe { &raw const (*device).name };
    // SAFETY: every provider ends the name with a zero.
    let name = unsafe { CStr::from_ptr(name.cast()) };
    if name.to_bytes() == rdma_soft::DEVICE_NAME.as_bytes() {
        return rdma_soft::verbs();
    }
    // Any other device came from the system's library, which is therefore there.
    system().unwrap_or_else(|| rdma_soft::verbs())
}

/// The table of the provider that `context` came from.
///
/// # Safety
///
/// `context` is live.
pub(crate) unsafe fn of_context(context: *const ibv_context) -> &'static Verbs {
    // SAFETY: a live context has its device in its first field.
    let device = unsafe { (*context).device };
    // SAFETY: that device is live as long as the context.
    unsafe { of_device(device) }
}
