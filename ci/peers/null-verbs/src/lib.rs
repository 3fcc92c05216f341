//! The null provider behind the exported functions of libibverbs.
//!
//! Only what a program asks for when it is set up passes through here: the data path goes through
//! the tables of the objects, straight to the provider.

#![allow(clippy::missing_safety_doc, reason = "each function has the contract of its manual page")]

use core::ffi::{c_char, c_int, c_uint, c_void};

use verbs_sys::*;

macro_rules! exports {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: the caller's arguments, for the verb that they are meant for.
            unsafe { (null::verbs().$name)($($arg),*) }
        }
    )*};
}

macro_rules! optional_exports {
    ($($symbol:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $name:ident;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol($($arg: $ty),*) -> $ret {
            let verb = null::verbs().$name.expect("the null provider has this verb");
            // SAFETY: as above.
            unsafe { verb($($arg),*) }
        }
    )*};
}

exports! {
    ibv_get_device_list(a: *mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list(a: *mut *mut ibv_device);
    ibv_get_device_name(a: *mut ibv_device) -> *const c_char;
    ibv_get_device_guid(a: *mut ibv_device) -> __be64;
    ibv_open_device(a: *mut ibv_device) -> *mut ibv_context;
    ibv_close_device(a: *mut ibv_context) -> c_int;
    ibv_get_async_event(a: *mut ibv_context, b: *mut ibv_async_event) -> c_int;
    ibv_ack_async_event(a: *mut ibv_async_event);
    ibv_query_device(a: *mut ibv_context, b: *mut ibv_device_attr) -> c_int;
    ibv_query_port(a: *mut ibv_context, b: u8, c: *mut _compat_ibv_port_attr) -> c_int;
    ibv_query_gid(a: *mut ibv_context, b: u8, c: c_int, d: *mut ibv_gid) -> c_int;
    ibv_query_pkey(a: *mut ibv_context, b: u8, c: c_int, d: *mut __be16) -> c_int;
    ibv_alloc_pd(a: *mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd(a: *mut ibv_pd) -> c_int;
    ibv_reg_mr(a: *mut ibv_pd, b: *mut c_void, c: usize, d: c_int) -> *mut ibv_mr;
    ibv_dereg_mr(a: *mut ibv_mr) -> c_int;
    ibv_create_comp_channel(a: *mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel(a: *mut ibv_comp_channel) -> c_int;
    ibv_create_cq(a: *mut ibv_context, b: c_int, c: *mut c_void, d: *mut ibv_comp_channel, e: c_int) -> *mut ibv_cq;
    ibv_resize_cq(a: *mut ibv_cq, b: c_int) -> c_int;
    ibv_destroy_cq(a: *mut ibv_cq) -> c_int;
    ibv_get_cq_event(a: *mut ibv_comp_channel, b: *mut *mut ibv_cq, c: *mut *mut c_void) -> c_int;
    ibv_ack_cq_events(a: *mut ibv_cq, b: c_uint);
    ibv_create_srq(a: *mut ibv_pd, b: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    ibv_modify_srq(a: *mut ibv_srq, b: *mut ibv_srq_attr, c: c_int) -> c_int;
    ibv_query_srq(a: *mut ibv_srq, b: *mut ibv_srq_attr) -> c_int;
    ibv_destroy_srq(a: *mut ibv_srq) -> c_int;
    ibv_create_qp(a: *mut ibv_pd, b: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp(a: *mut ibv_qp, b: *mut ibv_qp_attr, c: c_int) -> c_int;
    ibv_query_qp(a: *mut ibv_qp, b: *mut ibv_qp_attr, c: c_int, d: *mut ibv_qp_init_attr) -> c_int;
    ibv_destroy_qp(a: *mut ibv_qp) -> c_int;
    ibv_create_ah(a: *mut ibv_pd, b: *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_destroy_ah(a: *mut ibv_ah) -> c_int;
    ibv_attach_mcast(a: *mut ibv_qp, b: *const ibv_gid, c: u16) -> c_int;
    ibv_detach_mcast(a: *mut ibv_qp, b: *const ibv_gid, c: u16) -> c_int;
}

optional_exports! {
    ibv_get_device_index(a: *mut ibv_device) -> c_int = ibv_get_device_index;
    ibv_get_pkey_index(a: *mut ibv_context, b: u8, c: __be16) -> c_int = ibv_get_pkey_index;
    _ibv_query_gid_ex(a: *mut ibv_context, b: u32, c: u32, d: *mut ibv_gid_entry, e: u32, f: usize) -> c_int = ibv_query_gid_ex;
    _ibv_query_gid_table(a: *mut ibv_context, b: *mut ibv_gid_entry, c: usize, d: u32, e: usize) -> isize = ibv_query_gid_table;
    ibv_reg_mr_iova(a: *mut ibv_pd, b: *mut c_void, c: usize, d: u64, e: c_int) -> *mut ibv_mr = ibv_reg_mr_iova;
    ibv_reg_mr_iova2(a: *mut ibv_pd, b: *mut c_void, c: usize, d: u64, e: c_uint) -> *mut ibv_mr = ibv_reg_mr_iova2;
}
