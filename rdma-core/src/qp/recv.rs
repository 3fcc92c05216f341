//! Posting receives.

use std::mem::MaybeUninit;

use verbs_sys::{ibv_qp, ibv_recv_wr, ibv_sge, ibv_srq, inline};

use super::inner::QpInner;
use super::post::{fill, take_back_buffer, take_back_paid};
use super::refusal::{PostError, PostErrorKind, Refusal, refused, refused_chain};
use super::request::{Data, Payload, RecvRequest};
use crate::cq::Opcode;
use crate::inflight::{Held, Meta, PostState, Posted, WorkQueue, WrId};
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

    /// Posts requests in order until one cannot be: gives how many were, and why no more. Those that were posted have lost their
    /// memory, and so have others for which completions came all the same.
    pub(crate) fn post_recv_chain(&self, requests: &mut [RecvRequest]) -> (usize, Option<PostErrorKind>) {
        let (queue, target) = (&*self.rq, self.recv_target());
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        post.recv_chain.clear();
        post.sges.clear();
        let mut refusal = None;
        for request in requests.iter_mut() {
            let listed = post.sges.len();
            let added = match add_plain(queue, post, request) {
                None => add(queue, post, request),
                Some(wr) => Ok(wr),
            };
            match added {
                Ok(wr) => post.recv_chain.push(wr),
                Err(kind) => {
                    post.sges.truncate(listed);
                    refusal = Some(kind);
                    break;
                }
            }
        }
        let count = post.recv_chain.len();
        if count == 0 {
            return (0, refusal);
        }
        // The vectors have stopped growing: their addresses hold.
        let mut first = std::ptr::null_mut();
        let mut list = post.sges.as_mut_ptr().wrapping_add(post.sges.len());
        for wr in post.recv_chain.iter_mut().rev() {
            list = list.wrapping_sub(usize::try_from(wr.num_sge).unwrap_or(0));
            (wr.next, wr.sg_list) = (first, list);
            first = wr;
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: pair and shared queue are live (S-1); the chain is linked and terminated, and valid for the call; the memory it names is
        // held by the slots until the completions (S-2).
        let code = unsafe { target.post(first, &raw mut bad) };
        if code == 0 {
            return (count, refusal);
        }
        let place = post.recv_chain.iter().position(|wr| std::ptr::eq(wr, bad));
        let (done, kind) = refused_chain(target.verb(), code, place, count);
        for i in (done..count).rev() {
            let slot = WrId(post.recv_chain[i].wr_id).slot();
            requests[i].payload = take_back_paid(queue, post, slot, false);
        }
        (done, Some(kind))
    }

    #[inline(never)]
    fn post_any_recv(&self, request: RecvRequest, owned: bool) -> Result<u32, PostError<RecvRequest>> {
        let target = self.recv_target();
        // SAFETY: pair and shared queue are live (S-1), and `rq` is the queue of whichever it is.
        unsafe { post_recv(&self.rq, target, request, owned) }
    }
}

/// As `add`, of a receive of one buffer where nothing but a slot is needed.
#[inline(always)]
fn add_plain(queue: &WorkQueue, post: &mut PostState, request: &mut RecvRequest) -> Option<ibv_recv_wr> {
    if !request.is_plain() {
        return None;
    }
    // A shared queue is never plain.
    let free = queue.acquire_plain(post)?;
    let data = std::mem::replace(&mut request.payload.data, Data::None);
    let Data::One(Held::Buffer(buffer)) = data else { unreachable!("one buffer") };
    post.sges.push(buffer.sge());
    let step = post.plain_step;
    // SAFETY: the poster, and it acquired the slot.
    let wr_id = unsafe { post.fill_buffer::<false>(&free, request.id, Opcode::Recv, step, buffer) }.0;
    Some(ibv_recv_wr { wr_id, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 1 })
}

/// Adds one receive to the chain, with its slot filled and published: gives its work request, whose list is not yet named.
#[inline(never)]
fn add(
    queue: &WorkQueue,
    post: &mut PostState,
    request: &mut RecvRequest,
) -> Result<ibv_recv_wr, PostErrorKind> {
    if !request.payload.is_writable() {
        return Err(PostErrorKind::NotWritable);
    }
    let before = post.sges.len();
    request.payload.list(&mut post.sges, queue.max_sge())?;
    let num_sge = i32::try_from(post.sges.len() - before).unwrap_or(i32::MAX);
    let Some(free) = queue.acquire_paid(post) else { return Err(PostErrorKind::QueueFull) };
    let (slot, payload) = (free.index(), free.payload());
    // SAFETY: a place inside the payload.
    let first = unsafe { &raw mut (*payload).first };
    let taken = Payload { data: std::mem::replace(&mut request.payload.data, Data::None) };
    // SAFETY: the poster, and `list` checked the length.
    let held = unsafe { taken.hold(queue, slot, first.cast()) };
    // SAFETY: the poster; what was there was taken out before the slot was released.
    unsafe { fill(payload, Meta { id: request.id, keep: None, seq: 0, held, opcode: Opcode::Recv }) };
    let wr_id = free.publish(const { Posted::Polled.step() }).0;
    Ok(ibv_recv_wr { wr_id, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge })
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
        request.payload = take_back_paid(queue, post, slot, owned);
        refused(target.verb(), code)
    };
    drop(guard);
    Err(PostError { kind, request })
}
