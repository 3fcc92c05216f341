//! The verbs, each forwarded to the provider that made the object it is given.

use core::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr;

use verbs_sys::inline::set_errno;
use verbs_sys::*;

use crate::dispatch::{of_context, of_device, system};

/// `fn NAME(ARGS) -> RET, context of EXPR` exports a verb that every provider has;
/// `else FAILURE` marks one that a provider may lack, with what it then returns.
macro_rules! forward {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?, $table:ident($of:expr) $(, else $failure:expr)?;)*) => {
        $(forward!(@one $name($($arg: $ty),*) $(-> $ret)?, $table($of) $(, $failure)?);)*
    };
    (@one $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?, $table:ident($of:expr)) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller passes a live object (manual page); its context or device is live with it.
            #[allow(unused_unsafe, reason = "a context or device given directly needs no dereference")]
            let object = unsafe { $of };
            // SAFETY: as above.
            let verbs = unsafe { $table(object) };
            // SAFETY: the arguments are the caller's, and the object belongs to this provider.
            unsafe { (verbs.$name)($($arg),*) }
        }
    };
    (@one $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?, $table:ident($of:expr), $failure:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller passes a live object (manual page); its context or device is live with it.
            #[allow(unused_unsafe, reason = "a context or device given directly needs no dereference")]
            let object = unsafe { $of };
            // SAFETY: as above.
            let verbs = unsafe { $table(object) };
            match verbs.$name {
                // SAFETY: the arguments are the caller's, and the object belongs to this provider.
                Some(verb) => unsafe { verb($($arg),*) },
                None => { set_errno(libc::EOPNOTSUPP); $failure }
            }
        }
    };
}

forward! {
    fn ibv_get_device_guid(device: *mut ibv_device) -> __be64, of_device(device);
    fn ibv_get_device_index(device: *mut ibv_device) -> c_int, of_device(device), else -1;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context, of_device(device);
    fn ibv_close_device(context: *mut ibv_context) -> c_int, of_context(context);
    fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int, of_context(context);
    fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int, of_context(context);
    fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int, of_context(context);
    fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int, of_context(context);
    fn ibv_query_pkey(context: *mut ibv_context, port: u8, index: c_int, pkey: *mut __be16) -> c_int, of_context(context);
    fn ibv_get_pkey_index(context: *mut ibv_context, port: u8, pkey: __be16) -> c_int, of_context(context), else -1;
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd, of_context(context);
    fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int, of_context((*pd).context);
    fn ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr, of_context((*pd).context);
    fn ibv_reg_mr_iova(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_int) -> *mut ibv_mr, of_context((*pd).context), else ptr::null_mut();
    fn ibv_reg_mr_iova2(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_uint) -> *mut ibv_mr, of_context((*pd).context), else ptr::null_mut();
    fn ibv_reg_dmabuf_mr(pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int) -> *mut ibv_mr, of_context((*pd).context), else ptr::null_mut();
    fn ibv_rereg_mr(mr: *mut ibv_mr, flags: c_int, pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> c_int, of_context((*mr).context), else libc::EOPNOTSUPP;
    fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int, of_context((*mr).context);
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel, of_context(context);
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int, of_context((*channel).context);
    fn ibv_create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel, vector: c_int) -> *mut ibv_cq, of_context(context);
    fn ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int, of_context((*cq).context);
    fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int, of_context((*cq).context);
    fn ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) -> c_int, of_context((*channel).context);
    fn ibv_ack_cq_events(cq: *mut ibv_cq, count: c_uint), of_context((*cq).context);
    fn ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq, of_context((*pd).context);
    fn ibv_modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int, of_context((*srq).context);
    fn ibv_query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int, of_context((*srq).context);
    fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int, of_context((*srq).context);
    fn ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp, of_context((*pd).context);
    fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int, of_context((*qp).context);
    fn ibv_query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int, init: *mut ibv_qp_init_attr) -> c_int, of_context((*qp).context);
    fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int, of_context((*qp).context);
    fn ibv_qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex, of_context((*qp).context), else ptr::null_mut();
    fn ibv_query_qp_data_in_order(qp: *mut ibv_qp, op: ibv_wr_opcode, flags: u32) -> c_int, of_context((*qp).context), else 0;
    fn ibv_query_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int, of_context((*qp).context), else libc::EOPNOTSUPP;
    fn ibv_set_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int, of_context((*qp).context), else libc::EOPNOTSUPP;
    fn ibv_create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah, of_context((*pd).context);
    fn ibv_init_ah_from_wc(context: *mut ibv_context, port: u8, wc: *mut ibv_wc, grh: *mut ibv_grh, attr: *mut ibv_ah_attr) -> c_int, of_context(context), else -1;
    fn ibv_create_ah_from_wc(pd: *mut ibv_pd, wc: *mut ibv_wc, grh: *mut ibv_grh, port: u8) -> *mut ibv_ah, of_context((*pd).context), else ptr::null_mut();
    fn ibv_destroy_ah(ah: *mut ibv_ah) -> c_int, of_context((*ah).context);
    fn ibv_attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int, of_context((*qp).context);
    fn ibv_detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int, of_context((*qp).context);
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: a live device (manual page); every provider keeps the name in this field.
    unsafe { &raw const (*device).name }.cast()
}

/// Exported as `_ibv_query_gid_ex`, the function behind the inline `ibv_query_gid_ex`.
#[unsafe(export_name = "_ibv_query_gid_ex")]
pub unsafe extern "C" fn query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    entry_size: usize,
) -> c_int {
    // SAFETY: a live context (manual page).
    match unsafe { of_context(context) }.ibv_query_gid_ex {
        // SAFETY: the arguments are the caller's.
        Some(verb) => unsafe { verb(context, port, index, entry, flags, entry_size) },
        None => libc::EOPNOTSUPP,
    }
}

/// Exported as `_ibv_query_gid_table`, the function behind the inline `ibv_query_gid_table`.
#[unsafe(export_name = "_ibv_query_gid_table")]
pub unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    entry_size: usize,
) -> isize {
    // SAFETY: a live context (manual page).
    match unsafe { of_context(context) }.ibv_query_gid_table {
        // SAFETY: the arguments are the caller's.
        Some(verb) => unsafe { verb(context, entries, max_entries, flags, entry_size) },
        None => -(libc::EOPNOTSUPP as isize),
    }
}

/// A private export that pyverbs and ibv_devinfo read: the GID's type as sysfs counts them (0 InfiniBand or RoCE v1, 1 RoCE v2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_gid_type(
    context: *mut ibv_context,
    port: u8,
    index: c_uint,
    gid_type: *mut c_uint,
) -> c_int {
    let mut entry = ibv_gid_entry::default();
    // SAFETY: a live context (manual page), and a valid output of the size given.
    let result = unsafe {
        query_gid_ex(context, u32::from(port), index, &raw mut entry, 0, size_of::<ibv_gid_entry>())
    };
    match result {
        0 => {
            let value = c_uint::from(entry.gid_type == ibv_gid_type::IBV_GID_TYPE_ROCE_V2.0);
            // SAFETY: the caller's output pointer.
            unsafe { *gid_type = value };
            0
        }
        // An empty slot of the table is of type 0 there, not an error.
        libc::ENODATA => {
            // SAFETY: the caller's output pointer.
            unsafe { *gid_type = 0 };
            0
        }
        error => {
            set_errno(error);
            -1
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: an event that `ibv_get_async_event` filled (manual page).
    let event_ref = unsafe { &*event };
    let (kind, element) = (event_ref.event_type, &event_ref.element);
    use ibv_event_type as e;
    // Device and port events have no object: neither provider has anything to count for them.
    let context = match kind {
        // SAFETY: the member that this type of event fills, live until the event is acknowledged.
        e::IBV_EVENT_CQ_ERR => unsafe { (*element.cq).context },
        // SAFETY: as above.
        e::IBV_EVENT_SRQ_ERR | e::IBV_EVENT_SRQ_LIMIT_REACHED => unsafe { (*element.srq).context },
        e::IBV_EVENT_QP_FATAL
        | e::IBV_EVENT_QP_REQ_ERR
        | e::IBV_EVENT_QP_ACCESS_ERR
        | e::IBV_EVENT_COMM_EST
        | e::IBV_EVENT_SQ_DRAINED
        | e::IBV_EVENT_PATH_MIG
        | e::IBV_EVENT_PATH_MIG_ERR
        // SAFETY: as above.
        | e::IBV_EVENT_QP_LAST_WQE_REACHED => unsafe { (*element.qp).context },
        // SAFETY: as above.
        e::IBV_EVENT_WQ_FATAL => unsafe { (*element.wq).context },
        _ => return,
    };
    // SAFETY: the object's context is live with it.
    let verbs = unsafe { of_context(context) };
    // SAFETY: the caller's event, of this provider.
    unsafe { (verbs.ibv_ack_async_event)(event) }
}

/// Fork support is a property of the process: asked of the system's library where there is one; the soft device needs none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_fork_init() -> c_int {
    match system().and_then(|verbs| verbs.ibv_fork_init) {
        // SAFETY: no preconditions.
        Some(verb) => unsafe { verb() },
        None => 0,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_is_fork_initialized() -> ibv_fork_status {
    match system().and_then(|verbs| verbs.ibv_is_fork_initialized) {
        // SAFETY: no preconditions.
        Some(verb) => unsafe { verb() },
        None => ibv_fork_status::IBV_FORK_UNNEEDED,
    }
}

/// Only kernel devices can be imported: their command file descriptor is that of a character device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_import_device(cmd_fd: c_int) -> *mut ibv_context {
    match system().and_then(|verbs| verbs.ibv_import_device) {
        // SAFETY: the caller's descriptor.
        Some(verb) if is_character_device(cmd_fd) => unsafe { verb(cmd_fd) },
        _ => {
            set_errno(libc::EOPNOTSUPP);
            ptr::null_mut()
        }
    }
}

fn is_character_device(fd: c_int) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: any descriptor may be asked about; the output is valid for writes.
    let result = unsafe { libc::fstat(fd, stat.as_mut_ptr()) };
    // SAFETY: integers, zeroed or written by the call.
    result == 0 && unsafe { stat.assume_init() }.st_mode & libc::S_IFMT == libc::S_IFCHR
}
