//! Posting work requests from C lists.

use std::ffi::c_int;
use std::slice;

use verbs_sys::*;

use super::{ah, mw, qp};
use crate::device::{Poster, QueuePair, ReceiveError};
use crate::proto::{Data, Destination, PostError, SendFlags, SendOperation, SendRequest, Sge};
use crate::wire::Transport;

/// The errno of a request that was not taken.
pub(crate) fn errno_of(error: PostError) -> c_int {
    match error {
        PostError::QueueFull => libc::ENOMEM,
        _ => libc::EINVAL,
    }
}

pub(crate) fn errno_of_receive(error: ReceiveError) -> c_int {
    match error {
        ReceiveError::Full => libc::ENOMEM,
        ReceiveError::TooManySges | ReceiveError::WrongState => libc::EINVAL,
    }
}

pub(crate) fn send_flags(flags: u32) -> SendFlags {
    let flag = |c: ibv_send_flags, flag| if flags & c.0 != 0 { flag } else { SendFlags::empty() };
    flag(ibv_send_flags::IBV_SEND_SIGNALED, SendFlags::SIGNALED)
        | flag(ibv_send_flags::IBV_SEND_FENCE, SendFlags::FENCE)
        | flag(ibv_send_flags::IBV_SEND_SOLICITED, SendFlags::SOLICITED)
}

pub(crate) fn to_sge(sge: &ibv_sge) -> Sge {
    Sge { addr: sge.addr, length: sge.length, lkey: sge.lkey }
}

/// A list of elements as the device takes it; no request has more than [`qp::MAX_SGE`].
///
/// # Safety
///
/// `list` points to `count` valid elements, unless that is zero or too many.
pub(crate) unsafe fn sges<'a>(
    list: *const ibv_sge,
    count: c_int,
) -> Result<impl ExactSizeIterator<Item = Sge> + use<'a>, c_int> {
    // A count that makes no sense comes with no such list, most likely.
    let count = usize::try_from(count).ok().filter(|n| *n <= qp::MAX_SGE).ok_or(libc::EINVAL)?;
    let list: &'a [ibv_sge] = if count == 0 {
        &[]
    } else {
        // SAFETY: the caller's promise.
        unsafe { slice::from_raw_parts(list, count) }
    };
    Ok(list.iter().map(to_sge))
}

/// Bytes that a request carries inline.
///
/// # Safety
///
/// The element's memory is valid for reads for `'a`, which is the post.
pub(crate) unsafe fn inline_bytes<'a>(address: u64, length: usize) -> &'a [u8] {
    let Ok(address) = usize::try_from(address) else { return &[] };
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller's promise; the program owns the memory and lends it for the call.
    unsafe { slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
}

/// What a request does.
///
/// # Safety
///
/// `wr` is a valid request: its unions hold what its opcode says.
unsafe fn operation(wr: &ibv_send_wr) -> Result<SendOperation, c_int> {
    // SAFETY: all members of the union are plain integers.
    let immediate = unsafe { wr.__bindgen_anon_1.imm_data }.to_ne_bytes();
    // SAFETY: as above.
    let key = unsafe { wr.__bindgen_anon_1.invalidate_rkey };
    // SAFETY: as above.
    let rdma = unsafe { wr.wr.rdma };
    // SAFETY: as above.
    let atomic = unsafe { wr.wr.atomic };
    let (va, rkey) = (rdma.remote_addr, rdma.rkey);
    Ok(match wr.opcode {
        ibv_wr_opcode::IBV_WR_SEND => SendOperation::Send,
        ibv_wr_opcode::IBV_WR_SEND_WITH_IMM => SendOperation::SendWithImmediate(immediate),
        ibv_wr_opcode::IBV_WR_SEND_WITH_INV => SendOperation::SendWithInvalidate(key),
        ibv_wr_opcode::IBV_WR_RDMA_WRITE => SendOperation::Write { va, rkey },
        ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM => {
            SendOperation::WriteWithImmediate { va, rkey, immediate }
        }
        ibv_wr_opcode::IBV_WR_RDMA_READ => SendOperation::Read { va, rkey },
        ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP => SendOperation::CompareSwap {
            va: atomic.remote_addr,
            rkey: atomic.rkey,
            compare: atomic.compare_add,
            swap: atomic.swap,
        },
        ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD => {
            SendOperation::FetchAdd { va: atomic.remote_addr, rkey: atomic.rkey, add: atomic.compare_add }
        }
        ibv_wr_opcode::IBV_WR_ATOMIC_WRITE => SendOperation::AtomicWrite { va, rkey },
        ibv_wr_opcode::IBV_WR_LOCAL_INV => SendOperation::LocalInvalidate(key),
        ibv_wr_opcode::IBV_WR_BIND_MW => {
            // SAFETY: a bind has a window and its information there.
            let bind = unsafe { &wr.__bindgen_anon_2.bind_mw };
            // SAFETY: which are live by the caller's promise.
            SendOperation::BindWindow(unsafe { mw::bind_request(bind.mw, bind.rkey, &bind.bind_info) }?)
        }
        _ => return Err(libc::EINVAL),
    })
}

/// Posts one request of a list.
///
/// # Safety
///
/// `wr` is a valid request for this queue pair.
unsafe fn post_one(qp: &QueuePair, wr: &ibv_send_wr, poster: &mut Poster<'_>) -> Result<(), c_int> {
    // SAFETY: the caller's promise.
    let operation = unsafe { operation(wr) }?;
    // SAFETY: as above.
    let elements = unsafe { sges(wr.sg_list, wr.num_sge) }?;
    let destination = match qp.transport {
        Transport::Ud => {
            // SAFETY: a request to a datagram queue pair has its address there.
            let ud = unsafe { wr.wr.ud };
            // SAFETY: with a live address handle.
            Some(unsafe { destination(qp.pd, ud.ah, ud.remote_qpn, ud.remote_qkey) }?)
        }
        _ => None,
    };
    // Clearing room for the most there can be costs more than all else here.
    let (mut pieces, mut few, mut many);
    let data = if wr.send_flags & ibv_send_flags::IBV_SEND_INLINE.0 != 0 {
        pieces = [&[][..]; qp::MAX_SGE];
        let count = elements.len();
        for (piece, sge) in pieces.iter_mut().zip(elements) {
            // SAFETY: inline data is the program's memory, readable during the post.
            *piece = unsafe { inline_bytes(sge.addr, sge.length as usize) };
        }
        Data::Inline(&pieces[..count])
    } else if elements.len() <= FEW {
        few = [Sge::default(); FEW];
        Data::Gather(collect(&mut few, elements))
    } else {
        many = [Sge::default(); qp::MAX_SGE];
        Data::Gather(collect(&mut many, elements))
    };
    let (flags, destination) = (send_flags(wr.send_flags), destination.as_ref());
    let request = SendRequest { wr_id: wr.wr_id, operation, flags, data, destination };
    poster.post(&request).map_err(errno_of)
}

/// As many elements as nearly all requests have.
const FEW: usize = 2;

/// The elements, in the room given.
fn collect<const N: usize>(room: &mut [Sge; N], elements: impl ExactSizeIterator<Item = Sge>) -> &[Sge] {
    let count = elements.len().min(N);
    for (to, sge) in room.iter_mut().zip(elements) {
        *to = sge;
    }
    &room[..count]
}

/// Where a datagram of a queue pair with protection domain `pd` goes.
///
/// # Safety
///
/// `ah` is a live address handle or null.
pub(crate) unsafe fn destination(
    pd: u32,
    handle: *mut ibv_ah,
    qp_num: u32,
    qkey: u32,
) -> Result<Destination, c_int> {
    if handle.is_null() {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller's promise.
    let handle = unsafe { ah::data(handle) };
    let is_foreign = handle.domain.id() != pd;
    Ok(Destination { qp_num: qp_num & 0xff_ffff, qkey, is_foreign, ..handle.destination })
}

pub(crate) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { qp::data(qp) };
    let mut result = 0;
    data.device.post_send(&data.qp, |poster| {
        while !wr.is_null() {
            // SAFETY: the caller passes a list of valid work requests.
            let request = unsafe { &*wr };
            // SAFETY: as above.
            if let Err(errno) = unsafe { post_one(&data.qp, request, poster) } {
                result = errno;
                return;
            }
            wr = request.next;
        }
    });
    if result != 0 {
        // SAFETY: the caller passes a pointer that is valid for writes.
        unsafe { *bad_wr = wr };
    }
    result
}

pub(crate) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let data = unsafe { qp::data(qp) };
    let mut locked = data.qp.lock_receives();
    while !wr.is_null() {
        // SAFETY: the caller passes a list of valid work requests.
        let request = unsafe { &*wr };
        // SAFETY: with valid lists of elements.
        let result = unsafe { sges(request.sg_list, request.num_sge) }.and_then(|sges| {
            let posted = match &mut locked {
                Some(receives) => receives.push(request.wr_id, sges),
                None => data.device.post_receive(&data.qp, request.wr_id, sges),
            };
            posted.map_err(errno_of_receive)
        });
        if let Err(errno) = result {
            // SAFETY: the caller passes a pointer that is valid for writes.
            unsafe { *bad_wr = wr };
            return errno;
        }
        wr = request.next;
    }
    0
}
