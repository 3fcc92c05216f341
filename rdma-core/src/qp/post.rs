//! Posting one work request.

use std::mem::MaybeUninit;
use std::sync::Arc;

use verbs_sys::{
    ibv_send_flags, ibv_send_wr, ibv_send_wr__bindgen_ty_2__bindgen_ty_1 as RawRdma,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_2 as RawAtomic, ibv_send_wr__bindgen_ty_2__bindgen_ty_3 as RawUd,
    ibv_send_wr__bindgen_ty_4__bindgen_ty_1 as RawBind, ibv_sge, ibv_wr_opcode as Op,
};

use super::inner::QpInner;
use super::refusal::{PostError, PostErrorKind, Refusal};
use super::request::{Action, Data, Payload, WorkRequest};
use super::transport::Transport;
use crate::cq::Opcode;
use crate::inflight::{Held, HeldList, Keep, Meta, PostState, Posted, SlotPayload, WorkQueue};
use crate::mr::{Buffer, RawBuffer, RemoteSlice};

/// A scatter/gather list as the verb takes it.
pub(super) struct List {
    pub(super) ptr: *mut ibv_sge,
    pub(super) count: i32,
    /// Bytes it describes.
    pub(super) len: u64,
}

impl Payload<'_> {
    /// Describes the memory: a single part in `one`, a list in `many`.
    #[inline(always)]
    pub(super) fn describe(&self, one: &mut ibv_sge, many: &mut [ibv_sge]) -> Result<List, PostErrorKind> {
        match &self.data {
            Data::One(Held::Buffer(buffer)) => *one = buffer.sge(),
            Data::One(held) => *one = held.sge(),
            Data::None => return Ok(List { ptr: std::ptr::null_mut(), count: 0, len: 0 }),
            Data::Inline(bytes) => {
                let too_long = |_| PostErrorKind::InlineTooLong { asked: bytes.len(), limit: u32::MAX };
                let length = u32::try_from(bytes.len()).map_err(too_long)?;
                *one = ibv_sge { addr: bytes.as_ptr().addr() as u64, length, lkey: 0 };
            }
            Data::Many(parts) => return Self::describe_many(parts, many),
        }
        Ok(List { ptr: one, count: 1, len: u64::from(one.length) })
    }

    /// Appends its scatter/gather list, of at most `limit` entries; gives the bytes it describes.
    pub(super) fn list(&self, list: &mut Vec<ibv_sge>, limit: u32) -> Result<u64, PostErrorKind> {
        if let Data::Many(parts) = &self.data {
            if parts.len() > limit as usize {
                return Err(PostErrorKind::TooManySegments { asked: parts.len(), limit });
            }
            list.extend(parts.iter().map(Held::sge));
            return Ok(parts.iter().map(|part| u64::from(part.sge().length)).sum());
        }
        let mut one = ibv_sge::default();
        let described = self.describe(&mut one, &mut [])?;
        if described.count > 0 {
            list.push(one);
        }
        Ok(described.len)
    }

    #[inline(never)]
    fn describe_many(parts: &[Held], list: &mut [ibv_sge]) -> Result<List, PostErrorKind> {
        if parts.len() > list.len() {
            let limit = u32::try_from(list.len()).unwrap_or(u32::MAX);
            return Err(PostErrorKind::TooManySegments { asked: parts.len(), limit });
        }
        let mut len = 0;
        for (entry, part) in list.iter_mut().zip(parts) {
            *entry = part.sge();
            len += u64::from(entry.length);
        }
        let count = i32::try_from(parts.len()).unwrap_or(i32::MAX);
        Ok(List { ptr: list.as_mut_ptr(), count, len })
    }

    /// Whether the device may write to all of it.
    #[inline]
    pub(super) fn is_writable(&self) -> bool {
        match &self.data {
            Data::One(held) => !matches!(held, Held::Bytes(_)),
            Data::Many(parts) => !parts.iter().any(|part| matches!(part, Held::Bytes(_))),
            Data::None => true,
            Data::Inline(_) => false,
        }
    }

    /// Moves what must live into the slot; gives how many entries that are.
    ///
    /// # Safety
    ///
    /// The caller is the poster of `queue` and acquired the slot; `describe` said that it fits; `first`
    /// is the slot's.
    #[inline(always)]
    pub(super) unsafe fn hold(self, queue: &WorkQueue, slot: u32, first: *mut Held) -> u16 {
        match self.data {
            Data::One(held) => {
                // SAFETY: the caller's promise.
                unsafe { first.write(held) };
                1
            }
            Data::None | Data::Inline(_) => 0,
            // SAFETY: the caller's promise.
            Data::Many(parts) => unsafe { Self::hold_many(parts, queue, slot, first) },
        }
    }

    /// # Safety
    ///
    /// As for `hold`.
    #[inline(never)]
    unsafe fn hold_many(parts: Vec<Held>, queue: &WorkQueue, slot: u32, first: *mut Held) -> u16 {
        let mut count = 0;
        for part in parts {
            if count == 0 {
                // SAFETY: the caller's promise.
                unsafe { first.write(part) };
            } else {
                // SAFETY: the caller's promise: no more parts than the queue's limit.
                unsafe { queue.hold_more(slot, count, part) };
            }
            count += 1;
        }
        u16::try_from(count).unwrap_or(u16::MAX)
    }
}

impl Action {
    /// Writes the operation to the raw work request, once it is checked against `len` bytes of payload.
    pub(super) fn describe(
        &self,
        qp: &QpInner,
        wr: &mut ibv_send_wr,
        len: u64,
        writable: bool,
    ) -> Result<Opcode, PostErrorKind> {
        let rdma = |remote: &RemoteSlice| {
            if len > remote.len {
                return Err(PostErrorKind::OutOfBounds { asked: len, limit: remote.len });
            }
            Ok(RawRdma { remote_addr: remote.addr, rkey: remote.rkey })
        };
        let atomic = |remote: &RemoteSlice, compare_add: u64, swap: u64| {
            if !writable {
                return Err(PostErrorKind::NotWritable);
            }
            if len != 8 || remote.len < 8 || !remote.addr.is_multiple_of(8) {
                return Err(PostErrorKind::BadAtomic);
            }
            Ok(RawAtomic { remote_addr: remote.addr, compare_add, swap, rkey: remote.rkey })
        };
        Ok(match self {
            Action::Send => {
                wr.opcode = Op::IBV_WR_SEND;
                Opcode::Send
            }
            Action::SendImm(imm) => {
                wr.opcode = Op::IBV_WR_SEND_WITH_IMM;
                wr.__bindgen_anon_1.imm_data = imm.to_be();
                Opcode::Send
            }
            Action::SendInvalidate(rkey) => {
                wr.opcode = Op::IBV_WR_SEND_WITH_INV;
                wr.__bindgen_anon_1.invalidate_rkey = *rkey;
                Opcode::Send
            }
            Action::SendTo { address, qp_num, qkey, imm } => {
                // Another provider's handle would be taken for one of this provider's.
                if address.pd != qp.pd.ptr {
                    return Err(PostErrorKind::WrongDomain { what: "the address handle" });
                }
                wr.opcode = Op::IBV_WR_SEND;
                if let Some(imm) = imm {
                    wr.opcode = Op::IBV_WR_SEND_WITH_IMM;
                    wr.__bindgen_anon_1.imm_data = imm.to_be();
                }
                wr.wr.ud = RawUd { ah: address.ptr.as_ptr(), remote_qpn: *qp_num, remote_qkey: *qkey };
                Opcode::Send
            }
            Action::Write(remote) => {
                wr.opcode = Op::IBV_WR_RDMA_WRITE;
                wr.wr.rdma = rdma(remote)?;
                Opcode::Write
            }
            Action::WriteImm(remote, imm) => {
                wr.opcode = Op::IBV_WR_RDMA_WRITE_WITH_IMM;
                wr.__bindgen_anon_1.imm_data = imm.to_be();
                wr.wr.rdma = rdma(remote)?;
                Opcode::Write
            }
            Action::Read(remote) => {
                if !writable {
                    return Err(PostErrorKind::NotWritable);
                }
                wr.opcode = Op::IBV_WR_RDMA_READ;
                wr.wr.rdma = rdma(remote)?;
                Opcode::Read
            }
            Action::CompareAndSwap { remote, expected, new } => {
                wr.opcode = Op::IBV_WR_ATOMIC_CMP_AND_SWP;
                wr.wr.atomic = atomic(remote, *expected, *new)?;
                Opcode::CompareAndSwap
            }
            Action::FetchAndAdd { remote, add } => {
                wr.opcode = Op::IBV_WR_ATOMIC_FETCH_AND_ADD;
                wr.wr.atomic = atomic(remote, *add, 0)?;
                Opcode::FetchAndAdd
            }
            Action::Invalidate(rkey) => {
                wr.opcode = Op::IBV_WR_LOCAL_INV;
                wr.__bindgen_anon_1.invalidate_rkey = *rkey;
                Opcode::Invalidate
            }
            Action::Bind(binding) => {
                // Another provider's window would be taken for one of this provider's.
                if !Arc::ptr_eq(&binding.window.pd, &qp.pd) {
                    return Err(PostErrorKind::WrongDomain { what: "the memory window" });
                }
                let Some(mw) = binding.window.post_on(qp, binding.rkey) else {
                    return Err(PostErrorKind::WindowGone);
                };
                wr.opcode = Op::IBV_WR_BIND_MW;
                wr.__bindgen_anon_2.bind_mw =
                    RawBind { mw: mw.as_ptr(), rkey: binding.rkey, bind_info: binding.info() };
                Opcode::Bind
            }
        })
    }

    /// What the action keeps alive.
    pub(super) fn keep(&self) -> Option<Keep> {
        match self {
            Action::SendTo { address, .. } => Some(address.keep.clone()),
            Action::Bind(binding) => Some(binding.keep()),
            _ => None,
        }
    }
}

pub(super) const SIGNALED: u32 = ibv_send_flags::IBV_SEND_SIGNALED.0;

/// A raw send request, all zero.
#[inline]
pub(super) fn raw_send() -> ibv_send_wr {
    // SAFETY: integers, null pointers and unions of them: all zeroes are a value.
    unsafe { std::mem::zeroed() }
}

impl QpInner {
    /// Posts one send; gives its slot.
    #[inline(always)]
    pub(crate) fn post_send<'d, T: Transport>(
        &self,
        request: WorkRequest<'d, T>,
        owned: bool,
    ) -> Result<u32, PostError<WorkRequest<'d, T>>> {
        // The compiler sees which it is, and the rest of the request dissolves.
        if !request.is_plain_send() {
            return self.post_other_send(request, owned);
        }
        let (id, flags, buffer) = request.into_plain_send();
        let raw = buffer.into_raw();
        let posted = if owned {
            self.sq.slots.prepare_owned();
            // SAFETY: a buffer given up.
            unsafe { self.post_buffer::<true>(id, flags, raw) }
        } else {
            // SAFETY: a buffer given up.
            unsafe { self.post_buffer::<false>(id, flags, raw) }
        };
        posted.or_else(|refusal| {
            // SAFETY: refused, so it is the caller's again, unless the refusal says otherwise.
            let request = WorkRequest::of_parts(id, Action::Send, flags, unsafe { refusal.payload(raw) });
            match refusal {
                Refusal::Busy => self.post_any_send(request, owned),
                refusal => Err(PostError { kind: refusal.kind("ibv_post_send"), request }),
            }
        })
    }

    /// Posts a signalled SEND of one buffer.
    ///
    /// # Safety
    ///
    /// `buffer` is of `Buffer::into_raw`, and is taken when that succeeds, or is refused as `Lost`.
    #[inline(always)]
    unsafe fn post_buffer<const OWNED: bool>(
        &self,
        id: u64,
        flags: u32,
        buffer: RawBuffer,
    ) -> Result<u32, Refusal> {
        let queue = &*self.sq;
        // Order of slots is order of posting, so the lock is held over the verb.
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        let Some(free) = queue.acquire_plain(post) else { return Err(Refusal::Busy) };
        // SAFETY: the caller gives it.
        let buffer = unsafe { Buffer::from_raw(buffer) };
        let request = post.scratch.request();
        // SAFETY: the poster.
        unsafe { request.set_sge(buffer.sge()) };
        // SAFETY: the poster, and it acquired the slot.
        let wr_id = unsafe { post.fill_buffer::<OWNED>(&free, id, Opcode::Send, post.plain_step, buffer) };
        // SAFETY: the poster.
        let wr = unsafe { request.send(wr_id, flags) };
        let mut bad = MaybeUninit::uninit();
        // SAFETY: the pair is live (S-1); list and request are valid for the call; the memory they
        // name is held by the slot until the completion (S-2).
        let code = unsafe { (self.post_send)(self.ptr.as_ptr(), wr, bad.as_mut_ptr()) };
        if code != 0 {
            return Err(take_back_buffer(queue, post, wr_id.slot(), OWNED, code));
        }
        // Only an operation needs to know.
        Ok(if OWNED { wr_id.slot() } else { 0 })
    }

    /// Posts one send that is not a plain one; gives its slot. What is of one signalled buffer and keeps nothing else alive
    /// completes as plain sends do.
    #[inline(never)]
    fn post_other_send<'d, T: Transport>(
        &self,
        request: WorkRequest<'d, T>,
        owned: bool,
    ) -> Result<u32, PostError<WorkRequest<'d, T>>> {
        let Some(mut sge) = request.single_buffer() else { return self.post_any_send(request, owned) };
        let queue = &*self.sq;
        let mut wr = raw_send();
        let described = request.action.describe(self, &mut wr, u64::from(sge.length), true);
        let opcode = match described {
            Ok(opcode) => opcode,
            Err(kind) => return Err(PostError { kind, request }),
        };
        if owned {
            queue.slots.prepare_owned();
        }
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        let Some(free) = queue.acquire_plain(post) else {
            drop(guard);
            return self.post_any_send(request, owned);
        };
        let (id, action, flags, buffer) = request.into_single_buffer();
        let raw = buffer.into_raw();
        // SAFETY: just given up; if the post is refused it is the caller's again.
        let buffer = unsafe { Buffer::from_raw(raw) };
        let wr_id = if owned {
            // SAFETY: the poster, and it acquired the slot.
            unsafe { post.fill_buffer::<true>(&free, id, opcode, 0, buffer) }
        } else {
            let step = Posted::Simple(opcode as u8).step();
            // SAFETY: as above.
            unsafe { post.fill_buffer::<false>(&free, id, opcode, step, buffer) }
        };
        wr.wr_id = wr_id.0;
        wr.sg_list = &raw mut sge;
        wr.num_sge = 1;
        wr.send_flags = flags;
        let mut bad = MaybeUninit::uninit();
        // SAFETY: as in `post_buffer`.
        let code = unsafe { (self.post_send)(self.ptr.as_ptr(), &raw mut wr, bad.as_mut_ptr()) };
        if code == 0 {
            return Ok(wr_id.slot());
        }
        let refusal = take_back_buffer(queue, post, wr_id.slot(), owned, code);
        drop(guard);
        // SAFETY: refused, so it is the caller's again, unless the refusal says otherwise.
        let request = WorkRequest::of_parts(id, action, flags, unsafe { refusal.payload(raw) });
        Err(PostError { kind: refusal.kind("ibv_post_send"), request })
    }

    /// Posts one send of any kind; gives its slot.
    #[inline(never)]
    fn post_any_send<'d, T: Transport>(
        &self,
        request: WorkRequest<'d, T>,
        owned: bool,
    ) -> Result<u32, PostError<WorkRequest<'d, T>>> {
        let mut slot = 0;
        let mut chain = [request];
        let (_, refusal) = self.post_chain(&mut chain, owned, |posted| slot = posted);
        let [request] = chain;
        match refusal {
            None => Ok(slot),
            Some(kind) => Err(PostError { kind, request }),
        }
    }
}

/// Writes a slot's payload, but for the entries of its list.
///
/// # Safety
///
/// The caller is the poster, the payload that of a slot it acquired: what was there was taken out before
/// the slot was released.
#[inline(always)]
pub(super) unsafe fn fill(payload: *mut SlotPayload, meta: Meta) {
    // SAFETY: a place inside the payload.
    let place = unsafe { &raw mut (*payload).meta };
    // SAFETY: the caller owns the payload.
    unsafe { place.write(meta) };
}

/// What a slot held, after its post failed; and whether a completion for it came all the same, which has returned a credit.
pub(super) fn take_back<'d>(
    queue: &WorkQueue,
    post: &mut PostState,
    slot: u32,
    owned: bool,
) -> (Payload<'d>, bool) {
    // The ring goes on where it was, or what is in flight would no longer be in its order.
    queue.slots.set_cursor(&mut post.cursor, slot);
    let (taken, is_completed) = queue.retract(slot, owned);
    let data = match taken.map(|taken| taken.held) {
        None | Some(HeldList { first: None, .. }) => Data::None,
        Some(HeldList { first: Some(held), rest }) if rest.is_empty() => Data::One(held),
        Some(several) => Data::Many(several.into_iter().collect()),
    };
    (Payload { data }, is_completed)
}

/// As `take_back`, of a slot that took one credit, which goes back, too.
pub(super) fn take_back_paid<'d>(
    queue: &WorkQueue,
    post: &mut PostState,
    slot: u32,
    owned: bool,
) -> Payload<'d> {
    let (payload, is_completed) = take_back(queue, post, slot, owned);
    if !is_completed {
        queue.return_credits(1);
    }
    payload
}

/// As `take_back_paid`, of a slot with one buffer, which the caller of the post has again unless it is `Lost`.
#[cold]
pub(super) fn take_back_buffer(
    queue: &WorkQueue,
    post: &mut PostState,
    slot: u32,
    owned: bool,
    code: i32,
) -> Refusal {
    match take_back_paid(queue, post, slot, owned).into_buffers().next() {
        Some(buffer) => {
            let _ = buffer.into_raw();
            Refusal::from_code(code)
        }
        None => Refusal::Lost(code),
    }
}
