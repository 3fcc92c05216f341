//! Posting receives.

use std::mem::MaybeUninit;

use verbs_sys::{ibv_qp, ibv_recv_wr, ibv_sge, ibv_srq, inline};

use super::inner::QpInner;
use super::post::{fill, take_back, take_back_buffer};
use super::refusal::{PostError, PostErrorKind, Refusal, refused};
use super::request::RecvRequest;
use crate::cq::Opcode;
use crate::inflight::{Meta, Posted, WorkQueue};
use crate::mr::{Buffer, RawBuffer};

/// Where a receive goes.
#[derive(Clone, Copy)]
pub(crate) enum RecvTarget {
    Pair(*mut ibv_qp),
    Shared(*mut ibv_srq),
}

impl RecvTarget {
    /// The verb that posts to it.
    fn verb(self) -> &'static str {
        match self {
            RecvTarget::Pair(_) => "ibv_post_recv",
            RecvTarget::Shared(_) => "ibv_post_srq_recv",
        }
    }

    /// Calls that verb.
    ///
    /// # Safety
    ///
    /// The target is live, the request valid, and the memory it names stays so until the completion.
    #[inline(always)]
    unsafe fn post(self, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> i32 {
        match self {
            // SAFETY: the caller's promise.
            RecvTarget::Pair(qp) => unsafe { inline::ibv_post_recv(qp, wr, bad) },
            // SAFETY: the caller's promise.
            RecvTarget::Shared(srq) => unsafe { inline::ibv_post_srq_recv(srq, wr, bad) },
        }
    }
}

impl QpInner {
    /// Posts one receive; gives its slot.
    #[inline(always)]
    pub(crate) fn post_recv(&self, request: RecvRequest, owned: bool) -> Result<u32, PostError<RecvRequest>> {
        if !request.is_plain() {
            return self.post_any_recv(request, owned);
        }
        let (id, buffer) = request.into_plain();
        let raw = buffer.into_raw();
        let posted = if owned {
            self.rq.slots.prepare_owned();
            // SAFETY: a buffer given up.
            unsafe { self.post_recv_buffer::<true>(id, raw) }
        } else {
            // SAFETY: a buffer given up.
            unsafe { self.post_recv_buffer::<false>(id, raw) }
        };
        posted.or_else(|refusal| {
            // SAFETY: refused, so it is the caller's again, unless the refusal says otherwise.
            let request = RecvRequest { id, payload: unsafe { refusal.payload(raw) } };
            match refusal {
                Refusal::Busy => self.post_any_recv(request, owned),
                refusal => Err(PostError { kind: refusal.kind("ibv_post_recv"), request }),
            }
        })
    }

    /// Posts a receive of one buffer to the pair's own queue.
    ///
    /// # Safety
    ///
    /// `buffer` is of `Buffer::into_raw`, and is taken when that succeeds, or is refused as `Lost`.
    #[inline(always)]
    unsafe fn post_recv_buffer<const OWNED: bool>(&self, id: u64, buffer: RawBuffer) -> Result<u32, Refusal> {
        let queue = &*self.rq;
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        // A shared queue is never plain.
        let Some(free) = queue.acquire_plain(post) else { return Err(Refusal::Busy) };
        // SAFETY: the caller gives it.
        let buffer = unsafe { Buffer::from_raw(buffer) };
        let request = post.scratch.request();
        // SAFETY: the poster.
        unsafe { request.set_sge(buffer.sge()) };
        // SAFETY: the poster, and it acquired the slot.
        let wr_id = unsafe { post.fill_buffer::<OWNED>(&free, id, Opcode::Recv, post.plain_step, buffer) };
        // SAFETY: the poster.
        let wr = unsafe { request.recv(wr_id) };
        let mut bad = MaybeUninit::uninit();
        // SAFETY: the pair is live (S-1); list and request are valid for the call; the memory they name is held by the
        // slot until the completion (S-2).
        let code = unsafe { (self.post_recv)(self.ptr.as_ptr(), wr, bad.as_mut_ptr()) };
        if code != 0 {
            return Err(take_back_buffer(queue, post, wr_id.slot(), OWNED, code));
        }
        // Only an operation needs to know.
        Ok(if OWNED { wr_id.slot() } else { 0 })
    }

    #[inline]
    fn recv_target(&self) -> RecvTarget {
        match &self.srq {
            None => RecvTarget::Pair(self.ptr.as_ptr()),
            Some(srq) => RecvTarget::Shared(srq.ptr.as_ptr()),
        }
    }

    #[inline(never)]
    fn post_any_recv(&self, request: RecvRequest, owned: bool) -> Result<u32, PostError<RecvRequest>> {
        let target = self.recv_target();
        // SAFETY: pair and shared queue are live (S-1), and `rq` is the queue of whichever it is.
        unsafe { post_recv(&self.rq, target, request, owned) }
    }
}

/// Posts one receive to a pair's own or a shared queue.
///
/// # Safety
///
/// `queue` is the library's side of `target`, which is live.
#[inline]
pub(crate) unsafe fn post_recv(
    queue: &WorkQueue,
    target: RecvTarget,
    mut request: RecvRequest,
    owned: bool,
) -> Result<u32, PostError<RecvRequest>> {
    let mut sge = ibv_sge::default();
    let mut guard = queue.lock_post();
    let post = &mut *guard;
    let kind = 'refused: {
        if !request.payload.is_writable() {
            break 'refused PostErrorKind::NotWritable;
        }
        post.sges.resize(queue.max_sge() as usize, ibv_sge::default());
        let list = match request.payload.describe(&mut sge, &mut post.sges) {
            Ok(list) => list,
            Err(kind) => break 'refused kind,
        };
        if owned {
            queue.slots.prepare_owned();
        }
        let Some(free) = queue.acquire_paid(post) else { break 'refused PostErrorKind::QueueFull };
        let slot = free.index();
        let payload = free.payload();
        // SAFETY: a place inside the payload.
        let first = unsafe { &raw mut (*payload).first };
        // SAFETY: the poster, and `describe` checked the length.
        let held = unsafe { request.payload.hold(queue, slot, first.cast()) };
        // SAFETY: the poster; what was there was taken out before the slot was released.
        unsafe { fill(payload, Meta { id: request.id, keep: None, seq: 0, held, opcode: Opcode::Recv }) };
        let mut wr = ibv_recv_wr {
            wr_id: free.publish(Posted::new(owned).step()).0,
            next: std::ptr::null_mut(),
            sg_list: list.ptr,
            num_sge: list.count,
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: live, by the caller; list and request are valid for the call; the memory they name is
        // held by the slot until the completion (S-2).
        let code = unsafe { target.post(&raw mut wr, &raw mut bad) };
        if code == 0 {
            return Ok(slot);
        }
        queue.return_credits(1);
        request.payload = take_back(queue, post, slot, owned);
        refused(target.verb(), code)
    };
    drop(guard);
    Err(PostError { kind, request })
}
