//! Extended completion queues: a cursor instead of an array.

use std::ffi::c_int;

use verbs_sys::*;

use super::cq::{self, Cq, CqData, Wanted};
use super::object::null;
use super::section::Section;
use crate::device::Entry;
use crate::proto::ImmediateOrKey;

/// What a completion can tell here: all that `ibv_wc` has, and the time.
const OFFERED: u64 = IBV_WC_STANDARD_FLAGS.0 as u64
    | ibv_create_cq_wc_flags::IBV_WC_EX_WITH_COMPLETION_TIMESTAMP.0 as u64
    | ibv_create_cq_wc_flags::IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK.0 as u64;
/// Either of the two times.
const TIMESTAMPS: u64 = OFFERED & !(IBV_WC_STANDARD_FLAGS.0 as u64);

pub(crate) unsafe extern "C" fn create_cq_ex(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    const MASKS: u32 = ibv_cq_init_attr_mask::IBV_CQ_INIT_ATTR_MASK_FLAGS.0
        | ibv_cq_init_attr_mask::IBV_CQ_INIT_ATTR_MASK_PD.0;
    const IGNORE_OVERRUN: u32 = ibv_create_cq_attr_flags::IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN.0;
    const SINGLE_THREADED: u32 = ibv_create_cq_attr_flags::IBV_CREATE_CQ_ATTR_SINGLE_THREADED.0;
    const FLAGS: u32 = SINGLE_THREADED | IGNORE_OVERRUN;
    // SAFETY: the caller passes valid attributes.
    let attr = unsafe { &*attr };
    let has_flags = attr.comp_mask & ibv_cq_init_attr_mask::IBV_CQ_INIT_ATTR_MASK_FLAGS.0 != 0;
    if attr.comp_mask & !MASKS != 0
        || attr.wc_flags & !OFFERED != 0
        || (has_flags && attr.flags & !FLAGS != 0)
    {
        return null(libc::EOPNOTSUPP);
    }
    let wanted = Wanted {
        cqe: attr.cqe,
        cq_context: attr.cq_context,
        channel: attr.channel,
        vector: attr.comp_vector,
        timestamps: attr.wc_flags & TIMESTAMPS != 0,
        ignores_overrun: has_flags && attr.flags & IGNORE_OVERRUN != 0,
        single_threaded: has_flags && attr.flags & SINGLE_THREADED != 0,
    };
    // SAFETY: the caller's promise is the same.
    let cq = match unsafe { cq::create(context, &wanted) } {
        Ok(cq) => cq,
        Err(errno) => return null(errno),
    };
    // SAFETY: the queue is new, and nobody else has it.
    fill(unsafe { &mut *cq });
    cq
}

fn fill(cq: &mut ibv_cq_ex) {
    cq.start_poll = Some(start_poll);
    cq.next_poll = Some(next_poll);
    cq.end_poll = Some(end_poll);
    cq.read_opcode = Some(read_opcode);
    cq.read_vendor_err = Some(read_vendor_err);
    cq.read_byte_len = Some(read_byte_len);
    cq.read_imm_data = Some(read_imm_data);
    cq.read_qp_num = Some(read_qp_num);
    cq.read_src_qp = Some(read_src_qp);
    cq.read_wc_flags = Some(read_wc_flags);
    cq.read_slid = Some(read_slid);
    cq.read_sl = Some(read_sl);
    cq.read_dlid_path_bits = Some(read_dlid_path_bits);
    cq.read_completion_ts = Some(read_completion_ts);
    cq.read_completion_wallclock_ns = Some(read_completion_wallclock_ns);
}

impl CqData {
    /// Whether the calling thread is between `start_poll` and `end_poll`, and no other is.
    fn is_polled_here(&self) -> bool {
        self.section.as_ref().is_none_or(Section::is_inside)
    }
}

/// # Safety
///
/// `cq` is a live queue of this device.
unsafe fn shown<R>(cq: *mut ibv_cq_ex, read: impl FnOnce(&CqData, &Entry) -> R) -> R
where
    R: Default,
{
    // SAFETY: the caller's promise.
    let data = unsafe { Cq::data(cq) };
    if !data.is_polled_here() {
        return R::default();
    }
    data.shown.get().map_or_else(R::default, |entry| read(data, &entry))
}

/// Moves the cursor to the next completion; `ENOENT` if there is none.
///
/// # Safety
///
/// `cq` is a live queue of this device, and the calling thread polls it.
unsafe fn advance(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller's promise.
    let data = unsafe { Cq::data(cq) };
    let mut next = None;
    if data.device.poll(&data.queue, 1, |_, entry| next = Some(*entry)) == 0 {
        return libc::ENOENT;
    }
    data.shown.set(next);
    if let Some(entry) = next {
        // SAFETY: the structure is live, and these two fields belong to the poller.
        unsafe { (*cq).status = ibv_wc_status(entry.completion.status as u32) };
        // SAFETY: as above.
        unsafe { (*cq).wr_id = entry.completion.wr_id };
    }
    0
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: the caller passes valid attributes.
    if unsafe { (*attr).comp_mask } != 0 {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live queue.
    let section = &unsafe { Cq::data(cq) }.section;
    section.iter().for_each(Section::enter);
    // SAFETY: as above, and this thread is in the section.
    let result = unsafe { advance(cq) };
    if result != 0 {
        // Nothing was begun, and `end_poll` is not called (`man ibv_create_cq_ex`).
        section.iter().for_each(Section::leave);
    }
    result
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller passes a live queue.
    if !unsafe { Cq::data(cq) }.is_polled_here() {
        return libc::EINVAL;
    }
    // SAFETY: as above, and this thread is in the section.
    unsafe { advance(cq) }
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: the caller passes a live queue.
    let data = unsafe { Cq::data(cq) };
    if data.is_polled_here() {
        data.shown.set(None);
        data.section.iter().for_each(Section::leave);
    }
}

/// A reader of the completion that the cursor is at.
macro_rules! reader {
    ($($name:ident -> $ty:ty = |$data:pat_param, $entry:pat_param| $value:expr;)*) => {$(
        unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $ty {
            // SAFETY: readers are called between `start_poll` and `end_poll`, by the verbs' contract.
            unsafe { shown(cq, |$data, $entry| $value) }
        }
    )*};
}

reader! {
    read_vendor_err -> u32 = |_, entry| cq::vendor_error(entry);
    read_byte_len -> u32 = |_, entry| entry.completion.byte_len;
    read_imm_data -> u32 = |_, entry| match entry.completion.immediate {
        ImmediateOrKey::None => 0,
        ImmediateOrKey::Immediate(data) => u32::from_ne_bytes(data),
        ImmediateOrKey::InvalidatedKey(key) => key,
    };
    read_qp_num -> u32 = |_, entry| entry.qp_num;
    read_src_qp -> u32 = |_, entry| entry.completion.src_qp;
    read_wc_flags -> u32 = |_, entry| cq::flags(entry);
    read_slid -> u32 = |_, _| 0;
    read_sl -> u8 = |_, _| 0;
    read_dlid_path_bits -> u8 = |_, _| 0;
    read_completion_ts -> u64 = |_, entry| entry.time.nanoseconds();
    read_completion_wallclock_ns -> u64 = |data, entry| data.device.wall_clock(entry.time);
}

unsafe extern "C" fn read_opcode(cq: *mut ibv_cq_ex) -> ibv_wc_opcode {
    // SAFETY: as the readers above.
    ibv_wc_opcode(unsafe { shown(cq, |_, entry| entry.completion.opcode as u32) })
}
