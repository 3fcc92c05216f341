//! Extended queue pairs: work requests built by calls, posted together.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::slice;

use verbs_sys::*;

use super::mw;
use super::post::{destination, errno_of, inline_bytes, send_flags, to_sge};
use super::qp::{MAX_INLINE, Qp, QpData};
use super::section::Section;
use crate::proto::{Data, Destination, QueuePair, SendOperation, SendRequest, Sge};

type Ops = ibv_qp_create_send_ops_flags;

const SENDS: u64 = (Ops::IBV_QP_EX_WITH_SEND.0 | Ops::IBV_QP_EX_WITH_SEND_WITH_IMM.0) as u64;
const WRITES: u64 = (Ops::IBV_QP_EX_WITH_RDMA_WRITE.0 | Ops::IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM.0) as u64;
const RELIABLE: u64 = (Ops::IBV_QP_EX_WITH_RDMA_READ.0
    | Ops::IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP.0
    | Ops::IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD.0
    | Ops::IBV_QP_EX_WITH_ATOMIC_WRITE.0
    | Ops::IBV_QP_EX_WITH_SEND_WITH_INV.0) as u64;
const LOCAL: u64 = (Ops::IBV_QP_EX_WITH_LOCAL_INV.0 | Ops::IBV_QP_EX_WITH_BIND_MW.0) as u64;

/// Inline bytes that the operations need without being asked for.
pub(crate) fn inline_needed(flags: u64) -> u32 {
    if flags & u64::from(Ops::IBV_QP_EX_WITH_ATOMIC_WRITE.0) == 0 { 0 } else { 8 }
}

/// Whether a queue pair of this type can have all of these operations.
pub(crate) fn offers(qp_type: ibv_qp_type, flags: u64) -> bool {
    let offered = match qp_type {
        ibv_qp_type::IBV_QPT_RC => SENDS | WRITES | RELIABLE | LOCAL,
        ibv_qp_type::IBV_QPT_UC => SENDS | WRITES | LOCAL,
        _ => SENDS,
    };
    flags & !offered == 0
}

/// Puts the functions in that were asked for.
pub(crate) fn fill(qp: &mut ibv_qp_ex, flags: u64) {
    let has = |flag: Ops| flags & u64::from(flag.0) != 0;
    macro_rules! when {
        ($($flag:ident: $name:ident;)*) => {
            $(if has(Ops::$flag) { qp.$name = Some($name); })*
        };
    }
    when! {
        IBV_QP_EX_WITH_SEND: wr_send;
        IBV_QP_EX_WITH_SEND_WITH_IMM: wr_send_imm;
        IBV_QP_EX_WITH_SEND_WITH_INV: wr_send_inv;
        IBV_QP_EX_WITH_RDMA_WRITE: wr_rdma_write;
        IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM: wr_rdma_write_imm;
        IBV_QP_EX_WITH_RDMA_READ: wr_rdma_read;
        IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP: wr_atomic_cmp_swp;
        IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD: wr_atomic_fetch_add;
        IBV_QP_EX_WITH_ATOMIC_WRITE: wr_atomic_write;
        IBV_QP_EX_WITH_LOCAL_INV: wr_local_inv;
        IBV_QP_EX_WITH_BIND_MW: wr_bind_mw;
    }
    qp.wr_set_ud_addr = Some(wr_set_ud_addr);
    qp.wr_set_sge = Some(wr_set_sge);
    qp.wr_set_sge_list = Some(wr_set_sge_list);
    qp.wr_set_inline_data = Some(wr_set_inline_data);
    qp.wr_set_inline_data_list = Some(wr_set_inline_data_list);
    qp.wr_start = Some(wr_start);
    qp.wr_complete = Some(wr_complete);
    qp.wr_abort = Some(wr_abort);
}

/// What is between `wr_start` and `wr_complete`, where one thread is at a time.
pub(crate) struct Builder {
    section: Section,
    requests: UnsafeCell<Requests>,
}

impl Default for Builder {
    fn default() -> Self {
        Builder { section: Section::new(), requests: UnsafeCell::default() }
    }
}

/// The requests that are being built.
#[derive(Default)]
struct Requests {
    requests: Vec<Request>,
    sges: Vec<Sge>,
    inline: Vec<u8>,
    /// The first mistake; it fails all of them.
    error: c_int,
}

struct Request {
    wr_id: u64,
    flags: u32,
    operation: SendOperation,
    /// First element in `sges`, or first byte in `inline`, and how many.
    data: (usize, usize),
    is_inline: bool,
    destination: Option<Destination>,
}

/// Lends what a thread builds for a queue pair; a thread that did not begin builds nothing.
///
/// # Safety
///
/// `qp` is a live queue pair.
unsafe fn build(qp: *mut ibv_qp_ex, f: impl FnOnce(&QpData, &mut Requests)) {
    // SAFETY: the caller's promise.
    let data = unsafe { Qp::data(qp) };
    if let Some(builder) = data.builder.as_ref().filter(|builder| builder.section.is_inside()) {
        // SAFETY: this thread is in the section, so no other is, and no call of this module runs inside of `f`.
        f(data, unsafe { &mut *builder.requests.get() });
    }
}

/// Begins a request with the `wr_id` and `wr_flags` that the program put into the structure, within the section.
///
/// # Safety
///
/// As [`build`].
unsafe fn begin(qp: *mut ibv_qp_ex, operation: Result<SendOperation, c_int>) {
    // SAFETY: the structure is live.
    let wr_id = unsafe { (*qp).wr_id };
    // SAFETY: as above.
    let flags = unsafe { (*qp).wr_flags };
    let start = |builder: &mut Requests| match operation {
        Ok(operation) => builder.requests.push(Request {
            wr_id,
            flags,
            operation,
            data: (0, 0),
            is_inline: false,
            destination: None,
        }),
        Err(errno) => builder.error = errno,
    };
    // SAFETY: the caller's promise.
    unsafe { build(qp, |_, builder| start(builder)) };
}

/// A call that begins a request.
macro_rules! operation {
    ($($name:ident($($arg:ident: $ty:ty),*) = $operation:expr;)*) => {$(
        unsafe extern "C" fn $name(qp: *mut ibv_qp_ex $(, $arg: $ty)*) {
            // SAFETY: the caller passes a live queue pair.
            unsafe { begin(qp, Ok($operation)) };
        }
    )*};
}

operation! {
    wr_send() = SendOperation::Send;
    wr_send_imm(imm: __be32) = SendOperation::SendWithImmediate(imm.to_ne_bytes());
    wr_send_inv(key: u32) = SendOperation::SendWithInvalidate(key);
    wr_rdma_write(rkey: u32, va: u64) = SendOperation::Write { va, rkey };
    wr_rdma_write_imm(rkey: u32, va: u64, imm: __be32) =
        SendOperation::WriteWithImmediate { va, rkey, immediate: imm.to_ne_bytes() };
    wr_rdma_read(rkey: u32, va: u64) = SendOperation::Read { va, rkey };
    wr_atomic_cmp_swp(rkey: u32, va: u64, compare: u64, swap: u64) =
        SendOperation::CompareSwap { va, rkey, compare, swap };
    wr_atomic_fetch_add(rkey: u32, va: u64, add: u64) = SendOperation::FetchAdd { va, rkey, add };
    wr_local_inv(key: u32) = SendOperation::LocalInvalidate(key);
}

/// The one operation that brings its data along: eight bytes, copied now.
unsafe extern "C" fn wr_atomic_write(qp: *mut ibv_qp_ex, rkey: u32, va: u64, atomic_wr: *const c_void) {
    // SAFETY: as the other operations.
    unsafe { begin(qp, Ok(SendOperation::AtomicWrite { va, rkey })) };
    // SAFETY: the caller passes eight readable bytes, which are not written through this pointer.
    unsafe { wr_set_inline_data(qp, atomic_wr.cast_mut(), size_of::<u64>()) };
}

unsafe extern "C" fn wr_bind_mw(
    qp: *mut ibv_qp_ex,
    window: *mut ibv_mw,
    rkey: u32,
    info: *const ibv_mw_bind_info,
) {
    // SAFETY: the caller passes valid information.
    let info = unsafe { &*info };
    // SAFETY: and a live window.
    let request = unsafe { mw::bind_request(window, rkey, info) };
    // SAFETY: as the other operations.
    unsafe { begin(qp, request.map(SendOperation::BindWindow)) };
}

unsafe extern "C" fn wr_set_ud_addr(qp: *mut ibv_qp_ex, ah: *mut ibv_ah, remote_qpn: u32, remote_qkey: u32) {
    // SAFETY: the caller passes a live queue pair.
    let pd = unsafe { Qp::data(qp) }.qp.pd;
    // SAFETY: and a live address handle.
    let to = unsafe { destination(pd, ah, remote_qpn, remote_qkey) };
    let set = |builder: &mut Requests| match (to, builder.requests.last_mut()) {
        (Ok(to), Some(request)) => request.destination = Some(to),
        _ => builder.error = libc::EINVAL,
    };
    // SAFETY: the caller passes a live queue pair.
    unsafe { build(qp, |_, builder| set(builder)) };
}

unsafe extern "C" fn wr_set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    let sge = ibv_sge { addr, length, lkey };
    // SAFETY: the same contract, with a list of one.
    unsafe { wr_set_sge_list(qp, 1, &raw const sge) };
}

unsafe extern "C" fn wr_set_sge_list(qp: *mut ibv_qp_ex, count: usize, list: *const ibv_sge) {
    // SAFETY: the caller passes `count` valid elements.
    let list = if count == 0 { &[] } else { unsafe { slice::from_raw_parts(list, count) } };
    let set = |builder: &mut Requests| {
        let first = builder.sges.len();
        builder.sges.extend(list.iter().map(to_sge));
        match builder.requests.last_mut() {
            Some(request) => (request.data, request.is_inline) = ((first, count), false),
            None => builder.error = libc::EINVAL,
        }
    };
    // SAFETY: the caller passes a live queue pair.
    unsafe { build(qp, |_, builder| set(builder)) };
}

unsafe extern "C" fn wr_set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    let buffer = ibv_data_buf { addr, length };
    // SAFETY: the same contract, with a list of one.
    unsafe { wr_set_inline_data_list(qp, 1, &raw const buffer) };
}

unsafe extern "C" fn wr_set_inline_data_list(qp: *mut ibv_qp_ex, count: usize, list: *const ibv_data_buf) {
    // SAFETY: the caller passes `count` valid buffers.
    let list = if count == 0 { &[] } else { unsafe { slice::from_raw_parts(list, count) } };
    let set = |builder: &mut Requests| {
        let first = builder.inline.len();
        let total = list.iter().try_fold(0usize, |sum, b| sum.checked_add(b.length));
        let Some(total) = total.filter(|total| *total <= MAX_INLINE as usize) else {
            builder.error = libc::EINVAL;
            return;
        };
        for buffer in list {
            // SAFETY: the program's memory, readable during the call.
            builder.inline.extend_from_slice(unsafe {
                inline_bytes(buffer.addr.expose_provenance() as u64, buffer.length)
            });
        }
        match builder.requests.last_mut() {
            Some(request) => (request.data, request.is_inline) = ((first, total), true),
            None => builder.error = libc::EINVAL,
        }
    };
    // SAFETY: the caller passes a live queue pair.
    unsafe { build(qp, |_, builder| set(builder)) };
}

fn clear(builder: &mut Requests) {
    builder.requests.clear();
    builder.sges.clear();
    builder.inline.clear();
    builder.error = 0;
}

/// The section of a queue pair.
///
/// # Safety
///
/// `qp` is a live queue pair.
unsafe fn section<'a>(qp: *mut ibv_qp_ex) -> Option<&'a Section> {
    // SAFETY: the caller's promise.
    let data: &'a QpData = unsafe { Qp::data(qp) };
    data.builder.as_ref().map(|builder| &builder.section)
}

unsafe extern "C" fn wr_start(qp: *mut ibv_qp_ex) {
    // SAFETY: the caller passes a live queue pair.
    unsafe { section(qp) }.iter().for_each(|section| section.enter());
    // SAFETY: as above.
    unsafe { build(qp, |_, builder| clear(builder)) };
}

unsafe extern "C" fn wr_abort(qp: *mut ibv_qp_ex) {
    // SAFETY: as in `wr_start`.
    unsafe { build(qp, |_, builder| clear(builder)) };
    // SAFETY: as above.
    unsafe { section(qp) }.iter().for_each(|section| section.leave());
}

/// Posts what was built: all of it or nothing.
unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // Of a thread that did not begin.
    let mut result = libc::EINVAL;
    // SAFETY: as in `wr_start`.
    unsafe {
        build(qp, |data, builder| {
            result = if builder.error == 0 { post_all(data, builder) } else { builder.error };
            clear(builder);
        });
    }
    // SAFETY: as above.
    unsafe { section(qp) }.iter().for_each(|section| section.leave());
    result
}

impl Request {
    /// Lends it in the form that is posted.
    fn with<R>(&self, builder: &Requests, f: impl FnOnce(&SendRequest<'_>) -> R) -> R {
        let (first, count) = self.data;
        let piece = [if self.is_inline { &builder.inline[first..first + count] } else { &[] }];
        f(&SendRequest {
            wr_id: self.wr_id,
            operation: self.operation,
            flags: send_flags(self.flags),
            data: if self.is_inline {
                Data::Inline(&piece)
            } else {
                Data::Gather(&builder.sges[first..first + count])
            },
            destination: self.destination.as_ref(),
        })
    }
}

fn post_all(data: &QpData, builder: &Requests) -> c_int {
    let check = |machine: &QueuePair, unpolled: u32| {
        (unpolled..).zip(&builder.requests).try_for_each(|(ahead, request)| {
            request.with(builder, |request| machine.check_send(request, ahead))
        })
    };
    let posted = data.device.post_send_checked(&data.qp, check, |poster| {
        for request in &builder.requests {
            // Cannot fail: it was checked under the same lock.
            let _ = request.with(builder, |request| poster.post(request));
        }
    });
    posted.map_or_else(errno_of, |()| 0)
}
