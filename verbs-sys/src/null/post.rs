//! Posting: every work request completes here and now.

use core::ffi::c_int;
use core::slice;
use core::sync::atomic::Ordering;

use super::cq::Entry;
use super::device::MAX_MESSAGE;
use super::memory::new_key;
use super::qp::Qp;
use super::srq::{Receive, Srq};
use crate::bindings::*;

/// What the network adds in front of a UD message.
const GRH: u32 = 40;

/// A send request, reduced to what completing it needs.
struct Send {
    wr_id: u64,
    flags: ibv_send_flags,
    /// The sender's completion.
    opcode: ibv_wc_opcode,
    length: u32,
    /// The receiver's completion, for requests that take a receive.
    delivers: Option<Delivery>,
}

struct Delivery {
    opcode: ibv_wc_opcode,
    flags: ibv_wc_flags,
    /// Immediate data or an invalidated key, as in the request.
    word: u32,
}

/// The length of a gather or scatter list; `None` when it has too many entries or too many bytes.
///
/// # Safety
///
/// `list` has `count` valid entries.
#[inline]
unsafe fn total(list: *const ibv_sge, count: c_int, max: u32) -> Option<u64> {
    let count = u32::try_from(count).ok().filter(|&count| count <= max)?;
    if count == 0 {
        return Some(0);
    }
    // SAFETY: the caller's promise; an empty list, whose pointer may be anything, was handled above.
    let list = unsafe { slice::from_raw_parts(list, count as usize) };
    Some(list.iter().map(|sge| u64::from(sge.length)).sum())
}

/// Reads a send request. `None` for one that the device refuses.
///
/// # Safety
///
/// `wr` is a valid request for this pair.
#[inline]
unsafe fn read_send(qp: &Qp, wr: &ibv_send_wr) -> Option<Send> {
    // SAFETY: the caller's promise.
    let length = unsafe { total(wr.sg_list, wr.num_sge, qp.cap.max_send_sge) }?;
    let length = u32::try_from(length).ok().filter(|&length| length <= MAX_MESSAGE)?;
    if wr.send_flags & ibv_send_flags::IBV_SEND_INLINE.0 != 0 && length > qp.cap.max_inline_data {
        return None;
    }
    let deliver = |opcode, flags, word| Some(Delivery { opcode, flags, word });
    // SAFETY: the field is an integer in both of the union's readings; it is used only for the
    // opcodes whose requests set it.
    let word = || unsafe { wr.__bindgen_anon_1.imm_data };
    let none = ibv_wc_flags(0);
    let (opcode, delivers) = match wr.opcode {
        ibv_wr_opcode::IBV_WR_SEND => {
            (ibv_wc_opcode::IBV_WC_SEND, deliver(ibv_wc_opcode::IBV_WC_RECV, none, 0))
        }
        ibv_wr_opcode::IBV_WR_SEND_WITH_IMM => (
            ibv_wc_opcode::IBV_WC_SEND,
            deliver(ibv_wc_opcode::IBV_WC_RECV, ibv_wc_flags::IBV_WC_WITH_IMM, word()),
        ),
        _ if qp.qp_type == ibv_qp_type::IBV_QPT_UD => return None,
        ibv_wr_opcode::IBV_WR_RDMA_WRITE => (ibv_wc_opcode::IBV_WC_RDMA_WRITE, None),
        ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM => (
            ibv_wc_opcode::IBV_WC_RDMA_WRITE,
            deliver(ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM, ibv_wc_flags::IBV_WC_WITH_IMM, word()),
        ),
        _ if qp.qp_type != ibv_qp_type::IBV_QPT_RC => return None,
        ibv_wr_opcode::IBV_WR_SEND_WITH_INV => (
            ibv_wc_opcode::IBV_WC_SEND,
            deliver(ibv_wc_opcode::IBV_WC_RECV, ibv_wc_flags::IBV_WC_WITH_INV, word()),
        ),
        ibv_wr_opcode::IBV_WR_RDMA_READ => (ibv_wc_opcode::IBV_WC_RDMA_READ, None),
        ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP => (ibv_wc_opcode::IBV_WC_COMP_SWAP, None),
        ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD => (ibv_wc_opcode::IBV_WC_FETCH_ADD, None),
        ibv_wr_opcode::IBV_WR_LOCAL_INV => (ibv_wc_opcode::IBV_WC_LOCAL_INV, None),
        ibv_wr_opcode::IBV_WR_BIND_MW => (ibv_wc_opcode::IBV_WC_BIND_MW, None),
        _ => return None,
    };
    Some(Send { wr_id: wr.wr_id, flags: ibv_send_flags(wr.send_flags), opcode, length, delivers })
}

impl Qp {
    /// Completes one request. The send queue's lock is held.
    #[inline]
    fn send(&self, posted: &mut u32, send: &Send) -> c_int {
        let flushes = match self.state() {
            ibv_qp_state::IBV_QPS_RTS | ibv_qp_state::IBV_QPS_SQD => false,
            ibv_qp_state::IBV_QPS_ERR | ibv_qp_state::IBV_QPS_SQE => true,
            _ => return libc::EINVAL,
        };
        if posted.wrapping_sub(self.retired.load(Ordering::Acquire)) >= self.cap.max_send_wr {
            return libc::ENOMEM;
        }
        *posted = posted.wrapping_add(1);
        let status = if flushes {
            ibv_wc_status::IBV_WC_WR_FLUSH_ERR
        } else {
            send.delivers
                .as_ref()
                .map_or(ibv_wc_status::IBV_WC_SUCCESS, |delivery| self.deliver(send, delivery))
        };
        let failed = status != ibv_wc_status::IBV_WC_SUCCESS;
        if failed || self.signal_all || send.flags.0 & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0 {
            let wc = ibv_wc {
                wr_id: send.wr_id,
                status,
                opcode: send.opcode,
                byte_len: send.length,
                qp_num: self.number,
                ..Default::default()
            };
            self.send_cq().push(Entry { wc, solicited: false, retires: Some((self, *posted)) });
        }
        if failed {
            self.enter_error();
        }
        0
    }

    /// Completes the receive that a message takes; the status is the sender's.
    #[inline]
    fn deliver(&self, send: &Send, delivery: &Delivery) -> ibv_wc_status {
        let receive = match self.srq() {
            Some(srq) => srq.take(),
            None => self.receives.lock().pop(),
        };
        let Some(receive) = receive else { return ibv_wc_status::IBV_WC_SUCCESS };
        let ud = self.qp_type == ibv_qp_type::IBV_QPT_UD;
        let byte_len = send.length.saturating_add(if ud { GRH } else { 0 });
        // A write's data does not go to the receive's buffers.
        let fits = delivery.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM
            || u64::from(byte_len) <= receive.capacity;
        let mut wc = ibv_wc {
            wr_id: receive.wr_id,
            opcode: delivery.opcode,
            byte_len,
            __bindgen_anon_1: ibv_wc__bindgen_ty_1 { imm_data: delivery.word },
            qp_num: self.number,
            src_qp: self.number,
            wc_flags: delivery.flags.0 | if ud { ibv_wc_flags::IBV_WC_GRH.0 } else { 0 },
            ..Default::default()
        };
        if !fits {
            wc.status = ibv_wc_status::IBV_WC_LOC_LEN_ERR;
        }
        let solicited = send.flags.0 & ibv_send_flags::IBV_SEND_SOLICITED.0 != 0;
        self.recv_cq().push(Entry { wc, solicited, retires: None });
        if fits { ibv_wc_status::IBV_WC_SUCCESS } else { ibv_wc_status::IBV_WC_REM_INV_REQ_ERR }
    }
}

pub(crate) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(qp) };
    let mut posted = qp.posted.lock();
    // SAFETY: the caller passes a list of valid requests that ends with a null pointer.
    while let Some(request) = unsafe { wr.as_ref() } {
        // SAFETY: as above.
        let status =
            unsafe { read_send(qp, request) }.map_or(libc::EINVAL, |send| qp.send(&mut posted, &send));
        if status != 0 {
            // SAFETY: the caller passes a valid output pointer.
            unsafe { bad_wr.write(wr) };
            return status;
        }
        wr = request.next;
    }
    0
}

pub(crate) unsafe extern "C" fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(qp) };
    // SAFETY: and a valid request.
    let bind = unsafe { &*bind };
    let send = Send {
        wr_id: bind.wr_id,
        flags: ibv_send_flags(bind.send_flags),
        opcode: ibv_wc_opcode::IBV_WC_BIND_MW,
        length: 0,
        delivers: None,
    };
    let status = qp.send(&mut qp.posted.lock(), &send);
    if status == 0 {
        // SAFETY: the caller passes a live window, and serialises its uses with this call.
        unsafe { (*mw).rkey = new_key() };
    }
    status
}

/// Reads a receive request.
///
/// # Safety
///
/// `wr` is a valid request.
#[inline]
unsafe fn read_receive(wr: &ibv_recv_wr, max_sge: u32) -> Option<Receive> {
    // SAFETY: the caller's promise.
    let capacity = unsafe { total(wr.sg_list, wr.num_sge, max_sge) }?;
    Some(Receive { wr_id: wr.wr_id, capacity })
}

pub(crate) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live pair.
    let qp = unsafe { Qp::from_raw(qp) };
    let mut receives = qp.receives.lock();
    // SAFETY: the caller passes a list of valid requests that ends with a null pointer.
    while let Some(request) = unsafe { wr.as_ref() } {
        // SAFETY: as above.
        let status = match unsafe { read_receive(request, qp.cap.max_recv_sge) } {
            _ if qp.state() == ibv_qp_state::IBV_QPS_RESET || qp.srq().is_some() => libc::EINVAL,
            None => libc::EINVAL,
            Some(receive) if qp.state() == ibv_qp_state::IBV_QPS_ERR => {
                qp.recv_cq().push(qp.flushed_receive(receive.wr_id));
                0
            }
            Some(receive) if receives.push(receive) => 0,
            Some(_) => libc::ENOMEM,
        };
        if status != 0 {
            // SAFETY: the caller passes a valid output pointer.
            unsafe { bad_wr.write(wr) };
            return status;
        }
        wr = request.next;
    }
    0
}

pub(crate) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    mut wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue.
    let srq = unsafe { Srq::from_raw(srq) };
    let mut shared = srq.shared.lock();
    // SAFETY: the caller passes a list of valid requests that ends with a null pointer.
    while let Some(request) = unsafe { wr.as_ref() } {
        // SAFETY: as above.
        let status = match unsafe { read_receive(request, srq.max_sge) } {
            None => libc::EINVAL,
            Some(receive) if shared.ring.push(receive) => 0,
            Some(_) => libc::ENOMEM,
        };
        if status != 0 {
            // SAFETY: the caller passes a valid output pointer.
            unsafe { bad_wr.write(wr) };
            return status;
        }
        wr = request.next;
    }
    0
}
