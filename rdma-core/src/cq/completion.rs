//! Completions as callers see them.

use std::fmt;

use verbs_sys::{ibv_wc, ibv_wc_flags, ibv_wc_opcode, ibv_wc_status};

use super::status::{CompletionError, Status};
use crate::inflight::{Health, Held};
use crate::mr::Buffer;

/// What a work request asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Opcode {
    /// SEND, with or without immediate data or invalidation.
    Send,
    /// RDMA WRITE, with or without immediate data.
    Write,
    /// RDMA READ.
    Read,
    /// Atomic compare and swap.
    CompareAndSwap,
    /// Atomic fetch and add.
    FetchAndAdd,
    /// Binding of a memory window.
    Bind,
    /// Local invalidation of a key.
    Invalidate,
    /// A receive.
    Recv,
}

/// `wr_id` of an entry that names no work request: no queue has this number. The low bits are free for other use.
const NAMELESS: u64 = !0x3f;
/// In `wc_flags`: the completion has a timestamp, whose low half is in `vendor_err`, and the high half in the high half of `wr_id`.
/// No flag of verbs; the array of `ibv_poll_cq` is cleared of it.
pub(super) const STAMPED: u32 = 1 << 31;
/// The same in the `wr_id` of a `WorkCompletion`.
const STAMPED_TAG: u64 = 1 << 4;
const HIGH_HALF: u64 = 0xffff_ffff << 32;

/// Gives a raw completion, found by other means than its `wr_id`, a timestamp.
#[allow(clippy::cast_possible_truncation, reason = "the low half")]
pub(super) fn stamp(wc: &mut ibv_wc, time: u64) {
    wc.wr_id = time & HIGH_HALF;
    wc.vendor_err = time as u32;
    wc.wc_flags |= STAMPED;
}

impl Opcode {
    /// What the `wr_id` of a completion becomes once that is found; that of a simple one ends in the opcode as it is.
    #[inline]
    fn tag(self, wc: &ibv_wc) -> u64 {
        if wc.wc_flags & STAMPED == 0 {
            NAMELESS | self as u64
        } else {
            wc.wr_id & HIGH_HALF | STAMPED_TAG | self as u64
        }
    }

    /// Of its number, the low three bits.
    #[inline]
    pub(crate) fn of(number: u8) -> Opcode {
        match number & 7 {
            0 => Opcode::Send,
            1 => Opcode::Write,
            2 => Opcode::Read,
            3 => Opcode::CompareAndSwap,
            4 => Opcode::FetchAndAdd,
            5 => Opcode::Bind,
            6 => Opcode::Invalidate,
            _ => Opcode::Recv,
        }
    }
}

/// What a completion says, without the buffers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct WorkCompletion {
    /// As the provider wrote it, but for `wr_id`, which named the work request and of which now the low bits tell its opcode, and
    /// `byte_len`, which says nothing on a failure and then holds the status of the queue pair's first error, or 0.
    wc: ibv_wc,
}

impl WorkCompletion {
    /// As it is.
    pub(super) fn of(wc: ibv_wc) -> WorkCompletion {
        WorkCompletion { wc }
    }

    /// Takes what a verb wrote: the place names nothing from now on.
    pub(super) fn take(&mut self) -> ibv_wc {
        let mut wc = self.wc;
        self.wc.wr_id = NOTHING.wr_id;
        wc.wc_flags &= !STAMPED;
        wc
    }

    #[inline(always)]
    pub(super) fn raw(&self) -> &ibv_wc {
        &self.wc
    }

    #[inline]
    pub(crate) fn new(wc: ibv_wc, opcode: Opcode, health: &Health) -> WorkCompletion {
        let mut this = WorkCompletion { wc };
        this.wc.wr_id = opcode.tag(&wc);
        if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
            this.wc.byte_len = health.first().map_or(0, |(status, _)| status.0);
        }
        this
    }

    /// One that the caller knows to be a success.
    #[inline]
    pub(crate) fn success(wc: ibv_wc, opcode: Opcode) -> WorkCompletion {
        WorkCompletion { wc: ibv_wc { wr_id: opcode.tag(&wc), ..wc } }
    }

    /// The details of what the caller knows to be a success.
    #[inline]
    pub(crate) fn as_success(&self) -> Success<'_> {
        Success { completion: self }
    }

    /// What the work request asked for.
    #[must_use]
    #[inline]
    pub fn opcode(&self) -> Opcode {
        Opcode::of(self.wc.wr_id.to_le_bytes()[0])
    }

    /// How it ended.
    #[must_use]
    pub fn status(&self) -> Status {
        Status(self.wc.status)
    }

    /// Whether it succeeded.
    #[must_use]
    #[inline]
    pub fn is_success(&self) -> bool {
        self.wc.status == ibv_wc_status::IBV_WC_SUCCESS
    }

    /// The number of the queue pair it is of.
    #[must_use]
    pub fn qp_num(&self) -> u32 {
        self.wc.qp_num
    }

    /// The details of a success, or the failure explained. (On a failure the other fields of a
    /// completion are undefined, `man ibv_poll_cq`; so they can be read only here.)
    ///
    /// # Errors
    ///
    /// [`CompletionError`].
    #[inline]
    pub fn result(&self) -> Result<Success<'_>, CompletionError> {
        if self.is_success() { Ok(Success { completion: self }) } else { Err(self.error()) }
    }

    #[cold]
    fn error(&self) -> CompletionError {
        CompletionError {
            status: Status(self.wc.status),
            opcode: self.opcode(),
            vendor_error: self.wc.vendor_err,
            qp_num: self.wc.qp_num,
            cause: (self.wc.byte_len != 0).then_some(Status(ibv_wc_status(self.wc.byte_len))),
        }
    }

    /// The buffers of a list; those of a successful receive are shortened to what was received.
    pub(crate) fn received<'h>(
        self,
        held: impl Iterator<Item = Held> + 'h,
    ) -> impl Iterator<Item = Buffer> + 'h {
        let mut left = self.received_len();
        held.filter_map(move |held| {
            let offered = held.sge().length as usize;
            let n = left.map_or(offered, |left| left.min(offered));
            if let Some(left) = &mut left {
                *left -= n;
            }
            match held {
                Held::Buffer(mut buffer) => {
                    buffer.truncate(n);
                    Some(buffer)
                }
                Held::Shared(_) | Held::Bytes(_) => None,
            }
        })
    }

    #[inline]
    pub(crate) fn received_len(&self) -> Option<usize> {
        // An RDMA WRITE with immediate consumes a receive without touching its buffer.
        let data = self.wc.opcode != ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM;
        (self.opcode() == Opcode::Recv && self.is_success() && data).then_some(self.wc.byte_len as usize)
    }
}

impl fmt::Debug for WorkCompletion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkCompletion")
            .field("opcode", &self.opcode())
            .field("status", &self.status())
            .field("qp_num", &self.wc.qp_num)
            .finish_non_exhaustive()
    }
}

/// The fields of a successful completion.
#[derive(Debug, Clone, Copy)]
pub struct Success<'a> {
    completion: &'a WorkCompletion,
}

impl Success<'_> {
    /// Bytes received, or read; on UD 40 of them are the [GRH](Success::has_grh).
    #[must_use]
    #[inline]
    #[allow(clippy::len_without_is_empty, reason = "a count of bytes transferred, not a container")]
    pub fn len(&self) -> usize {
        self.completion.wc.byte_len as usize
    }

    /// As the verb wrote it.
    pub(crate) fn raw(&self) -> &ibv_wc {
        &self.completion.wc
    }

    /// A flag of a receive. `ibv_poll_cq(3)` defines them for no other, and rxe sets the one for immediate data on the send's
    /// completion too.
    #[inline]
    fn flag(&self, flag: ibv_wc_flags) -> bool {
        let is_receive = self.completion.wc.opcode.0 & ibv_wc_opcode::IBV_WC_RECV.0 != 0;
        is_receive && self.completion.wc.wc_flags & flag.0 != 0
    }

    /// When the device completed it, by the clock that the completion queue was created with; `None` unless
    /// [`timestamps`](crate::CompletionQueueBuilder::timestamps) were asked for, and for unsignalled work.
    #[must_use]
    #[inline]
    pub fn timestamp(&self) -> Option<u64> {
        let wc = self.completion.raw();
        (wc.wr_id & STAMPED_TAG != 0).then(|| wc.wr_id & HIGH_HALF | u64::from(wc.vendor_err))
    }

    /// The immediate data that came with a SEND or an RDMA WRITE, in host byte order.
    #[must_use]
    #[inline]
    pub fn imm(&self) -> Option<u32> {
        // SAFETY: both members of the union are 32-bit integers.
        self.flag(ibv_wc_flags::IBV_WC_WITH_IMM)
            .then(|| u32::from_be(unsafe { self.completion.wc.__bindgen_anon_1.imm_data }))
    }

    /// The local key that a SEND with invalidate made invalid.
    #[must_use]
    pub fn invalidated_rkey(&self) -> Option<u32> {
        // SAFETY: both members of the union are 32-bit integers.
        let rkey = unsafe { self.completion.wc.__bindgen_anon_1.invalidated_rkey };
        self.flag(ibv_wc_flags::IBV_WC_WITH_INV).then_some(rkey)
    }

    /// Whether the receive was consumed by an RDMA WRITE with immediate, whose data is not in the
    /// receive's buffer.
    #[must_use]
    #[inline]
    pub fn is_write_with_imm(&self) -> bool {
        self.completion.wc.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM
    }

    /// Of a receive: whether nothing came with it but the message. (Whether it was one that [`is_write_with_imm`](Success::is_write_with_imm),
    /// or has [immediate data](Success::imm), is then no question.)
    #[doc(hidden)]
    #[must_use]
    #[inline(always)]
    pub fn is_plain_message(&self) -> bool {
        let wc = &self.completion.wc;
        wc.opcode == ibv_wc_opcode::IBV_WC_RECV && wc.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 == 0
    }

    /// Whether the first 40 bytes of a UD receive are a Global Routing Header.
    #[must_use]
    #[inline]
    pub fn has_grh(&self) -> bool {
        self.flag(ibv_wc_flags::IBV_WC_GRH)
    }

    /// The sender's queue pair number (UD).
    #[must_use]
    #[inline]
    pub fn src_qp(&self) -> u32 {
        self.completion.wc.src_qp
    }

    /// The sender's LID (UD on InfiniBand).
    #[must_use]
    pub fn slid(&self) -> u16 {
        self.completion.wc.slid
    }

    /// The service level (UD on InfiniBand).
    #[must_use]
    pub fn service_level(&self) -> u8 {
        self.completion.wc.sl
    }

    /// The P_Key index (UD queue pair 1 only).
    #[must_use]
    pub fn pkey_index(&self) -> u16 {
        self.completion.wc.pkey_index
    }

    /// The low bits of the destination LID (UD on InfiniBand).
    #[must_use]
    pub fn dlid_path_bits(&self) -> u8 {
        self.completion.wc.dlid_path_bits
    }
}

/// An entry that names nothing.
pub(super) const NOTHING: ibv_wc = {
    // SAFETY: integers and a union of integers: all zeroes are a value.
    let mut nothing: ibv_wc = unsafe { std::mem::zeroed() };
    nothing.wr_id = NAMELESS;
    nothing
};
