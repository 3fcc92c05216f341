//! Completions as callers see them.

use std::fmt;
use std::mem::MaybeUninit;
use std::num::NonZeroU32;

use verbs_sys::{ibv_wc, ibv_wc_flags, ibv_wc_opcode, ibv_wc_status};

use super::poll::BATCH;
use super::status::{CompletionError, Status};
use crate::inflight::{Health, Held, SlotPayload};
use crate::mr::Buffer;

/// What a work request asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
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

/// What a completion says, without the buffers.
#[derive(Clone, Copy)]
pub struct WorkCompletion {
    wc: ibv_wc,
    opcode: Opcode,
    /// The status of the queue pair's first error, for completions that failed.
    cause: Option<NonZeroU32>,
}

impl WorkCompletion {
    #[inline]
    pub(crate) fn new(wc: ibv_wc, opcode: Opcode, health: &Health) -> WorkCompletion {
        let mut this = WorkCompletion { wc, opcode, cause: None };
        if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
            this.cause = health.first().and_then(|(status, _)| NonZeroU32::new(status.0));
        }
        this
    }

    /// One that the caller knows to be a success.
    #[inline]
    pub(crate) fn success(wc: ibv_wc, opcode: Opcode) -> WorkCompletion {
        WorkCompletion { wc, opcode, cause: None }
    }

    /// The details of what the caller knows to be a success.
    #[inline]
    pub(crate) fn as_success(&self) -> Success<'_> {
        Success { completion: self }
    }

    /// What the work request asked for.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        self.opcode
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
            opcode: self.opcode,
            vendor_error: self.wc.vendor_err,
            qp_num: self.wc.qp_num,
            cause: self.cause.map(|status| Status(ibv_wc_status(status.get()))),
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
        (self.opcode == Opcode::Recv && self.is_success() && data).then_some(self.wc.byte_len as usize)
    }
}

impl fmt::Debug for WorkCompletion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkCompletion")
            .field("opcode", &self.opcode)
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
    #[allow(clippy::len_without_is_empty, reason = "a count of bytes transferred, not a container")]
    #[inline]
    pub fn len(&self) -> usize {
        self.completion.wc.byte_len as usize
    }

    /// As the verb wrote it.
    pub(crate) fn raw(&self) -> &ibv_wc {
        &self.completion.wc
    }

    #[inline]
    fn flag(&self, flag: ibv_wc_flags) -> bool {
        self.completion.wc.wc_flags & flag.0 != 0
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

    /// Whether the first 40 bytes of a UD receive are a Global Routing Header.
    #[must_use]
    pub fn has_grh(&self) -> bool {
        self.flag(ibv_wc_flags::IBV_WC_GRH)
    }

    /// The sender's queue pair number (UD).
    #[must_use]
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

/// One entry of `Completions`.
pub(crate) struct Item {
    completion: WorkCompletion,
    id: u64,
    /// Valid while `held` is not 0.
    first: MaybeUninit<Held>,
    /// Entries of the list that are here: 0, or 1 and `more`.
    held: u16,
    /// Further entries, in `Completions::rest`, in the order of the items.
    more: u16,
}

impl Item {
    pub(crate) fn new(completion: WorkCompletion, id: u64, first: Option<Held>) -> Item {
        let held = u16::from(first.is_some());
        Item { completion, id, first: first.map_or(MaybeUninit::uninit(), MaybeUninit::new), held, more: 0 }
    }

    #[inline]
    fn take_first(&mut self) -> Option<Held> {
        if self.held == 0 {
            return None;
        }
        self.held = 0;
        // SAFETY: `held` said that it is valid, and does not any more.
        Some(unsafe { self.first.assume_init_read() })
    }
}

impl Drop for Item {
    #[inline]
    fn drop(&mut self) {
        if self.held != 0 {
            drop(self.take_first());
        }
    }
}

/// Storage for [`CompletionQueue::poll`](crate::CompletionQueue::poll), to be reused.
#[derive(Default)]
pub struct Completions {
    items: Vec<Item>,
    rest: Vec<Option<Held>>,
}

impl Completions {
    /// Empty storage, which grows to the largest lot of completions polled at once.
    #[must_use]
    pub fn new() -> Completions {
        Completions::default()
    }

    /// Makes room for what one call of the verb can give.
    #[inline]
    pub(crate) fn reserve(&mut self) {
        self.items.reserve(BATCH);
    }

    /// Adds a completion and what its slot held.
    pub(crate) fn push(&mut self, mut item: Item, rest: impl Iterator<Item = Held>) {
        let before = self.rest.len();
        self.rest.extend(rest.map(Some));
        item.more = u16::try_from(self.rest.len() - before).unwrap_or(u16::MAX);
        self.items.push(item);
    }

    /// Adds a successful completion and what its slot held, if that is a single entry or none and nothing
    /// else; false, and nothing changed, otherwise.
    ///
    /// # Safety
    ///
    /// The caller claimed the slot of the payload, and gives the payload up when told true. There was a
    /// `reserve` for as many calls as come after it.
    #[inline(always)]
    pub(crate) unsafe fn push_simple(&mut self, payload: *mut SlotPayload, wc: &ibv_wc) -> bool {
        // SAFETY: the caller owns the payload.
        let held = unsafe { (*payload).meta.held };
        // SAFETY: as above.
        let keep = unsafe { (*payload).meta.keep.is_some() };
        if held > 1 || keep {
            return false;
        }
        let len = self.items.len();
        debug_assert!(len < self.items.capacity());
        // SAFETY: `reserve` made room.
        let item = unsafe { self.items.as_mut_ptr().add(len) };
        // SAFETY: the caller owns the payload, and reads it once: the item owns what `first` holds, if
        // `held` says that it holds something.
        let SlotPayload { first, meta } = unsafe { payload.read() };
        let id = meta.id;
        let completion = WorkCompletion { wc: *wc, opcode: meta.opcode, cause: None };
        // SAFETY: the place that there is room for.
        unsafe { item.write(Item { completion, id, first, held, more: 0 }) };
        // SAFETY: the item at `len` was written.
        unsafe { self.items.set_len(len + 1) };
        true
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.items.clear();
        if !self.rest.is_empty() {
            self.rest.clear();
        }
    }

    #[inline]
    pub(crate) fn iter(&mut self) -> Iter<'_> {
        Iter { items: self.items.iter_mut(), rest: &mut self.rest }
    }
}

/// The completions of one poll.
pub(crate) struct Iter<'a> {
    items: std::slice::IterMut<'a, Item>,
    rest: &'a mut [Option<Held>],
}

impl<'a> Iterator for Iter<'a> {
    type Item = Completion<'a>;

    #[inline]
    fn next(&mut self) -> Option<Completion<'a>> {
        let item = self.items.next()?;
        let mut own: &'a mut [Option<Held>] = &mut [];
        if item.more != 0 {
            (own, self.rest) = std::mem::take(&mut self.rest).split_at_mut(usize::from(item.more));
        }
        Some(Completion { item, rest: own })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.items.size_hint()
    }
}

impl ExactSizeIterator for Iter<'_> {}

impl fmt::Debug for Completions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completions").field("len", &self.items.len()).finish_non_exhaustive()
    }
}

/// A completion of a work request that was posted with `post_*`: what it says, and its buffers.
pub struct Completion<'a> {
    item: &'a mut Item,
    rest: &'a mut [Option<Held>],
}

impl Completion<'_> {
    /// The number given to the work request.
    #[must_use]
    #[inline]
    pub fn id(&self) -> u64 {
        self.item.id
    }

    /// What it says.
    #[must_use]
    #[inline]
    pub fn completion(&self) -> &WorkCompletion {
        &self.item.completion
    }

    /// What the work request asked for.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        self.item.completion.opcode
    }

    /// Success, or why not.
    ///
    /// # Errors
    ///
    /// [`CompletionError`].
    #[inline]
    pub fn result(&self) -> Result<Success<'_>, CompletionError> {
        self.item.completion.result()
    }

    /// Takes the first buffer of the scatter/gather list (the only one, of most). After a successful
    /// receive it shows what was received.
    #[inline]
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        match self.item.take_first()? {
            Held::Buffer(mut buffer) => {
                if let Some(len) = self.item.completion.received_len() {
                    buffer.truncate(len);
                }
                Some(buffer)
            }
            Held::Shared(_) | Held::Bytes(_) => None,
        }
    }

    /// Takes all buffers, in the order of the scatter/gather list. After a successful receive they
    /// show what was received.
    pub fn take_buffers(&mut self) -> impl Iterator<Item = Buffer> {
        let first = self.item.take_first();
        let rest = self.rest.iter_mut().filter_map(Option::take);
        let completion = self.item.completion;
        completion.received(first.into_iter().chain(rest))
    }
}

impl fmt::Debug for Completion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("id", &self.item.id)
            .field("completion", &self.item.completion)
            .finish_non_exhaustive()
    }
}
