//! Completion queues: create, poll, arm, resize, destroy.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use verbs_sys::*;

use super::channel::CompChannel;
use super::context::{Counted, context_data};
use super::object::{Object, null, zeroed};
use super::section::Section;
use crate::device::{CompletionQueue, Entry, Handle, Moderation, load};
use crate::proto::{CompletionKind, ImmediateOrKey, Status};

/// The deepest queue, as on the kernel's Soft-RoCE.
pub(crate) const MAX_CQE: u32 = (1 << 15) - 1;
/// As many completions may an event wait for: all that the deepest queue holds.
pub(crate) const MAX_MODERATED: u16 = (1 << 15) - 1;

/// Our part of a completion queue, extended or not.
pub(crate) struct CqData {
    pub(crate) device: Arc<Handle>,
    pub(crate) queue: Arc<CompletionQueue>,
    /// The entry that an extended poll shows, for whoever is in the section.
    pub(crate) shown: Cell<Option<Entry>>,
    /// From `start_poll` to `end_poll`, unless the program says that one thread at a time uses the queue.
    pub(crate) section: Option<Section>,
    _counted: Counted,
}

pub(crate) type Cq = Object<ibv_cq_ex, CqData>;

/// # Safety
///
/// `cq` is a live completion queue of this device.
pub(crate) unsafe fn data<'a>(cq: *mut ibv_cq) -> &'a CqData {
    // SAFETY: every queue is made as an extended one, of which `ibv_cq` is the beginning.
    unsafe { Cq::data(cq.cast()) }
}

/// The structure and the program's context of a queue whose identity came with an event.
pub(crate) fn of_identity(identity: usize) -> (*mut ibv_cq, *mut c_void) {
    let cq: *mut ibv_cq = ptr::with_exposed_provenance_mut(identity);
    // SAFETY: nobody takes an event of a queue that is about to be freed, and one that was taken is counted: the queue
    // is not freed until the program acknowledged it.
    (cq, unsafe { (*cq).cq_context })
}

/// What both ways of creation ask for.
pub(crate) struct Wanted {
    pub(crate) cqe: u32,
    pub(crate) cq_context: *mut c_void,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) vector: u32,
    pub(crate) timestamps: bool,
    pub(crate) ignores_overrun: bool,
    pub(crate) single_threaded: bool,
}

/// # Safety
///
/// `context` is live, and the channel live or null.
pub(crate) unsafe fn create(context: *mut ibv_context, wanted: &Wanted) -> Result<*mut ibv_cq_ex, c_int> {
    // SAFETY: the caller's promise.
    let vectors = unsafe { (*context).num_comp_vectors };
    if wanted.cqe == 0 || wanted.cqe > MAX_CQE || wanted.vector >= vectors.cast_unsigned() {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller passes a live channel or null.
    if !wanted.channel.is_null() && unsafe { (*wanted.channel).context } != context {
        return Err(libc::EINVAL);
    }
    // SAFETY: as above.
    let data = unsafe { context_data(context) };
    // SAFETY: the caller passes a live channel or null.
    let channel = (!wanted.channel.is_null()).then(|| unsafe { CompChannel::data(wanted.channel) });
    let mut c: ibv_cq_ex = zeroed();
    c.context = context;
    c.channel = wanted.channel;
    c.cq_context = wanted.cq_context;
    c.cqe = wanted.cqe.cast_signed();
    let cq = Cq::create(c, |identity| {
        let queue = CompletionQueue::new(
            wanted.cqe as usize,
            wanted.timestamps,
            wanted.ignores_overrun,
            identity,
            channel.map(|c| Arc::clone(&c.channel)),
            Arc::clone(&data.async_events),
        );
        Ok::<_, c_int>(CqData {
            device: Arc::clone(&data.device),
            queue: data.device.create_completion_queue(queue),
            shown: Cell::new(None),
            section: (!wanted.single_threaded).then(Section::new),
            _counted: Counted::new(data),
        })
    })?;
    // So that an event can lead from the identity back to the structure.
    let _ = cq.expose_provenance();
    if let Some(channel) = channel {
        channel.channel.users.fetch_add(1, Ordering::AcqRel);
        // SAFETY: the channel is live; programs read the field, libibverbs changes it under a lock, and
        // here it is only for show.
        unsafe { (*wanted.channel).refcnt += 1 };
    }
    Ok(cq)
}

pub(crate) unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    let (Ok(cqe), Ok(vector)) = (u32::try_from(cqe), u32::try_from(vector)) else {
        return null(libc::EINVAL);
    };
    let wanted = Wanted {
        cqe,
        cq_context,
        channel,
        vector,
        timestamps: false,
        ignores_overrun: false,
        single_threaded: false,
    };
    // SAFETY: the caller's promise is the same.
    unsafe { create(context, &wanted) }.map_or_else(null, |cq| cq.cast())
}

pub(crate) unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the caller passes a live queue.
    let data = unsafe { data(cq) };
    if load(&data.queue.users) > 0 {
        return libc::EBUSY;
    }
    let queue = &data.queue;
    // Of events that were taken and not acknowledged the program still has the pointer.
    if queue.channel.as_ref().is_some_and(|channel| !channel.close(queue)) {
        return libc::EBUSY;
    }
    if !queue.async_events.close(&queue.async_event_count) {
        queue.channel.iter().for_each(|channel| channel.reopen(queue));
        return libc::EBUSY;
    }
    queue.async_events.forget(&queue.async_event_count);
    queue.forget_packets();
    if let Some(channel) = &queue.channel {
        channel.forget(queue);
        // SAFETY: the queue is live, and so is its channel, which it keeps from being destroyed until it counts no more.
        let shown = unsafe { (*cq).channel };
        // SAFETY: as in `create`.
        unsafe { (*shown).refcnt -= 1 };
        channel.users.fetch_sub(1, Ordering::AcqRel);
    }
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { Cq::free(cq.cast()) });
    0
}

pub(crate) unsafe extern "C" fn resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    let Some(depth) = u32::try_from(cqe).ok().filter(|n| (1..=MAX_CQE).contains(n)) else {
        return libc::EINVAL;
    };
    // SAFETY: the caller passes a live queue.
    if !unsafe { data(cq) }.queue.resize(depth as usize) {
        return libc::EINVAL;
    }
    // SAFETY: as above; this call is the one that changes it.
    unsafe { (*cq).cqe = cqe };
    0
}

/// `man ibv_modify_cq`: moderation within what the device's capabilities say.
pub(crate) unsafe extern "C" fn modify_cq(cq: *mut ibv_cq, attr: *mut ibv_modify_cq_attr) -> c_int {
    const MODERATE: u32 = ibv_cq_attr_mask::IBV_CQ_ATTR_MODERATE.0;
    // SAFETY: the caller passes valid attributes.
    let attr = unsafe { &*attr };
    let ibv_moderate_cq { cq_count, cq_period } = attr.moderate;
    match attr.attr_mask {
        0 => return 0,
        MODERATE => {}
        _ => return libc::EOPNOTSUPP,
    }
    if cq_count > MAX_MODERATED || cq_period > Moderation::MAX_PERIOD {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live queue.
    unsafe { data(cq) }.queue.moderate(Moderation::new(cq_count, cq_period));
    0
}

pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live queue.
    let data = unsafe { data(cq) };
    match data.device.arm(&data.queue, solicited_only != 0) {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(libc::ENOMEM),
    }
}

pub(crate) unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    let Ok(max) = usize::try_from(num_entries) else { return -libc::EINVAL };
    // SAFETY: the caller passes a live queue.
    let data = unsafe { data(cq) };
    let n = data.device.poll(&data.queue, max, |i, entry| {
        // SAFETY: the caller passes room for `num_entries`, and `i` is below that.
        let place = unsafe { wc.add(i) };
        // SAFETY: as above.
        unsafe { place.write(completion(entry)) };
    });
    c_int::try_from(n).unwrap_or(num_entries)
}

/// A completion as programs see it.
fn completion(entry: &Entry) -> ibv_wc {
    let completion = &entry.completion;
    let mut wc: ibv_wc = zeroed();
    wc.wr_id = completion.wr_id;
    wc.status = ibv_wc_status(completion.status as u32);
    wc.opcode = ibv_wc_opcode(completion.opcode as u32);
    wc.vendor_err = vendor_error(entry);
    wc.qp_num = entry.qp_num;
    if completion.status == Status::Success {
        wc.byte_len = completion.byte_len;
        wc.wc_flags = flags(entry);
        wc.src_qp = completion.src_qp;
        match completion.immediate {
            ImmediateOrKey::None => {}
            ImmediateOrKey::Immediate(data) => wc.__bindgen_anon_1.imm_data = u32::from_ne_bytes(data),
            ImmediateOrKey::InvalidatedKey(key) => wc.__bindgen_anon_1.invalidated_rkey = key,
        }
    }
    wc
}

/// Nothing beyond the status is to be told.
pub(crate) fn vendor_error(_entry: &Entry) -> u32 {
    0
}

/// `wc_flags` of a successful completion.
pub(crate) fn flags(entry: &Entry) -> u32 {
    let completion = &entry.completion;
    let mut flags = ibv_wc_flags(0);
    if completion.kind == CompletionKind::Receive {
        match completion.immediate {
            ImmediateOrKey::None => {}
            ImmediateOrKey::Immediate(_) => flags |= ibv_wc_flags::IBV_WC_WITH_IMM,
            ImmediateOrKey::InvalidatedKey(_) => flags |= ibv_wc_flags::IBV_WC_WITH_INV,
        }
        if completion.grh {
            flags |= ibv_wc_flags::IBV_WC_GRH;
        }
    }
    flags.0
}
