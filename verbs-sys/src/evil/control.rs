//! The control path: the null provider's verbs, with faults before them and lies after them.

use core::ffi::{c_int, c_uint, c_void};
use core::mem::offset_of;
use core::ptr;

use super::dma::Queue;
use super::{DEVICES, Evil, Slot, data, query};
use crate::Verbs;
use crate::bindings::*;
use crate::inline::set_errno;
use crate::null::{cq, device, event, fail, memory, qp, srq};

/// A pointer to an object from which its device can be found.
pub(super) trait Object: Copy {
    /// The device.
    ///
    /// # Safety
    ///
    /// The object is a live one of this provider.
    unsafe fn evil(self) -> &'static Evil;
}

impl Object for *mut ibv_device {
    unsafe fn evil(self) -> &'static Evil {
        // SAFETY: the caller's promise: it is the first field of an `Evil`, which is never freed.
        unsafe { &*self.cast::<Evil>() }
    }
}

impl Object for *mut ibv_context {
    unsafe fn evil(self) -> &'static Evil {
        // SAFETY: the caller's promise.
        let device = unsafe { (*self).device };
        // SAFETY: the context was opened on a device of this provider.
        unsafe { device.evil() }
    }
}

macro_rules! objects {
    ($($object:ident)*) => {$(
        impl Object for *mut $object {
            unsafe fn evil(self) -> &'static Evil {
                // SAFETY: the caller's promise.
                let context = unsafe { (*self).context };
                // SAFETY: a context outlives its objects.
                unsafe { context.evil() }
            }
        }
    )*};
}
objects! { ibv_pd ibv_mr ibv_mw ibv_ah ibv_comp_channel ibv_cq ibv_srq ibv_qp }

/// How a verb says that it failed, by what it returns.
trait Failure {
    fn failure(errno: c_int) -> Self;
}

impl<T> Failure for *mut T {
    fn failure(errno: c_int) -> *mut T {
        fail(errno)
    }
}

impl Failure for c_int {
    fn failure(errno: c_int) -> c_int {
        errno
    }
}

/// -1 with `errno` set, for the verbs that report so.
pub(super) fn minus_one(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

/// A verb of the base, behind the fault of the same name.
macro_rules! faulty {
    ($($name:ident($first:ident: $first_ty:ty $(, $arg:ident: $ty:ty)*) -> $ret:ty = $base:path, else $failed:path;)*) => {$(
        pub(super) unsafe extern "C" fn $name($first: $first_ty $(, $arg: $ty)*) -> $ret {
            // SAFETY: the caller passes a live object.
            let evil = unsafe { $first.evil() };
            match evil.$name.strike() {
                Some(errno) => $failed(errno),
                // SAFETY: the caller's arguments, for the verb that they are meant for.
                None => unsafe { $base($first $(, $arg)*) },
            }
        }
    )*};
}

faulty! {
    query_pkey(context: *mut ibv_context, port: u8, index: c_int, pkey: *mut __be16) -> c_int = device::query_pkey, else minus_one;
    alloc_pd(context: *mut ibv_context) -> *mut ibv_pd = memory::alloc_pd, else Failure::failure;
    dealloc_pd(pd: *mut ibv_pd) -> c_int = memory::dealloc_pd, else Failure::failure;
    alloc_mw(pd: *mut ibv_pd, mw_type: ibv_mw_type) -> *mut ibv_mw = memory::alloc_mw, else Failure::failure;
    dealloc_mw(mw: *mut ibv_mw) -> c_int = memory::dealloc_mw, else Failure::failure;
    create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah = memory::create_ah, else Failure::failure;
    destroy_ah(ah: *mut ibv_ah) -> c_int = memory::destroy_ah, else Failure::failure;
    create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel = cq::create_comp_channel, else Failure::failure;
    destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int = cq::destroy_comp_channel, else Failure::failure;
    resize_cq(queue: *mut ibv_cq, cqe: c_int) -> c_int = cq::resize_cq, else Failure::failure;
    get_cq_event(channel: *mut ibv_comp_channel, queue: *mut *mut ibv_cq, user: *mut *mut c_void) -> c_int = cq::get_cq_event, else minus_one;
    modify_srq(queue: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int = srq::modify_srq, else Failure::failure;
    query_srq(queue: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int = srq::query_srq, else Failure::failure;
    attach_mcast(pair: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int = qp::attach_mcast, else Failure::failure;
    detach_mcast(pair: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int = qp::attach_mcast, else Failure::failure;
    get_async_event(context: *mut ibv_context, taken: *mut ibv_async_event) -> c_int = event::get_async_event, else minus_one;
}

/// A verb that destroys an object which unsolicited events may be about.
macro_rules! destroyers {
    ($($name:ident($object:ident: $ty:ty) = $base:path, from $list:ident, forgets $forget:expr, else $failed:path;)*) => {$(
        unsafe extern "C" fn $name($object: $ty) -> c_int {
            // SAFETY: the caller passes a live object.
            let evil = unsafe { $object.evil() };
            if let Some(errno) = evil.$name.strike() {
                return $failed(errno);
            }
            evil.live.lock().$list.retain(|&other| other != $object);
            // SAFETY: the caller's argument.
            let result = unsafe { $base($object) };
            if result != 0 {
                evil.live.lock().$list.push($object);
                return result;
            }
            let forget: fn(&Evil, $ty) = $forget;
            forget(evil, $object);
            0
        }
    )*};
}

destroyers! {
    close_device(context: *mut ibv_context) = device::close_device, from contexts, forgets |_, _| (), else minus_one;
    destroy_cq(queue: *mut ibv_cq) = cq::destroy_cq, from cqs, forgets |_, _| (), else Failure::failure;
    destroy_srq(queue: *mut ibv_srq) = srq::destroy_srq, from srqs, forgets |evil, queue| evil.dma.lock().forget(Queue::Shared(queue.addr())), else Failure::failure;
    destroy_qp(pair: *mut ibv_qp) = qp::destroy_qp, from qps, forgets forget_pair, else Failure::failure;
}

unsafe extern "C" fn get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let devices: Vec<_> = DEVICES.lock().iter().map(|&evil| ptr::from_ref(evil).cast_mut().cast()).collect();
    // SAFETY: the caller passes null or a valid pointer.
    unsafe { device::device_list(&devices, count) }
}

unsafe extern "C" fn open_device(raw: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: the caller passes a device of this provider.
    let evil = unsafe { raw.evil() };
    if let Some(errno) = evil.open_device.strike() {
        return fail(errno);
    }
    // SAFETY: as above.
    let context = unsafe { device::open_device(raw) };
    if context.is_null() {
        return context;
    }
    // SAFETY: the base made the context as the last field of a `verbs_context`.
    let extended = unsafe { context.cast::<u8>().sub(offset_of!(verbs_context, context)) };
    // SAFETY: it is live, and nobody else has it yet.
    let extended = unsafe { &mut *extended.cast::<verbs_context>() };
    let keeps = |slot| !evil.lacks(slot);
    extended.query_port = keeps(Slot::QueryPort).then_some(query::query_port);
    extended.query_device_ex = keeps(Slot::QueryDeviceEx).then_some(query::query_device_ex);
    if !keeps(Slot::ExtendedSlots) {
        extended.sz = size_of::<verbs_context>() - offset_of!(verbs_context, sz);
    }
    if !keeps(Slot::ExtendedContext) {
        extended.context.abi_compat = ptr::null_mut();
    }
    let ops = &mut extended.context.ops;
    ops.alloc_mw = keeps(Slot::AllocMw).then_some(alloc_mw);
    ops.bind_mw = keeps(Slot::BindMw).then_some(data::bind_mw);
    ops.dealloc_mw = keeps(Slot::DeallocMw).then_some(dealloc_mw);
    ops.poll_cq = keeps(Slot::PollCq).then_some(data::poll_cq);
    ops.req_notify_cq = keeps(Slot::ReqNotifyCq).then_some(data::req_notify_cq);
    ops.post_srq_recv = keeps(Slot::PostSrqRecv).then_some(data::post_srq_recv);
    ops.post_send = keeps(Slot::PostSend).then_some(data::post_send);
    ops.post_recv = keeps(Slot::PostRecv).then_some(data::post_recv);
    evil.live.lock().contexts.push(context);
    context
}

unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    user: *mut c_void,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.create_cq.strike() {
        return fail(errno);
    }
    // SAFETY: the caller's arguments.
    let queue = unsafe { cq::create_cq(context, cqe, user, channel, vector) };
    if !queue.is_null() {
        // SAFETY: it is live, and nobody else has it yet.
        evil.cqe.apply(unsafe { &mut (*queue).cqe });
        evil.live.lock().cqs.push(queue);
    }
    queue
}

unsafe extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: the caller passes a live domain.
    let evil = unsafe { pd.evil() };
    if let Some(errno) = evil.create_srq.strike() {
        return fail(errno);
    }
    // SAFETY: the caller's arguments.
    let queue = unsafe { srq::create_srq(pd, init) };
    if !queue.is_null() {
        // SAFETY: the attributes are an output too.
        evil.srq_attr.apply(unsafe { &mut (*init).attr });
        evil.live.lock().srqs.push(queue);
    }
    queue
}

unsafe extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller passes a live domain.
    let evil = unsafe { pd.evil() };
    if let Some(errno) = evil.create_qp.strike() {
        return fail(errno);
    }
    // SAFETY: the caller's arguments.
    let pair = unsafe { qp::create_qp(pd, init) };
    if !pair.is_null() {
        // SAFETY: the attributes are an output too.
        evil.qp_cap.apply(unsafe { &mut (*init).cap });
        evil.live.lock().qps.push(pair);
    }
    pair
}

unsafe extern "C" fn modify_qp(pair: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: the caller passes a live pair.
    let evil = unsafe { pair.evil() };
    if let Some(errno) = evil.modify_qp.strike() {
        return errno;
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { qp::modify_qp(pair, attr, mask) };
    // SAFETY: the pair is live, and the base keeps its public state current.
    if result == 0 && unsafe { (*pair).state } == ibv_qp_state::IBV_QPS_RESET {
        forget_pair(evil, pair);
    }
    result
}

/// The device lost interest in the memory of everything that was posted to a pair.
fn forget_pair(evil: &Evil, pair: *mut ibv_qp) {
    let mut dma = evil.dma.lock();
    dma.forget(Queue::Send(pair.addr()));
    dma.forget(Queue::Receive(pair.addr()));
}

unsafe extern "C" fn reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr {
    // SAFETY: the caller passes a live domain.
    let evil = unsafe { pd.evil() };
    if let Some(errno) = evil.reg_mr.strike() {
        return fail(errno);
    }
    // SAFETY: the caller's arguments.
    let region = unsafe { memory::reg_mr(pd, addr, length, access) };
    // SAFETY: null, or a live region.
    if let Some(region) = unsafe { region.as_ref() } {
        evil.dma.lock().register(region);
    }
    region
}

unsafe extern "C" fn dereg_mr(region: *mut ibv_mr) -> c_int {
    // SAFETY: the caller passes a live region.
    let evil = unsafe { region.evil() };
    if let Some(errno) = evil.dereg_mr.strike() {
        return errno;
    }
    // SAFETY: as above.
    evil.dma.lock().deregister(unsafe { (*region).lkey });
    // SAFETY: as above; the base does not fail.
    unsafe { memory::dereg_mr(region) }
}

/// Changes nothing: no flag matters here.
unsafe extern "C" fn rereg_mr(
    region: *mut ibv_mr,
    _flags: c_int,
    _pd: *mut ibv_pd,
    _addr: *mut c_void,
    _length: usize,
    _access: c_int,
) -> c_int {
    // SAFETY: the caller passes a live region.
    match unsafe { region.evil() }.rereg_mr.strike() {
        Some(errno) => {
            let _: *mut c_void = fail(errno);
            ibv_rereg_mr_err_code::IBV_REREG_MR_ERR_CMD.0
        }
        None => 0,
    }
}

unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's arguments.
    unsafe { reg_mr(pd, addr, length, access) }
}

unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller's arguments.
    unsafe { reg_mr(pd, addr, length, access.cast_signed()) }
}

/// The evil provider's table: all devices that [`device`](super::device) made.
///
/// The table is `Copy` and its fields are public: a test that needs one exported function missing
/// sets that field of a copy to `None`.
#[must_use]
pub fn verbs() -> &'static Verbs {
    &VERBS
}

/// The same without any of the optional exported functions, as of an old library.
#[must_use]
pub fn old_verbs() -> &'static Verbs {
    &OLD_VERBS
}

static VERBS: Verbs = Verbs {
    ibv_get_device_index: Some(device::get_device_index),
    ibv_get_pkey_index: Some(device::get_pkey_index),
    ibv_query_gid_ex: Some(query::query_gid_ex),
    ibv_query_gid_table: Some(query::query_gid_table),
    ibv_reg_mr_iova: Some(reg_mr_iova),
    ibv_reg_mr_iova2: Some(reg_mr_iova2),
    ..REQUIRED
};

static OLD_VERBS: Verbs = REQUIRED;

const REQUIRED: Verbs = Verbs {
    ibv_get_device_list: get_device_list,
    ibv_free_device_list: device::free_device_list,
    ibv_get_device_name: device::get_device_name,
    ibv_get_device_guid: device::get_device_guid,
    ibv_open_device: open_device,
    ibv_close_device: close_device,
    ibv_get_async_event: get_async_event,
    ibv_ack_async_event: event::ack_async_event,
    ibv_query_device: query::query_device,
    ibv_query_port: query::query_port_compat,
    ibv_query_gid: query::query_gid,
    ibv_query_pkey: query_pkey,
    ibv_alloc_pd: alloc_pd,
    ibv_dealloc_pd: dealloc_pd,
    ibv_reg_mr: reg_mr,
    ibv_dereg_mr: dereg_mr,
    ibv_create_comp_channel: create_comp_channel,
    ibv_destroy_comp_channel: destroy_comp_channel,
    ibv_create_cq: create_cq,
    ibv_resize_cq: resize_cq,
    ibv_destroy_cq: destroy_cq,
    ibv_get_cq_event: get_cq_event,
    ibv_ack_cq_events: cq::ack_cq_events,
    ibv_create_srq: create_srq,
    ibv_modify_srq: modify_srq,
    ibv_query_srq: query_srq,
    ibv_destroy_srq: destroy_srq,
    ibv_create_qp: create_qp,
    ibv_modify_qp: modify_qp,
    ibv_query_qp: query::query_qp,
    ibv_destroy_qp: destroy_qp,
    ibv_create_ah: create_ah,
    ibv_destroy_ah: destroy_ah,
    ibv_attach_mcast: attach_mcast,
    ibv_detach_mcast: detach_mcast,
    ibv_get_device_index: None,
    ibv_get_pkey_index: None,
    ibv_query_gid_ex: None,
    ibv_query_gid_table: None,
    ibv_reg_mr_iova: None,
    ibv_reg_mr_iova2: None,
    ibv_reg_dmabuf_mr: None,
    ibv_rereg_mr: Some(rereg_mr),
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
