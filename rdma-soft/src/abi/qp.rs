//! Queue pairs: create, query, destroy; multicast groups.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::domain::{DomainUse, domain};
use super::object::{Object, minus_one, null, zeroed};
use super::qp_ex::{self, Builder};
use super::{cq, srq};
use crate::device::{AttachError, Handle, Parts, QueuePair, address_of_gid};
use crate::proto::{Config, State};
use crate::wire::Transport;

/// Limits of a queue pair.
pub(crate) const MAX_WR: u32 = 1 << 14;
pub(crate) const MAX_SGE: usize = 32;
pub(crate) const MAX_INLINE: u32 = 1024;

/// Our part of a queue pair, extended or not.
pub(crate) struct QpData {
    pub(crate) device: Arc<Handle>,
    pub(crate) qp: Arc<QueuePair>,
    /// What the last changes said, for queries and for what later changes build on.
    pub(crate) attr: Mutex<ibv_qp_attr>,
    init: ibv_qp_init_attr,
    /// The work requests between `wr_start` and `wr_complete`, if the program builds them so.
    pub(crate) builder: Option<Box<Builder>>,
    _domain: DomainUse,
    _counted: Counted,
}

pub(crate) type Qp = Object<ibv_qp_ex, QpData>;

/// # Safety
///
/// `qp` is a live queue pair of this device.
pub(crate) unsafe fn data<'a>(qp: *mut ibv_qp) -> &'a QpData {
    // SAFETY: every queue pair is made as an extended one, of which `ibv_qp` is the beginning.
    unsafe { Qp::data(qp.cast()) }
}

impl QpData {
    pub(crate) fn attr(&self) -> MutexGuard<'_, ibv_qp_attr> {
        self.attr.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn state_to_c(state: State) -> ibv_qp_state {
    match state {
        State::Reset => ibv_qp_state::IBV_QPS_RESET,
        State::Init => ibv_qp_state::IBV_QPS_INIT,
        State::Rtr => ibv_qp_state::IBV_QPS_RTR,
        State::Rts => ibv_qp_state::IBV_QPS_RTS,
        State::Sqd => ibv_qp_state::IBV_QPS_SQD,
        State::Sqe => ibv_qp_state::IBV_QPS_SQE,
        State::Err => ibv_qp_state::IBV_QPS_ERR,
    }
}

/// Checks what is asked for against the limits, and rounds up as the kernel's Soft-RoCE does.
fn check_cap(cap: &mut ibv_qp_cap, has_srq: bool) -> Result<(), c_int> {
    let max_sge = u32::try_from(MAX_SGE).unwrap_or(u32::MAX);
    if cap.max_send_wr > MAX_WR || cap.max_send_sge > max_sge || cap.max_inline_data > MAX_INLINE {
        return Err(libc::EINVAL);
    }
    if has_srq {
        cap.max_recv_wr = 0;
        cap.max_recv_sge = 0;
    } else if cap.max_recv_wr > MAX_WR || cap.max_recv_sge > max_sge {
        return Err(libc::EINVAL);
    }
    Ok(())
}

/// # Safety
///
/// All objects in `init` are live, and `pd` is.
unsafe fn create(
    context: *mut ibv_context,
    pd: *mut ibv_pd,
    init: &mut ibv_qp_init_attr,
    builder: bool,
) -> Result<*mut ibv_qp_ex, c_int> {
    let transport = match init.qp_type {
        ibv_qp_type::IBV_QPT_RC => Transport::Rc,
        ibv_qp_type::IBV_QPT_UC => Transport::Uc,
        ibv_qp_type::IBV_QPT_UD => Transport::Ud,
        _ => return Err(libc::EOPNOTSUPP),
    };
    if init.send_cq.is_null() || init.recv_cq.is_null() || pd.is_null() {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller's promise: they are live, where there are any.
    let foreign_srq = !init.srq.is_null() && unsafe { (*init.srq).context } != context;
    // SAFETY: as above.
    let cqs = [unsafe { (*init.send_cq).context }, unsafe { (*init.recv_cq).context }];
    // SAFETY: as above.
    if foreign_srq || cqs != [context; 2] || unsafe { (*pd).context } != context {
        return Err(libc::EINVAL);
    }
    check_cap(&mut init.cap, !init.srq.is_null())?;
    // SAFETY: the caller's promise.
    let (context_data, domain) = (unsafe { context_data(context) }, unsafe { domain(pd) });
    // SAFETY: as above.
    let (send_cq, recv_cq) = (unsafe { cq::data(init.send_cq) }, unsafe { cq::data(init.recv_cq) });
    // SAFETY: as above, where there is one.
    let srq = (!init.srq.is_null()).then(|| unsafe { srq::data(init.srq) });
    let cap = init.cap;
    let config = Config {
        max_send_wr: cap.max_send_wr,
        max_send_sge: cap.max_send_sge,
        max_inline_data: cap.max_inline_data,
        sq_sig_all: init.sq_sig_all != 0,
        ..Config::new(transport, 0)
    };
    let mut c: ibv_qp_ex = zeroed();
    c.qp_base.context = context;
    c.qp_base.qp_context = init.qp_context;
    c.qp_base.pd = pd;
    c.qp_base.send_cq = init.send_cq;
    c.qp_base.recv_cq = init.recv_cq;
    c.qp_base.srq = init.srq;
    c.qp_base.state = ibv_qp_state::IBV_QPS_RESET;
    c.qp_base.qp_type = init.qp_type;
    let mut attr: ibv_qp_attr = zeroed();
    attr.cap = cap;
    let raw = Qp::create(c, |identity| {
        let parts = Parts {
            config,
            max_recv_wr: cap.max_recv_wr as usize,
            max_recv_sge: cap.max_recv_sge as usize,
            pd: domain.domain.id,
            send_cq: Arc::clone(&send_cq.queue),
            recv_cq: Arc::clone(&recv_cq.queue),
            srq: srq.map(|srq| Arc::clone(&srq.queue)),
            identity,
            async_events: Arc::clone(&context_data.async_events),
        };
        let qp = context_data.device.create_queue_pair(parts).map_err(|_| libc::ENOMEM)?;
        Ok::<_, c_int>(QpData {
            device: Arc::clone(&context_data.device),
            qp,
            attr: Mutex::new(attr),
            init: *init,
            builder: builder.then(Box::default),
            _domain: DomainUse::new(&domain.domain),
            _counted: Counted::new(context_data),
        })
    })?;
    let _ = raw.expose_provenance();
    // SAFETY: the object is new, and nobody else has it.
    let number = unsafe { Qp::data(raw) }.qp.qp_num;
    // SAFETY: as above.
    let base = unsafe { &mut (*raw).qp_base };
    base.qp_num = number;
    base.handle = number;
    Ok(raw)
}

pub(crate) unsafe extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller passes a live protection domain.
    let context = unsafe { (*pd).context };
    // SAFETY: and valid attributes.
    let init = unsafe { &mut *init };
    // SAFETY: with live objects.
    unsafe { create(context, pd, init, false) }.map_or_else(null, |qp| qp.cast())
}

/// `man ibv_create_qp_ex`.
pub(crate) unsafe extern "C" fn create_qp_ex(
    context: *mut ibv_context,
    init: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    const MASKS: u32 = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_CREATE_FLAGS.0;
    // SAFETY: the caller passes valid attributes.
    let init = unsafe { &mut *init };
    let has = |flag: ibv_qp_init_attr_mask| init.comp_mask & flag.0 != 0;
    if init.comp_mask & !MASKS != 0
        || (has(ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_CREATE_FLAGS) && init.create_flags != 0)
    {
        return null(libc::EOPNOTSUPP);
    }
    if !has(ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD) {
        return null(libc::EINVAL);
    }
    let extended = has(ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS);
    if extended && !qp_ex::offers(init.qp_type, init.send_ops_flags) {
        return null(libc::EOPNOTSUPP);
    }
    let mut basic = ibv_qp_init_attr {
        qp_context: init.qp_context,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        cap: init.cap,
        qp_type: init.qp_type,
        sq_sig_all: init.sq_sig_all,
    };
    if extended {
        basic.cap.max_inline_data = basic.cap.max_inline_data.max(qp_ex::inline_needed(init.send_ops_flags));
    }
    // SAFETY: the objects in the attributes are live by the caller's promise.
    let qp = match unsafe { create(context, init.pd, &mut basic, extended) } {
        Ok(qp) => qp,
        Err(errno) => return null(errno),
    };
    init.cap = basic.cap;
    if extended {
        // SAFETY: the queue pair is new, and nobody else has it.
        qp_ex::fill(unsafe { &mut *qp }, init.send_ops_flags);
    }
    qp.cast()
}

/// `man ibv_qp_to_qp_ex`: null unless it was created with `send_ops_flags`.
pub(crate) unsafe extern "C" fn qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex {
    // SAFETY: the caller passes a live queue pair.
    if unsafe { data(qp) }.builder.is_some() { qp.cast() } else { std::ptr::null_mut() }
}

pub(crate) unsafe extern "C" fn query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { data(qp) };
    let mut told = *data.attr();
    {
        let inner = data.qp.lock();
        let machine = &inner.machine;
        told.qp_state = state_to_c(machine.state());
        told.cur_qp_state = told.qp_state;
        told.sq_psn = machine.send_psn().value();
        told.rq_psn = machine.receive_psn().value();
        told.sq_draining = u8::from(machine.sq_draining());
    }
    // SAFETY: the structure is live; the field is the program's to read only.
    unsafe { (*qp).state = told.qp_state };
    // SAFETY: the caller passes pointers that are valid for writes.
    unsafe { attr.write(told) };
    // SAFETY: as above.
    unsafe { init.write(data.init) };
    0
}

pub(crate) unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { data(qp) };
    if data.device.multicast.has(&data.qp) {
        return libc::EBUSY;
    }
    // The program still has the pointer of an event that it did not acknowledge.
    if !data.qp.async_events.close(&data.qp.event_count) {
        return libc::EBUSY;
    }
    data.device.destroy_queue_pair(&data.qp);
    data.qp.async_events.forget(&data.qp.event_count);
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { Qp::free(qp.cast()) });
    0
}

/// # Safety
///
/// `qp` is live, and `gid` points to a GID.
unsafe fn group(qp: *mut ibv_qp, gid: *const ibv_gid) -> Option<[u8; 16]> {
    // SAFETY: the caller's promise; a GID is bytes to some, so no alignment is asked for.
    let gid = unsafe { gid.cast::<[u8; 16]>().read_unaligned() };
    // SAFETY: as above.
    let is_datagram = unsafe { data(qp) }.qp.transport == Transport::Ud;
    // As `ff0e::ffff:239.1.2.3` or, as the kernel's Soft-RoCE has it, `::ffff:239.1.2.3`.
    (is_datagram && address_of_gid(gid).is_multicast()).then_some(gid)
}

pub(crate) unsafe extern "C" fn attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    // SAFETY: the caller passes a live queue pair and a GID.
    let Some(group) = (unsafe { group(qp, gid) }) else { return libc::EINVAL };
    // SAFETY: as above.
    let data = unsafe { data(qp) };
    match data.device.multicast.attach(&data.device, group, &data.qp) {
        Ok(()) => 0,
        Err(AttachError::Full) => libc::ENOMEM,
        Err(AttachError::System(e)) => e.raw_os_error().unwrap_or(libc::EIO),
    }
}

pub(crate) unsafe extern "C" fn detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    // SAFETY: the caller passes a live queue pair and a GID.
    let Some(group) = (unsafe { group(qp, gid) }) else { return libc::EINVAL };
    // SAFETY: as above.
    let data = unsafe { data(qp) };
    if data.device.multicast.detach(group, &data.qp) { 0 } else { libc::EINVAL }
}

/// `man ibv_query_ece`: there is none.
pub(crate) unsafe extern "C" fn query_ece(_qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    // SAFETY: the caller passes a pointer that is valid for writes.
    unsafe { ece.write(ibv_ece::default()) };
    0
}

/// `man ibv_set_ece`: only none can be set.
pub(crate) unsafe extern "C" fn set_ece(_qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    // SAFETY: the caller passes a valid structure.
    if unsafe { (*ece).options } == 0 { 0 } else { minus_one(libc::EOPNOTSUPP) }
}

/// `man ibv_query_qp_data_in_order`: bytes of a message are not promised to arrive in order.
pub(crate) unsafe extern "C" fn query_qp_data_in_order(
    _qp: *mut ibv_qp,
    _op: ibv_wr_opcode,
    _flags: u32,
) -> c_int {
    0
}
