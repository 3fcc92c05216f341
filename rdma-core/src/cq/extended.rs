//! Extended completion queues (`man ibv_create_cq_ex`), made where completions are to carry a time.
//!
//! The provider shows one completion at a time to a cursor. That costs calls which the array of `ibv_poll_cq` spares, so a
//! queue is extended only if it was asked for something that the array has no room for.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, Ordering};

use verbs_sys::{
    IBV_WC_STANDARD_FLAGS, ibv_comp_channel, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_create_cq_wc_flags,
    ibv_poll_cq_attr, ibv_wc, ibv_wc_opcode, ibv_wc_status, inline,
};

use super::completion::{NOTHING, stamp};
use super::poll::{BATCH, PollError};
use crate::Error;
use crate::context::ContextInner;
use crate::inflight::WrId;

/// The clock that completions are stamped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CompletionClock {
    /// The device's own: ticks of [`clock_khz`](crate::DeviceAttributes::clock_khz) from an arbitrary start, as
    /// [`Context::clock`](crate::Context::clock) tells them.
    Device,
    /// Nanoseconds since the epoch, as the device sees them.
    Wall,
}

impl CompletionClock {
    fn flag(self) -> ibv_create_cq_wc_flags {
        match self {
            CompletionClock::Device => ibv_create_cq_wc_flags::IBV_WC_EX_WITH_COMPLETION_TIMESTAMP,
            CompletionClock::Wall => ibv_create_cq_wc_flags::IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK,
        }
    }
}

type Read<R> = unsafe extern "C" fn(*mut ibv_cq_ex) -> R;

/// How to read an extended queue: the functions that its provider gave it, looked up once.
#[derive(Debug)]
pub(super) struct Extended {
    cq: NonNull<ibv_cq_ex>,
    start_poll: unsafe extern "C" fn(*mut ibv_cq_ex, *mut ibv_poll_cq_attr) -> c_int,
    next_poll: Read<c_int>,
    end_poll: Read<()>,
    opcode: Read<ibv_wc_opcode>,
    vendor_err: Read<u32>,
    wc_flags: Read<u32>,
    byte_len: Read<u32>,
    imm_data: Read<u32>,
    qp_num: Read<u32>,
    src_qp: Read<u32>,
    slid: Read<u32>,
    sl: Read<u8>,
    dlid_path_bits: Read<u8>,
    time: Read<u64>,
    /// An error that came after completions, for the next poll.
    failed: AtomicI32,
}

/// What one poll read.
pub(super) struct Batch {
    wcs: [(WrId, ibv_wc); BATCH],
    len: usize,
}

impl Batch {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Names of work requests, and completions, in which `wr_id` is other use.
    pub(super) fn iter(&self) -> impl Iterator<Item = (WrId, &ibv_wc)> {
        self.wcs[..self.len].iter().map(|(id, wc)| (*id, wc))
    }
}

/// What the provider makes a queue with.
pub(super) struct Wanted {
    pub(super) depth: u32,
    pub(super) cookie: *mut c_void,
    pub(super) channel: *mut ibv_comp_channel,
    pub(super) vector: u32,
}

impl Extended {
    /// Creates a queue; its reader, and the queue.
    pub(super) fn create(
        context: &ContextInner,
        clock: CompletionClock,
        wanted: &Wanted,
    ) -> Result<(Extended, NonNull<ibv_cq>), Error> {
        const VERB: &str = "ibv_create_cq_ex";
        let mut attr = ibv_cq_init_attr_ex {
            cqe: wanted.depth,
            cq_context: wanted.cookie,
            channel: wanted.channel,
            comp_vector: wanted.vector,
            wc_flags: u64::from(IBV_WC_STANDARD_FLAGS.0 | clock.flag().0),
            comp_mask: 0,
            flags: 0,
            parent_domain: std::ptr::null_mut(),
        };
        // SAFETY: the context is live (S-1), and so is the channel; the attributes are complete.
        let cq = unsafe { inline::ibv_create_cq_ex(context.ptr.as_ptr(), &raw mut attr) };
        let cq = NonNull::new(cq).ok_or_else(|| Error::last(VERB))?;
        match Extended::reader(cq, clock) {
            Some(reader) => Ok((reader, cq.cast())),
            None => {
                // SAFETY: just created; nobody else has it.
                let code = unsafe { (context.verbs.ibv_destroy_cq)(cq.as_ptr().cast()) };
                Error::check("ibv_destroy_cq", code)?;
                Err(Error::Unsupported { verb: "ibv_create_cq_ex (a function to read its completions)" })
            }
        }
    }

    fn reader(cq: NonNull<ibv_cq_ex>, clock: CompletionClock) -> Option<Extended> {
        // SAFETY: just created; the provider has filled in what it offers.
        let table = unsafe { cq.as_ref() };
        Some(Extended {
            cq,
            start_poll: table.start_poll?,
            next_poll: table.next_poll?,
            end_poll: table.end_poll?,
            opcode: table.read_opcode?,
            vendor_err: table.read_vendor_err?,
            wc_flags: table.read_wc_flags?,
            byte_len: table.read_byte_len?,
            imm_data: table.read_imm_data?,
            qp_num: table.read_qp_num?,
            src_qp: table.read_src_qp?,
            slid: table.read_slid?,
            sl: table.read_sl?,
            dlid_path_bits: table.read_dlid_path_bits?,
            time: match clock {
                CompletionClock::Device => table.read_completion_ts?,
                CompletionClock::Wall => table.read_completion_wallclock_ns?,
            },
            failed: AtomicI32::new(0),
        })
    }

    /// Reads up to [`BATCH`] completions.
    ///
    /// # Safety
    ///
    /// The queue is live, and the caller holds its lock.
    pub(super) unsafe fn poll(&self) -> Result<Batch, PollError> {
        let mut batch = Batch { wcs: [(WrId(u64::MAX), NOTHING); BATCH], len: 0 };
        match self.failed.swap(0, Ordering::Relaxed) {
            0 => {}
            code => return Err(PollError { code: code.saturating_abs().wrapping_neg() }),
        }
        let mut attr = ibv_poll_cq_attr { comp_mask: 0 };
        // SAFETY: the caller's promise.
        match unsafe { (self.start_poll)(self.cq.as_ptr(), &raw mut attr) } {
            0 => {}
            libc::ENOENT => return Ok(batch),
            // An errno, of either sign.
            code => return Err(PollError { code: code.saturating_abs().wrapping_neg() }),
        }
        for place in &mut batch.wcs {
            // SAFETY: the cursor is at a completion.
            *place = unsafe { self.read() };
            batch.len += 1;
            if batch.len == BATCH {
                break;
            }
            // SAFETY: between start and end.
            match unsafe { (self.next_poll)(self.cq.as_ptr()) } {
                0 => {}
                libc::ENOENT => break,
                code => {
                    // What was read so far is not lost.
                    self.failed.store(code, Ordering::Relaxed);
                    break;
                }
            }
        }
        // SAFETY: it was started.
        unsafe { (self.end_poll)(self.cq.as_ptr()) };
        Ok(batch)
    }

    /// The completion at the cursor. Of one that failed only some fields are valid (`man ibv_create_cq_ex`).
    ///
    /// # Safety
    ///
    /// The cursor is at one.
    unsafe fn read(&self) -> (WrId, ibv_wc) {
        let cq = self.cq.as_ptr();
        let mut wc = NOTHING;
        // SAFETY: the provider wrote it for this completion.
        let id = WrId(unsafe { (*cq).wr_id });
        // SAFETY: as above.
        wc.status = unsafe { (*cq).status };
        // SAFETY: the cursor is at a completion, here and below.
        wc.qp_num = unsafe { (self.qp_num)(cq) };
        if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
            // SAFETY: as above.
            wc.vendor_err = unsafe { (self.vendor_err)(cq) };
            return (id, wc);
        }
        // SAFETY: as above.
        wc.opcode = unsafe { (self.opcode)(cq) };
        // SAFETY: as above.
        wc.wc_flags = unsafe { (self.wc_flags)(cq) };
        // SAFETY: as above.
        wc.byte_len = unsafe { (self.byte_len)(cq) };
        // SAFETY: as above.
        wc.__bindgen_anon_1.imm_data = unsafe { (self.imm_data)(cq) };
        // SAFETY: as above.
        wc.src_qp = unsafe { (self.src_qp)(cq) };
        // SAFETY: as above.
        wc.slid = u16::try_from(unsafe { (self.slid)(cq) }).unwrap_or(0);
        // SAFETY: as above.
        wc.sl = unsafe { (self.sl)(cq) };
        // SAFETY: as above.
        wc.dlid_path_bits = unsafe { (self.dlid_path_bits)(cq) };
        // SAFETY: as above.
        stamp(&mut wc, unsafe { (self.time)(cq) });
        (id, wc)
    }
}

// SAFETY: verbs are thread-safe (S-6), and the queue, which outlives this, is read under its lock.
unsafe impl Send for Extended {}
// SAFETY: as above.
unsafe impl Sync for Extended {}

/// `ibv_poll_cq` of an extended queue, which has none: there is nothing, look elsewhere.
pub(super) unsafe extern "C" fn nothing(_cq: *mut ibv_cq, _count: c_int, _wcs: *mut ibv_wc) -> c_int {
    0
}
