//! Posting receives.

use verbs_sys::{ibv_qp, ibv_recv_wr, ibv_sge, ibv_srq, inline};

use super::inner::QpInner;
use super::post::{fill, take_back, take_back_buffer};
use super::refusal::{PostError, PostErrorKind, Refusal, refused};
use super::request::{Data, Payload, RecvRequest};
use crate::cq::Opcode;
use crate::inflight::{Held, Kind, Meta, WorkQueue};
use crate::mr::Buffer;

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
        let mut buffer = Some(buffer);
        match self.post_recv_buffer(id, &mut buffer, owned) {
            Ok(slot) => Ok(slot),
            Err(refusal) => {
                let payload =
                    Payload { data: buffer.map_or(Data::None, |buffer| Data::One(Held::Buffer(buffer))) };
                Err(PostError {
                    kind: refusal.kind(self.recv_target().verb()),
                    request: RecvRequest { id, payload },
                })
            }
        }
    }

    #[inline(never)]
    fn post_recv_buffer(&self, id: u64, buffer: &mut Option<Buffer>, owned: bool) -> Result<u32, Refusal> {
        let target = self.recv_target();
        // SAFETY: pair and shared queue are live (S-1), and `rq` is the queue of whichever it is.
        unsafe { post_recv_buffer(&self.rq, target, id, buffer, owned) }
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

/// Posts a receive of one buffer, which it takes when that succeeds.
///
/// # Safety
///
/// `queue` is the library's side of `target`, which is live.
#[inline(always)]
unsafe fn post_recv_buffer(
    queue: &WorkQueue,
    target: RecvTarget,
    id: u64,
    buffer: &mut Option<Buffer>,
    owned: bool,
) -> Result<u32, Refusal> {
    if owned {
        queue.slots.prepare_owned();
    }
    let mut guard = queue.lock_post();
    let post = &mut *guard;
    let cursor = post.cursor;
    let Some(free) = queue.acquire(post) else { return Err(Refusal::Full) };
    if let Kind::Recv(cq) = &queue.kind
        && !cq.take_credits(1)
    {
        post.cursor = cursor;
        return Err(Refusal::Full);
    }
    let Some(taken) = buffer.take() else { return Err(Refusal::Full) };
    post.sge = taken.sge();
    let payload = free.payload();
    // SAFETY: a place inside the payload.
    let first = unsafe { &raw mut (*payload).first };
    // SAFETY: the poster owns the payload until `publish`.
    unsafe { first.cast::<Held>().write(Held::Buffer(taken)) };
    // SAFETY: the poster; what was there was taken out before the slot was released.
    unsafe { fill(payload, Meta { id, keep: None, seq: 0, held: 1, opcode: Opcode::Recv }) };
    let generation = free.publish(owned);
    post.recv.wr_id = queue.wr_id(free.index, generation);
    post.recv.sg_list = &raw mut post.sge;
    post.recv.num_sge = 1;
    let mut bad = std::ptr::null_mut();
    let wr = &raw mut post.recv;
    // SAFETY: live, by the caller; list and request are valid for the call; the memory they name is held
    // by the slot until the completion (S-2).
    let code = unsafe { target.post(wr, &raw mut bad) };
    if code != 0 {
        if let Kind::Recv(cq) = &queue.kind {
            cq.return_credits(1);
        }
        *buffer = take_back_buffer(queue, post, free.index, owned);
        return Err(Refusal::from_code(code));
    }
    Ok(free.index)
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
        let cursor = post.cursor;
        let Some(free) = queue.acquire(post) else { break 'refused PostErrorKind::QueueFull };
        let slot = free.index;
        if let Kind::Recv(cq) = &queue.kind
            && !cq.take_credits(1)
        {
            post.cursor = cursor;
            break 'refused PostErrorKind::QueueFull;
        }
        let payload = free.payload();
        // SAFETY: a place inside the payload.
        let first = unsafe { &raw mut (*payload).first };
        // SAFETY: the poster, and `describe` checked the length.
        let held = unsafe { request.payload.hold(queue, slot, first.cast()) };
        // SAFETY: the poster; what was there was taken out before the slot was released.
        unsafe { fill(payload, Meta { id: request.id, keep: None, seq: 0, held, opcode: Opcode::Recv }) };
        let generation = free.publish(owned);
        let mut wr = ibv_recv_wr {
            wr_id: queue.wr_id(slot, generation),
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
        if let Kind::Recv(cq) = &queue.kind {
            cq.return_credits(1);
        }
        request.payload = take_back(queue, post, slot, owned);
        refused(target.verb(), code)
    };
    drop(guard);
    Err(PostError { kind, request })
}
