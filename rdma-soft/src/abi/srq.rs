//! Shared receive queues.

use std::ffi::c_int;
use std::sync::Arc;

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::domain::{DomainUse, domain};
use super::object::{Object, null, zeroed};
use super::post::{errno_of_receive, sges};
use crate::device::{SharedReceiveQueue, load};

/// Limits, as on the kernel's Soft-RoCE.
pub(crate) const MAX_SRQ_WR: u32 = 1 << 15;
pub(crate) const MAX_SRQ_SGE: u32 = 27;

/// Our part of a shared receive queue.
pub(crate) struct SrqData {
    pub(crate) queue: Arc<SharedReceiveQueue>,
    _domain: DomainUse,
    _counted: Counted,
}

type Srq = Object<ibv_srq, SrqData>;

/// # Safety
///
/// `srq` is a live shared receive queue of this device.
pub(crate) unsafe fn data<'a>(srq: *mut ibv_srq) -> &'a SrqData {
    // SAFETY: the caller's promise.
    unsafe { Srq::data(srq) }
}

/// `man ibv_create_srq`: the limit means nothing here, and the queue warns once `ibv_modify_srq` set one.
pub(crate) unsafe extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: the caller passes valid attributes.
    let init = unsafe { &mut *init };
    let attr = &mut init.attr;
    if attr.max_wr == 0 || attr.max_wr > MAX_SRQ_WR || attr.max_sge > MAX_SRQ_SGE {
        return null(libc::EINVAL);
    }
    attr.max_sge = attr.max_sge.max(1);
    // SAFETY: the caller passes a live protection domain.
    let domain = unsafe { domain(pd) };
    // SAFETY: a live protection domain's context is live.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let context_data = unsafe { context_data(context) };
    let mut c: ibv_srq = zeroed();
    c.context = context;
    c.srq_context = init.srq_context;
    c.pd = pd;
    let (depth, max_sge) = (attr.max_wr as usize, attr.max_sge as usize);
    let made: Result<_, std::convert::Infallible> = Srq::create(c, |identity| {
        let events = Arc::clone(&context_data.async_events);
        let queue = SharedReceiveQueue::new(depth, max_sge, 0, domain.domain.id, identity, events);
        Ok(SrqData {
            queue: Arc::new(queue),
            _domain: DomainUse::new(&domain.domain),
            _counted: Counted::new(context_data),
        })
    });
    let Ok(srq) = made;
    let _ = srq.expose_provenance();
    srq
}

/// `man ibv_create_srq_ex`: basic queues only.
pub(crate) unsafe extern "C" fn create_srq_ex(
    context: *mut ibv_context,
    init: *mut ibv_srq_init_attr_ex,
) -> *mut ibv_srq {
    const MASKS: u32 =
        ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_TYPE.0 | ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_PD.0;
    // SAFETY: the caller passes valid attributes.
    let init = unsafe { &mut *init };
    let typed = init.comp_mask & ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_TYPE.0 != 0;
    if init.comp_mask & !MASKS != 0 || (typed && init.srq_type != ibv_srq_type::IBV_SRQT_BASIC) {
        return null(libc::EOPNOTSUPP);
    }
    if init.comp_mask & ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_PD.0 == 0 || init.pd.is_null() {
        return null(libc::EINVAL);
    }
    // SAFETY: the protection domain is live by the caller's promise.
    if unsafe { (*init.pd).context } != context {
        return null(libc::EINVAL);
    }
    let mut basic = ibv_srq_init_attr { srq_context: init.srq_context, attr: init.attr };
    // SAFETY: as above.
    let srq = unsafe { create_srq(init.pd, &raw mut basic) };
    init.attr = basic.attr;
    srq
}

/// `man ibv_get_srq_num`: numbers are for XRC.
pub(crate) unsafe extern "C" fn get_srq_num(_srq: *mut ibv_srq, _num: *mut u32) -> c_int {
    libc::EOPNOTSUPP
}

pub(crate) unsafe extern "C" fn modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    const MAX_WR: u32 = ibv_srq_attr_mask::IBV_SRQ_MAX_WR.0;
    const LIMIT: u32 = ibv_srq_attr_mask::IBV_SRQ_LIMIT.0;
    let mask = mask.cast_unsigned();
    // SAFETY: the caller passes valid attributes.
    let attr = unsafe { &*attr };
    let depth = (mask & MAX_WR != 0).then_some(attr.max_wr);
    let limit = (mask & LIMIT != 0).then_some(attr.srq_limit as usize);
    if mask & !(MAX_WR | LIMIT) != 0 || depth.is_some_and(|n| n == 0 || n > MAX_SRQ_WR) {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live queue.
    let queue = &unsafe { data(srq) }.queue;
    if queue.modify(depth.map(|n| n as usize), limit) { 0 } else { libc::EINVAL }
}

pub(crate) unsafe extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: the caller passes a live queue.
    let queue = &unsafe { data(srq) }.queue;
    let (depth, limit) = queue.query();
    let told = ibv_srq_attr {
        max_wr: u32::try_from(depth).unwrap_or(MAX_SRQ_WR),
        max_sge: u32::try_from(queue.max_sge()).unwrap_or(MAX_SRQ_SGE),
        srq_limit: u32::try_from(limit).unwrap_or(0),
    };
    // SAFETY: the caller passes a pointer that is valid for writes.
    unsafe { attr.write(told) };
    0
}

pub(crate) unsafe extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: the caller passes a live queue.
    let data = unsafe { data(srq) };
    if load(&data.queue.users) > 0 {
        return libc::EBUSY;
    }
    if !data.queue.async_events.close(&data.queue.event_count) {
        return libc::EBUSY;
    }
    data.queue.async_events.forget(&data.queue.event_count);
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { Srq::free(srq) });
    0
}

pub(crate) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    mut wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue.
    let queue = &unsafe { data(srq) }.queue;
    while !wr.is_null() {
        // SAFETY: the caller passes a list of valid work requests.
        let request = unsafe { &*wr };
        // SAFETY: with valid lists of elements.
        let result = unsafe { sges(request.sg_list, request.num_sge) }
            .and_then(|sges| queue.push(request.wr_id, sges).map_err(errno_of_receive));
        if let Err(errno) = result {
            // SAFETY: the caller passes a pointer that is valid for writes.
            unsafe { *bad_wr = wr };
            return errno;
        }
        wr = request.next;
    }
    0
}
