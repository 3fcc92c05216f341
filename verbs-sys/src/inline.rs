//! The verbs that `verbs.h` defines as inline functions.
//!
//! They call through the tables of the object they are given: `ibv_context.ops` for the data
//! path, the `verbs_context` in front of the context for what came later. Each returns
//! `EOPNOTSUPP` (or null with `errno` set) where the provider has no such slot.
//!
//! # Safety
//!
//! All functions here have the contract of the C function of the same name: pointers are to live
//! objects of the same provider, lists are linked and terminated as the manual page says, and
//! output pointers are valid for writes.

#![allow(clippy::missing_safety_doc, reason = "one contract for the module, stated at its top")]

use core::ffi::{c_int, c_uint, c_void};
use core::mem::{offset_of, size_of};
use core::ptr;

use crate::bindings::*;

/// The value of `ibv_context.abi_compat` that announces a `verbs_context` around the context.
pub const ABI_EXTENDED: *mut c_void = ptr::without_provenance_mut(usize::MAX);

/// Sets the calling thread's `errno`.
pub fn set_errno(value: c_int) {
    // SAFETY: no precondition.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: it is the calling thread's errno, valid for the thread's life.
    unsafe { *location = value };
}

/// The calling thread's `errno`.
#[must_use]
pub fn errno() -> c_int {
    // SAFETY: no precondition.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: it is the calling thread's errno, valid for the thread's life.
    unsafe { *location }
}

/// The extended context around `context`, if its provider has one (`verbs_get_ctx`).
#[inline]
pub unsafe fn verbs_get_ctx(context: *mut ibv_context) -> Option<*mut verbs_context> {
    // SAFETY: the caller passes a live context.
    let compat = unsafe { (*context).abi_compat };
    if compat != ABI_EXTENDED {
        return None;
    }
    // SAFETY: `abi_compat` of all ones promises that the context is the last member of a
    // `verbs_context`; this is the ABI's own rule (`verbs_get_ctx` in verbs.h).
    Some(unsafe { context.cast::<u8>().sub(offset_of!(verbs_context, context)) }.cast())
}

/// The slot of the extended context at `$field`, if the context has one, is long enough to hold
/// it, and the provider filled it (`verbs_get_ctx_op`).
macro_rules! ctx_op {
    ($context:expr, $field:ident) => {{
        // SAFETY: the caller of the enclosing function passes a live context.
        match unsafe { verbs_get_ctx($context) } {
            Some(vctx) => {
                // SAFETY: `vctx` came from `verbs_get_ctx`; `sz` exists in every version.
                let size = unsafe { (*vctx).sz };
                // `sz` counts from the end of the structure: it grew at the front.
                if size >= size_of::<verbs_context>() - offset_of!(verbs_context, $field) {
                    // SAFETY: the check above says that the slot exists.
                    unsafe { (*vctx).$field }
                } else {
                    None
                }
            }
            _ => None,
        }
    }};
}

/// Calls a slot of the extended context, or gives `EOPNOTSUPP` as the C inline function does.
macro_rules! ext {
    ($(#[$doc:meta])* fn $name:ident($first:ident: $first_ty:ty $(, $arg:ident: $ty:ty)*) -> $ret:ty
     = $slot:ident of $context:expr; else $none:expr) => {
        $(#[$doc])*
        #[inline]
        pub unsafe fn $name($first: $first_ty $(, $arg: $ty)*) -> $ret {
            // SAFETY: the caller passes live objects (module contract).
            #[allow(unused_unsafe, reason = "a context given directly needs no dereference")]
            let context: *mut ibv_context = unsafe { $context };
            match ctx_op!(context, $slot) {
                // SAFETY: the provider filled the slot for this signature; the arguments are the caller's.
                Some(op) => unsafe { op($first $(, $arg)*) },
                None => { set_errno(libc::EOPNOTSUPP); $none }
            }
        }
    };
}

/// Calls a slot of `ibv_context.ops`, or gives `$none`.
macro_rules! op {
    ($(#[$doc:meta])* fn $name:ident($first:ident: $first_ty:ty $(, $arg:ident: $ty:ty)*) -> $ret:ty
     = $slot:ident of $context:expr; else $none:expr) => {
        $(#[$doc])*
        #[inline]
        pub unsafe fn $name($first: $first_ty $(, $arg: $ty)*) -> $ret {
            // SAFETY: the caller passes live objects (module contract).
            #[allow(unused_unsafe, reason = "a context given directly needs no dereference")]
            let context: *mut ibv_context = unsafe { $context };
            // SAFETY: the object's context outlives it (libibverbs' own rule).
            match unsafe { (*context).ops.$slot } {
                // SAFETY: the provider filled the slot for this signature; the arguments are the caller's.
                Some(op) => unsafe { op($first $(, $arg)*) },
                None => { set_errno(libc::EOPNOTSUPP); $none }
            }
        }
    };
}

op! { /// `man ibv_poll_cq`: the number of completions written, or a negative value.
fn ibv_poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int = poll_cq of (*cq).context; else -libc::EOPNOTSUPP }
op! { /// `man ibv_req_notify_cq`.
fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int = req_notify_cq of (*cq).context; else libc::EOPNOTSUPP }
op! { /// `man ibv_post_send`: 0, or an errno with `bad_wr` pointing to the first work request not posted.
fn ibv_post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad_wr: *mut *mut ibv_send_wr) -> c_int = post_send of (*qp).context; else { unsafe_bad(bad_wr, wr); libc::EOPNOTSUPP } }
op! { /// `man ibv_post_recv`.
fn ibv_post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int = post_recv of (*qp).context; else { unsafe_bad(bad_wr, wr); libc::EOPNOTSUPP } }
op! { /// `man ibv_post_srq_recv`.
fn ibv_post_srq_recv(srq: *mut ibv_srq, wr: *mut ibv_recv_wr, bad_wr: *mut *mut ibv_recv_wr) -> c_int = post_srq_recv of (*srq).context; else { unsafe_bad(bad_wr, wr); libc::EOPNOTSUPP } }
op! { /// `man ibv_alloc_mw`.
fn ibv_alloc_mw(pd: *mut ibv_pd, mw_type: ibv_mw_type) -> *mut ibv_mw = alloc_mw of (*pd).context; else ptr::null_mut() }
op! { /// `man ibv_dealloc_mw`.
fn ibv_dealloc_mw(mw: *mut ibv_mw) -> c_int = dealloc_mw of (*mw).context; else libc::EOPNOTSUPP }

/// Reports the first work request as the bad one when nothing could be posted.
fn unsafe_bad<T>(bad_wr: *mut *mut T, wr: *mut T) {
    // SAFETY: the verbs' contract: `bad_wr` is valid for writes.
    unsafe { *bad_wr = wr };
}

/// `man ibv_bind_mw`: binds a type 1 window. 0, or an errno.
#[inline]
pub unsafe fn ibv_bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: the caller passes a live window (module contract).
    let window = unsafe { &*mw };
    // SAFETY: and a valid bind request.
    let info = unsafe { &(*bind).bind_info };
    if window.type_ != ibv_mw_type::IBV_MW_TYPE_1 {
        return libc::EINVAL;
    }
    if info.mr.is_null() {
        if info.addr != 0 || info.length != 0 {
            return libc::EINVAL;
        }
    // SAFETY: a non-null region in the bind information is live (module contract).
    } else if unsafe { (*info.mr).pd } != window.pd {
        return libc::EPERM;
    }
    // SAFETY: the window's context outlives it.
    match unsafe { (*window.context).ops.bind_mw } {
        // SAFETY: the provider filled the slot for this signature.
        Some(op) => unsafe { op(qp, mw, bind) },
        None => libc::EOPNOTSUPP,
    }
}

ext! { /// `man ibv_create_cq_ex`.
fn ibv_create_cq_ex(context: *mut ibv_context, attr: *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex = create_cq_ex of context; else ptr::null_mut() }
ext! { /// `man ibv_modify_cq`.
fn ibv_modify_cq(cq: *mut ibv_cq, attr: *mut ibv_modify_cq_attr) -> c_int = modify_cq of (*cq).context; else libc::EOPNOTSUPP }
ext! { /// `man ibv_create_qp_ex`, always through the extended slot.
fn ibv_create_qp_ex(context: *mut ibv_context, attr: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp = create_qp_ex of context; else ptr::null_mut() }
ext! { /// `man ibv_advise_mr`.
fn ibv_advise_mr(pd: *mut ibv_pd, advice: ib_uverbs_advise_mr_advice, flags: u32, sg_list: *mut ibv_sge, num_sge: u32) -> c_int = advise_mr of (*pd).context; else libc::EOPNOTSUPP }
ext! { /// `man ibv_alloc_null_mr`.
fn ibv_alloc_null_mr(pd: *mut ibv_pd) -> *mut ibv_mr = alloc_null_mr of (*pd).context; else ptr::null_mut() }
ext! { /// `man ibv_alloc_td`.
fn ibv_alloc_td(context: *mut ibv_context, attr: *mut ibv_td_init_attr) -> *mut ibv_td = alloc_td of context; else ptr::null_mut() }
ext! { /// `man ibv_alloc_td`.
fn ibv_dealloc_td(td: *mut ibv_td) -> c_int = dealloc_td of (*td).context; else libc::EOPNOTSUPP }
ext! { /// `man ibv_alloc_parent_domain`.
fn ibv_alloc_parent_domain(context: *mut ibv_context, attr: *mut ibv_parent_domain_init_attr) -> *mut ibv_pd = alloc_parent_domain of context; else ptr::null_mut() }
ext! { /// `man ibv_query_rt_values_ex`.
fn ibv_query_rt_values_ex(context: *mut ibv_context, values: *mut ibv_values_ex) -> c_int = query_rt_values of context; else libc::EOPNOTSUPP }

/// `man ibv_query_device_ex`, without the fallback to `ibv_query_device`, which is an exported
/// function: `EOPNOTSUPP` or `ENOSYS` tell the caller to use that one.
#[inline]
pub unsafe fn ibv_query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
) -> c_int {
    match ctx_op!(context, query_device_ex) {
        // SAFETY: the provider filled the slot; it writes at most the size that is passed.
        Some(op) => unsafe { op(context, input, attr, size_of::<ibv_device_attr_ex>()) },
        None => libc::EOPNOTSUPP,
    }
}

/// `man ibv_query_port` through the extended slot, which knows the size of the structure; `None`
/// when the provider has none, and then the exported function fills the first 48 bytes.
#[inline]
pub unsafe fn ibv_query_port_ex(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut ibv_port_attr,
) -> Option<c_int> {
    // SAFETY: the provider filled the slot; it writes at most the size that is passed.
    ctx_op!(context, query_port).map(|op| unsafe { op(context, port_num, attr, size_of::<ibv_port_attr>()) })
}

/// `ibv_inc_rkey`: the key with its low eight bits, the consumer's part, counted up by one.
#[must_use]
pub fn ibv_inc_rkey(rkey: c_uint) -> c_uint {
    (rkey & !0xff) | (rkey.wrapping_add(1) & 0xff)
}
