//! Queue pairs: creation, state, destruction.

use core::cell::UnsafeCell;
use core::ffi::c_int;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use super::cq::{Cq, Entry};
use super::device::{MAX_INLINE, MAX_QUEUE, MAX_SGE};
use super::event::{Acks, Subject};
use super::fail;
use super::memory::{Pd, is_valid_path};
use super::srq::{ReceiveRing, Srq};
use super::transition;
use crate::bindings::*;

/// A queue pair.
#[repr(C)]
pub(crate) struct Qp {
    base: UnsafeCell<ibv_qp>,
    pub(crate) number: u32,
    pub(crate) qp_type: ibv_qp_type,
    /// An `ibv_qp_state`; changes under the send queue's lock.
    state: AtomicU32,
    pub(crate) cap: ibv_qp_cap,
    /// The public structure's pointers, which never change.
    pd: *mut ibv_pd,
    send_cq: *mut ibv_cq,
    recv_cq: *mut ibv_cq,
    srq: *mut ibv_srq,
    pub(crate) signal_all: bool,
    /// Requests posted to the send queue, wrapping.
    pub(crate) posted: Mutex<u32>,
    /// Requests whose slot is free again: `posted` as of the last completion that was polled.
    pub(crate) retired: AtomicU32,
    pub(crate) receives: Mutex<ReceiveRing>,
    /// What the transitions set, for queries.
    attr: Mutex<ibv_qp_attr>,
    pub(crate) acks: Acks,
}

impl Qp {
    /// # Safety
    ///
    /// `raw` is a live queue pair of this provider.
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_qp) -> &'a Qp {
        // SAFETY: it points to the first field of a `Qp`.
        unsafe { &*raw.cast::<Qp>() }
    }

    fn as_raw(&self) -> *mut ibv_qp {
        ptr::from_ref(self).cast_mut().cast()
    }

    pub(crate) fn state(&self) -> ibv_qp_state {
        ibv_qp_state(self.state.load(Ordering::Relaxed))
    }

    fn set_state(&self, state: ibv_qp_state) {
        self.state.store(state.0, Ordering::Relaxed);
    }

    fn pd(&self) -> &Pd {
        // SAFETY: a domain outlives its objects.
        unsafe { Pd::from_raw(self.pd) }
    }

    pub(crate) fn send_cq(&self) -> &Cq {
        // SAFETY: completion queues outlive their queue pairs (destroying one is refused otherwise).
        unsafe { Cq::from_raw(self.send_cq) }
    }

    pub(crate) fn recv_cq(&self) -> &Cq {
        // SAFETY: as above.
        unsafe { Cq::from_raw(self.recv_cq) }
    }

    pub(crate) fn srq(&self) -> Option<&Srq> {
        // SAFETY: a shared receive queue outlives its queue pairs.
        (!self.srq.is_null()).then(|| unsafe { Srq::from_raw(self.srq) })
    }

    /// Frees the slots of the send queue up to a request whose completion was polled.
    #[inline]
    pub(crate) fn retire(&self, posted: u32) {
        self.retired.store(posted, Ordering::Release);
    }

    /// Goes to ERR and flushes the receives. The send queue's lock is held, and nothing waits in that queue.
    pub(crate) fn enter_error(&self) {
        if self.state() == ibv_qp_state::IBV_QPS_ERR {
            return;
        }
        self.set_state(ibv_qp_state::IBV_QPS_ERR);
        let mut receives = self.receives.lock();
        while let Some(receive) = receives.pop() {
            self.recv_cq().push(self.flushed_receive(receive.wr_id));
        }
        drop(receives);
        if !self.srq.is_null() {
            let element = ibv_async_event__bindgen_ty_1 { qp: self.as_raw() };
            self.pd().context().raise(ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED, element);
        }
    }

    /// The completion of a receive that no message will take.
    pub(crate) fn flushed_receive(&self, wr_id: u64) -> Entry {
        let status = ibv_wc_status::IBV_WC_WR_FLUSH_ERR;
        let wc = ibv_wc {
            wr_id,
            status,
            opcode: ibv_wc_opcode::IBV_WC_RECV,
            qp_num: self.number,
            ..Default::default()
        };
        Entry { wc, solicited: false, retires: None }
    }

    /// Forgets all that was posted and completed.
    fn clear(&self, posted: &mut u32) {
        let keep = self.pd().context().device().keeps_completions.load(Ordering::Relaxed);
        self.send_cq().disown(self.number, keep);
        self.recv_cq().disown(self.number, keep);
        self.receives.lock().clear();
        *posted = 0;
        self.retired.store(0, Ordering::Release);
    }
}

pub(crate) unsafe extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller passes valid attributes, which are also an output.
    let init = unsafe { &mut *init };
    let shares = !init.srq.is_null();
    if init.send_cq.is_null() || init.recv_cq.is_null() {
        return fail(libc::EINVAL);
    }
    match init.qp_type {
        ibv_qp_type::IBV_QPT_RC | ibv_qp_type::IBV_QPT_UC | ibv_qp_type::IBV_QPT_UD => {}
        _ => return fail(libc::EOPNOTSUPP),
    }
    if shares {
        init.cap.max_recv_wr = 0;
        init.cap.max_recv_sge = 0;
    }
    let cap = init.cap;
    if cap.max_send_wr.max(cap.max_recv_wr) > MAX_QUEUE
        || cap.max_send_sge.max(cap.max_recv_sge) > MAX_SGE
        || cap.max_inline_data > MAX_INLINE
    {
        return fail(libc::EINVAL);
    }
    static NEXT_NUMBER: AtomicU32 = AtomicU32::new(0x11);
    let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed) & 0x00ff_ffff;
    // SAFETY: the caller passes a live domain.
    let domain = unsafe { Pd::from_raw(pd) };
    // SAFETY: all zeroes is a valid `ibv_qp`: null pointers, an unlocked mutex, a condition without waiters.
    let mut base = unsafe { MaybeUninit::<ibv_qp>::zeroed().assume_init() };
    base.context = domain.raw_context();
    base.qp_context = init.qp_context;
    base.pd = pd;
    base.send_cq = init.send_cq;
    base.recv_cq = init.recv_cq;
    base.srq = init.srq;
    base.handle = number;
    base.qp_num = number;
    base.state = ibv_qp_state::IBV_QPS_RESET;
    base.qp_type = init.qp_type;
    let qp = Qp {
        base: UnsafeCell::new(base),
        number,
        qp_type: init.qp_type,
        state: AtomicU32::new(ibv_qp_state::IBV_QPS_RESET.0),
        cap,
        pd,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        signal_all: init.sq_sig_all != 0,
        posted: Mutex::new(0),
        retired: AtomicU32::new(0),
        receives: Mutex::new(ReceiveRing::new(cap.max_recv_wr)),
        attr: Mutex::new(ibv_qp_attr { cap, ..Default::default() }),
        acks: Acks::default(),
    };
    domain.born();
    qp.send_cq().uses.fetch_add(1, Ordering::Relaxed);
    qp.recv_cq().uses.fetch_add(1, Ordering::Relaxed);
    if let Some(srq) = qp.srq() {
        srq.uses.fetch_add(1, Ordering::Relaxed);
    }
    Box::into_raw(Box::new(qp)).cast()
}

pub(crate) unsafe extern "C" fn modify_qp(raw: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(raw) };
    // SAFETY: and valid attributes.
    let attr = unsafe { &*attr };
    let mask = ibv_qp_attr_mask(mask.cast_unsigned());
    let mut posted = qp.posted.lock();
    let from = qp.state();
    let to = if has(mask, ibv_qp_attr_mask::IBV_QP_STATE) { attr.qp_state } else { from };
    if has(mask, ibv_qp_attr_mask::IBV_QP_CUR_STATE) && attr.cur_qp_state != from {
        return libc::EINVAL;
    }
    if !transition::is_allowed(qp.qp_type, from, to, mask) || !are_valid(attr, mask) {
        return libc::EINVAL;
    }
    merge(&mut qp.attr.lock(), attr, mask);
    match to {
        ibv_qp_state::IBV_QPS_ERR => qp.enter_error(),
        ibv_qp_state::IBV_QPS_RESET => {
            qp.set_state(to);
            qp.clear(&mut posted);
        }
        _ => qp.set_state(to),
    }
    // SAFETY: the caller serialises transitions with other uses of the public structure.
    unsafe { (*raw).state = to };
    0
}

fn has(mask: ibv_qp_attr_mask, bit: ibv_qp_attr_mask) -> bool {
    mask.0 & bit.0 != 0
}

/// Whether the attributes that `mask` names have values that this device can use.
fn are_valid(attr: &ibv_qp_attr, mask: ibv_qp_attr_mask) -> bool {
    let absent = |bit| !has(mask, bit);
    (absent(ibv_qp_attr_mask::IBV_QP_PORT) || attr.port_num == 1)
        && (absent(ibv_qp_attr_mask::IBV_QP_PKEY_INDEX) || attr.pkey_index == 0)
        && (absent(ibv_qp_attr_mask::IBV_QP_AV) || is_valid_path(&attr.ah_attr))
        && (absent(ibv_qp_attr_mask::IBV_QP_PATH_MTU)
            || (ibv_mtu::IBV_MTU_256.0..=ibv_mtu::IBV_MTU_4096.0).contains(&attr.path_mtu.0))
        && (absent(ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER) || attr.min_rnr_timer < 32)
        && (absent(ibv_qp_attr_mask::IBV_QP_TIMEOUT) || attr.timeout < 32)
        && (absent(ibv_qp_attr_mask::IBV_QP_RETRY_CNT) || attr.retry_cnt < 8)
        && (absent(ibv_qp_attr_mask::IBV_QP_RNR_RETRY) || attr.rnr_retry < 8)
}

/// Keeps the attributes that `mask` names.
fn merge(kept: &mut ibv_qp_attr, new: &ibv_qp_attr, mask: ibv_qp_attr_mask) {
    macro_rules! keep {
        ($($bit:ident: $($field:ident)*;)*) => {$(
            if has(mask, ibv_qp_attr_mask::$bit) {
                $(kept.$field = new.$field;)*
            }
        )*};
    }
    keep! {
        IBV_QP_ACCESS_FLAGS: qp_access_flags;
        IBV_QP_PKEY_INDEX: pkey_index;
        IBV_QP_PORT: port_num;
        IBV_QP_QKEY: qkey;
        IBV_QP_AV: ah_attr;
        IBV_QP_PATH_MTU: path_mtu;
        IBV_QP_TIMEOUT: timeout;
        IBV_QP_RETRY_CNT: retry_cnt;
        IBV_QP_RNR_RETRY: rnr_retry;
        IBV_QP_RQ_PSN: rq_psn;
        IBV_QP_SQ_PSN: sq_psn;
        IBV_QP_MAX_QP_RD_ATOMIC: max_rd_atomic;
        IBV_QP_MAX_DEST_RD_ATOMIC: max_dest_rd_atomic;
        IBV_QP_ALT_PATH: alt_ah_attr alt_pkey_index alt_port_num alt_timeout;
        IBV_QP_MIN_RNR_TIMER: min_rnr_timer;
        IBV_QP_PATH_MIG_STATE: path_mig_state;
        IBV_QP_DEST_QPN: dest_qp_num;
        IBV_QP_EN_SQD_ASYNC_NOTIFY: en_sqd_async_notify;
    }
}

/// Answers with every attribute, whatever the mask: the manual page allows it.
pub(crate) unsafe extern "C" fn query_qp(
    raw: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(raw) };
    let state = qp.state();
    let found = ibv_qp_attr { qp_state: state, cur_qp_state: state, ..*qp.attr.lock() };
    // SAFETY: the caller passes valid output pointers.
    unsafe { attr.write(found) };
    let base = qp.base.get();
    let created = ibv_qp_init_attr {
        // SAFETY: set at creation and never changed.
        qp_context: unsafe { (*base).qp_context },
        send_cq: qp.send_cq,
        recv_cq: qp.recv_cq,
        srq: qp.srq,
        cap: qp.cap,
        qp_type: qp.qp_type,
        sq_sig_all: qp.signal_all.into(),
    };
    // SAFETY: as above.
    unsafe { init.write(created) };
    0
}

pub(crate) unsafe extern "C" fn destroy_qp(raw: *mut ibv_qp) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(raw) };
    qp.clear(&mut qp.posted.lock());
    qp.pd().context().async_events.settle(&qp.acks, |event| Subject::of(event) == Subject::Qp(raw));
    qp.send_cq().uses.fetch_sub(1, Ordering::Release);
    qp.recv_cq().uses.fetch_sub(1, Ordering::Release);
    if let Some(srq) = qp.srq() {
        srq.uses.fetch_sub(1, Ordering::Release);
    }
    qp.pd().died();
    // SAFETY: it came from `Box::into_raw` in `create_qp`, and nothing refers to it any more.
    drop(unsafe { Box::from_raw(raw.cast::<Qp>()) });
    0
}

/// Multicast groups: joining and leaving one succeeds and has no effect.
pub(crate) unsafe extern "C" fn attach_mcast(qp: *mut ibv_qp, _gid: *const ibv_gid, _lid: u16) -> c_int {
    // SAFETY: the caller passes a live pair.
    match unsafe { Qp::from_raw(qp) }.qp_type {
        ibv_qp_type::IBV_QPT_UD => 0,
        _ => libc::EINVAL,
    }
}
