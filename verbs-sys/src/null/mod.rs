//! The null provider: one device, `null0`, that completes every work request at once.
//!
//! It moves no data and has no peer, so that a loop over it costs what the code above the seam
//! costs. Its objects follow the rules of real ones all the same: what depends on an object keeps
//! it busy (`EBUSY`), queues have a depth (`ENOMEM`), a queue pair checks the attributes of each
//! transition (`EINVAL`), and completion events must be acknowledged before a destroy returns.
//!
//! # The data path
//!
//! * A send of any kind completes with success when it is posted. One that takes a receive at a
//!   peer (SEND, RDMA WRITE with immediate) takes the oldest receive of *the same queue pair*, or
//!   of its shared receive queue: the pair is its own peer, whatever it was connected to. Without
//!   a posted receive the message is lost and the send succeeds.
//! * The receive's completion has the length, opcode, flags and immediate of the message. No
//!   byte is copied, neither is a key or an address looked at.
//! * A message longer than its receive fails: `LOC_LEN_ERR` at the receiver, `REM_INV_REQ_ERR` at
//!   the sender, and the pair is in ERR.
//! * A slot of the send queue is free again when its completion, or a later one of the same
//!   queue, was polled. Unsignalled requests have none: a queue full of them gives `ENOMEM`.
//! * In ERR and SQE a send flushes, in ERR receives flush, those posted before and those after.
//!   The last-WQE event of a pair with a shared receive queue follows at once.
//! * Reset and destroy remove the pair's completions from its queues, as most hardware drivers do
//!   and rxe does not.
//! * A completion that does not fit in its queue is dropped, with the event `IBV_EVENT_CQ_ERR`.
//!
//! Extended slots: `query_port` and `query_device_ex`. Exported functions that are optional:
//! `ibv_get_device_index`, `ibv_get_pkey_index`, `ibv_query_gid_ex`, `ibv_query_gid_table`,
//! `ibv_reg_mr_iova`, `ibv_reg_mr_iova2`.
//!
//! # Locks
//!
//! Each queue has one lock, free of contention unless threads share the queue. They are taken in
//! this order: send queue, receive queue, completion queue; an event queue's comes last and never
//! under a completion queue's.

pub(crate) mod cq;
pub(crate) mod device;
pub(crate) mod event;
pub(crate) mod memory;
pub(crate) mod post;
pub(crate) mod qp;
pub(crate) mod srq;
mod transition;

use crate::Verbs;

/// The null provider's table.
#[must_use]
pub fn verbs() -> &'static Verbs {
    &VERBS
}

static VERBS: Verbs = Verbs {
    ibv_get_device_list: device::get_device_list,
    ibv_free_device_list: device::free_device_list,
    ibv_get_device_name: device::get_device_name,
    ibv_get_device_guid: device::get_device_guid,
    ibv_open_device: device::open_device,
    ibv_close_device: device::close_device,
    ibv_get_async_event: event::get_async_event,
    ibv_ack_async_event: event::ack_async_event,
    ibv_query_device: device::query_device,
    ibv_query_port: device::query_port_compat,
    ibv_query_gid: device::query_gid,
    ibv_query_pkey: device::query_pkey,
    ibv_alloc_pd: memory::alloc_pd,
    ibv_dealloc_pd: memory::dealloc_pd,
    ibv_reg_mr: memory::reg_mr,
    ibv_dereg_mr: memory::dereg_mr,
    ibv_create_comp_channel: cq::create_comp_channel,
    ibv_destroy_comp_channel: cq::destroy_comp_channel,
    ibv_create_cq: cq::create_cq,
    ibv_resize_cq: cq::resize_cq,
    ibv_destroy_cq: cq::destroy_cq,
    ibv_get_cq_event: cq::get_cq_event,
    ibv_ack_cq_events: cq::ack_cq_events,
    ibv_create_srq: srq::create_srq,
    ibv_modify_srq: srq::modify_srq,
    ibv_query_srq: srq::query_srq,
    ibv_destroy_srq: srq::destroy_srq,
    ibv_create_qp: qp::create_qp,
    ibv_modify_qp: qp::modify_qp,
    ibv_query_qp: qp::query_qp,
    ibv_destroy_qp: qp::destroy_qp,
    ibv_create_ah: memory::create_ah,
    ibv_destroy_ah: memory::destroy_ah,
    ibv_attach_mcast: qp::attach_mcast,
    ibv_detach_mcast: qp::attach_mcast,
    ibv_get_device_index: Some(device::get_device_index),
    ibv_get_pkey_index: Some(device::get_pkey_index),
    ibv_query_gid_ex: Some(device::query_gid_ex),
    ibv_query_gid_table: Some(device::query_gid_table),
    ibv_reg_mr_iova: Some(memory::reg_mr_iova),
    ibv_reg_mr_iova2: Some(memory::reg_mr_iova2),
    ibv_reg_dmabuf_mr: None,
    ibv_rereg_mr: None,
    ibv_init_ah_from_wc: None,
    ibv_create_ah_from_wc: None,
    ibv_qp_to_qp_ex: None,
    ibv_query_qp_data_in_order: None,
    ibv_query_ece: None,
    ibv_set_ece: None,
    ibv_fork_init: None,
    ibv_is_fork_initialized: None,
    ibv_import_device: None,
};

/// Null with `errno` set: how a function that creates an object fails.
pub(crate) fn fail<T>(errno: core::ffi::c_int) -> *mut T {
    crate::inline::set_errno(errno);
    core::ptr::null_mut()
}
