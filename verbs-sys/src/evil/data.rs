//! The data path: the null provider's, with failing posts and dishonest completions.

use core::ffi::c_int;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU32, Ordering};

use super::Evil;
use super::control::Object;
use super::dma::Queue;
use super::knob::Fault;
use crate::bindings::*;
use crate::null::{cq, post};

/// How many delivered completions are kept for `replay`.
const KEPT: usize = 1024;

/// Takes one from a counter that is not yet 0.
fn take(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl Evil {
    /// The next completion of a queue, as the device tells it.
    ///
    /// # Safety
    ///
    /// `queue` is live.
    unsafe fn next(&self, queue: *mut ibv_cq) -> Option<ibv_wc> {
        let mut strays = self.strays.lock();
        if let Some(stray) = strays.pop_front() {
            return Some(stray);
        }
        loop {
            let mut wc = ibv_wc::default();
            // SAFETY: a live queue, and room for one.
            if unsafe { cq::poll_cq(queue, 1, &raw mut wc) } == 0 {
                return None;
            }
            if take(&self.lose) {
                continue;
            }
            self.done_with(&wc);
            self.completion.apply(&mut wc);
            for _ in 0..self.repeats.load(Ordering::Relaxed) {
                strays.push_back(wc);
            }
            let mut delivered = self.delivered.lock();
            if delivered.len() < KEPT {
                delivered.push(wc);
            }
            return Some(wc);
        }
    }
}

impl Evil {
    /// The device no longer touches the memory of the request that a completion is about.
    fn done_with(&self, wc: &ibv_wc) {
        let receive = wc.opcode.0 & ibv_wc_opcode::IBV_WC_RECV.0 != 0;
        if let Some((pair, shared)) = self.live.lock().pair(wc.qp_num) {
            let queue = match (receive, shared) {
                (false, _) => Queue::Send(pair),
                (true, None) => Queue::Receive(pair),
                (true, Some(shared)) => Queue::Shared(shared),
            };
            self.dma.lock().complete(queue, wc.wr_id);
        }
    }
}

pub(super) unsafe extern "C" fn poll_cq(queue: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller passes a live queue.
    let evil = unsafe { queue.evil() };
    if let Some(errno) = evil.poll_cq.strike() {
        return errno.wrapping_neg();
    }
    let mut count = 0;
    while count < num_entries && !evil.held.load(Ordering::Relaxed) {
        // SAFETY: as above.
        let Some(next) = (unsafe { evil.next(queue) }) else { break };
        // SAFETY: the caller's array has `num_entries` entries.
        let at = unsafe { wc.add(count as usize) };
        // SAFETY: as above.
        unsafe { at.write(next) };
        count += 1;
    }
    evil.poll_count.apply(&mut count);
    count
}

pub(super) unsafe extern "C" fn req_notify_cq(queue: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live queue.
    match unsafe { queue.evil() }.req_notify_cq.strike() {
        Some(errno) => errno,
        // SAFETY: the caller's arguments.
        None => unsafe { cq::req_notify_cq(queue, solicited_only) },
    }
}

pub(super) unsafe extern "C" fn bind_mw(pair: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: the caller passes a live pair.
    match unsafe { pair.evil() }.bind_mw.strike() {
        Some(errno) => errno,
        // SAFETY: the caller's arguments.
        None => unsafe { post::bind_mw(pair, mw, bind) },
    }
}

/// A work request: part of a list.
trait Request: Copy {
    fn next_mut(&mut self) -> &mut *mut Self;
    fn id(&self) -> u64;
    fn list(&self) -> (*mut ibv_sge, c_int);
    /// Whether the device reads or writes its buffers, and which; `None` for inline data.
    fn writes(&self) -> Option<bool>;
}

impl Request for ibv_send_wr {
    fn next_mut(&mut self) -> &mut *mut ibv_send_wr {
        &mut self.next
    }

    fn id(&self) -> u64 {
        self.wr_id
    }

    fn list(&self) -> (*mut ibv_sge, c_int) {
        (self.sg_list, self.num_sge)
    }

    fn writes(&self) -> Option<bool> {
        let inline = self.send_flags & ibv_send_flags::IBV_SEND_INLINE.0 != 0;
        let fetches = matches!(
            self.opcode,
            ibv_wr_opcode::IBV_WR_RDMA_READ
                | ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP
                | ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD
        );
        (!inline).then_some(fetches)
    }
}

impl Request for ibv_recv_wr {
    fn next_mut(&mut self) -> &mut *mut ibv_recv_wr {
        &mut self.next
    }

    fn id(&self) -> u64 {
        self.wr_id
    }

    fn list(&self) -> (*mut ibv_sge, c_int) {
        (self.sg_list, self.num_sge)
    }

    fn writes(&self) -> Option<bool> {
        Some(true)
    }
}

/// Posts one request, whose buffers the device may touch from before it can complete.
///
/// # Safety
///
/// `one` is a valid request.
unsafe fn post_one<W: Request>(
    evil: &Evil,
    queue: Queue,
    one: &mut W,
    post: impl FnOnce(*mut W) -> c_int,
) -> c_int {
    let (list, count) = one.list();
    let count = usize::try_from(count).unwrap_or(0);
    let id = one.id();
    let writes = one.writes().filter(|_| count > 0);
    if let Some(writes) = writes {
        // SAFETY: the caller's promise: a valid list, and not an empty one.
        let buffers = unsafe { slice::from_raw_parts(list, count) };
        evil.dma.lock().post(queue, id, writes, buffers);
    }
    let status = post(one);
    if status != 0 && writes.is_some() {
        evil.dma.lock().refuse(queue, id);
    }
    status
}

/// Posts a list one by one until `fault` strikes or `post` refuses.
///
/// # Safety
///
/// `wr` is a list of valid requests that ends with a null pointer, `bad_wr` valid for writes.
unsafe fn post_each<W: Request>(
    evil: &Evil,
    fault: &Fault,
    queue: Queue,
    mut wr: *mut W,
    bad_wr: *mut *mut W,
    post: impl Fn(*mut W) -> c_int,
) -> c_int {
    while !wr.is_null() {
        // SAFETY: the caller's promise.
        let mut one = unsafe { *wr };
        let next = core::mem::replace(one.next_mut(), ptr::null_mut());
        let status = match fault.strike() {
            Some(errno) => errno,
            // SAFETY: the caller's promise.
            None => unsafe { post_one(evil, queue, &mut one, &post) },
        };
        if status != 0 {
            if !evil.omits_bad_wr.load(Ordering::Relaxed) {
                // SAFETY: the caller's promise.
                unsafe { bad_wr.write(wr) };
            }
            return status;
        }
        wr = next;
    }
    0
}

macro_rules! posts {
    ($($name:ident($object:ident: $ty:ty, $wr:ty) = $queue:path;)*) => {$(
        pub(super) unsafe extern "C" fn $name($object: *mut $ty, wr: *mut $wr, bad_wr: *mut *mut $wr) -> c_int {
            // SAFETY: the caller passes a live object.
            let evil = unsafe { $object.evil() };
            let post = |one| {
                let mut bad = ptr::null_mut();
                // SAFETY: a live object and a list of one valid request.
                unsafe { post::$name($object, one, &raw mut bad) }
            };
            // SAFETY: the caller's list.
            unsafe { post_each(evil, &evil.$name, $queue($object.addr()), wr, bad_wr, post) }
        }
    )*};
}

posts! {
    post_send(pair: ibv_qp, ibv_send_wr) = Queue::Send;
    post_recv(pair: ibv_qp, ibv_recv_wr) = Queue::Receive;
    post_srq_recv(queue: ibv_srq, ibv_recv_wr) = Queue::Shared;
}
