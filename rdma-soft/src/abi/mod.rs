//! The C functions and structures of libibverbs over the device.
//!
//! Every function here has the contract of the verb of its name: pointers are to live objects of this
//! device, lists are linked and terminated, output pointers are valid for writes, and what is destroyed is
//! used no more. That is what "the caller passes" in the comments refers to. What can be checked is checked.

mod ah;
mod channel;
mod context;
mod cq;
mod cq_ex;
mod domain;
mod events;
mod modify;
mod mr;
mod mw;
mod object;
mod post;
mod qp;
mod qp_ex;
mod query;
mod section;
mod srq;

use std::ffi::c_int;
use std::ptr;

use verbs_sys::{Verbs, ibv_context, ibv_fork_status};

pub(crate) use context::NAME;

/// The functions of the device, as a provider exports them.
pub(crate) static VERBS: Verbs = table();

const fn table() -> Verbs {
    let mut verbs = Verbs::new(
        context::get_device_list,
        context::free_device_list,
        context::get_device_name,
        context::get_device_guid,
        context::open_device,
        context::close_device,
        events::get_async_event,
        events::ack_async_event,
        query::query_device,
        query::query_port,
        query::query_gid,
        query::query_pkey,
        domain::alloc_pd,
        domain::dealloc_pd,
        mr::reg_mr,
        mr::dereg_mr,
        channel::create_comp_channel,
        channel::destroy_comp_channel,
        cq::create_cq,
        cq::resize_cq,
        cq::destroy_cq,
        channel::get_cq_event,
        channel::ack_cq_events,
        srq::create_srq,
        srq::modify_srq,
        srq::query_srq,
        srq::destroy_srq,
        qp::create_qp,
        modify::modify_qp,
        qp::query_qp,
        qp::destroy_qp,
        ah::create_ah,
        ah::destroy_ah,
        qp::attach_mcast,
        qp::detach_mcast,
    );
    verbs.ibv_get_device_index = Some(context::get_device_index);
    verbs.ibv_get_pkey_index = Some(query::get_pkey_index);
    verbs.ibv_query_gid_ex = Some(query::query_gid_ex);
    verbs.ibv_query_gid_table = Some(query::query_gid_table);
    verbs.ibv_reg_mr_iova = Some(mr::reg_mr_iova);
    verbs.ibv_reg_mr_iova2 = Some(mr::reg_mr_iova2);
    verbs.ibv_reg_dmabuf_mr = Some(mr::reg_dmabuf_mr);
    verbs.ibv_rereg_mr = Some(mr::rereg_mr);
    verbs.ibv_init_ah_from_wc = Some(ah::init_ah_from_wc);
    verbs.ibv_create_ah_from_wc = Some(ah::create_ah_from_wc);
    verbs.ibv_qp_to_qp_ex = Some(qp::qp_to_qp_ex);
    verbs.ibv_query_qp_data_in_order = Some(qp::query_qp_data_in_order);
    verbs.ibv_query_ece = Some(qp::query_ece);
    verbs.ibv_set_ece = Some(qp::set_ece);
    verbs.ibv_fork_init = Some(fork_init);
    verbs.ibv_is_fork_initialized = Some(is_fork_initialized);
    verbs.ibv_import_device = Some(import_device);
    verbs
}

/// `man ibv_fork_init`: nothing to do, as memory is not pinned and pages are copied when written.
unsafe extern "C" fn fork_init() -> c_int {
    0
}

unsafe extern "C" fn is_fork_initialized() -> ibv_fork_status {
    ibv_fork_status::IBV_FORK_UNNEEDED
}

/// `man ibv_import_device`: there is no kernel object behind a context that another process could have.
unsafe extern "C" fn import_device(_fd: c_int) -> *mut ibv_context {
    verbs_sys::inline::set_errno(libc::EOPNOTSUPP);
    ptr::null_mut()
}
