//! Receive queues: a queue pair's own, and shared ones.

use core::cell::UnsafeCell;
use core::ffi::c_int;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use super::device::{MAX_QUEUE, MAX_SGE};
use super::event::{Acks, Subject};
use super::fail;
use super::memory::Pd;
use crate::bindings::*;

/// A posted receive.
#[derive(Clone, Copy, Default)]
pub(crate) struct Receive {
    pub(crate) wr_id: u64,
    /// Bytes of its buffers.
    pub(crate) capacity: u64,
}

/// Posted receives: a ring, allocated at creation.
pub(crate) struct ReceiveRing {
    entries: Box<[Receive]>,
    depth: u32,
    /// Receives taken out and put in so far, wrapping; the ring's length is a power of two.
    head: u32,
    tail: u32,
}

impl ReceiveRing {
    pub(crate) fn new(depth: u32) -> ReceiveRing {
        let entries = vec![Receive::default(); depth.next_power_of_two() as usize].into_boxed_slice();
        ReceiveRing { entries, depth, head: 0, tail: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    pub(crate) fn clear(&mut self) {
        self.head = self.tail;
    }

    #[inline]
    pub(crate) fn push(&mut self, receive: Receive) -> bool {
        if self.len() >= self.depth {
            return false;
        }
        let at = self.tail as usize & (self.entries.len() - 1);
        self.entries[at] = receive;
        self.tail = self.tail.wrapping_add(1);
        true
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Receive> {
        if self.len() == 0 {
            return None;
        }
        let at = self.head as usize & (self.entries.len() - 1);
        self.head = self.head.wrapping_add(1);
        Some(self.entries[at])
    }
}

/// What a shared receive queue's lock protects.
pub(crate) struct Shared {
    pub(crate) ring: ReceiveRing,
    /// Fewer receives than this give an event, once. 0: none.
    limit: u32,
}

/// A shared receive queue.
#[repr(C)]
pub(crate) struct Srq {
    base: UnsafeCell<ibv_srq>,
    pub(crate) shared: Mutex<Shared>,
    pub(crate) max_sge: u32,
    /// Queue pairs that receive from it.
    pub(crate) uses: AtomicU32,
    pub(crate) acks: Acks,
}

impl Srq {
    /// # Safety
    ///
    /// `raw` is a live shared receive queue of this provider.
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_srq) -> &'a Srq {
        // SAFETY: it points to the first field of a `Srq`.
        unsafe { &*raw.cast::<Srq>() }
    }

    fn pd(&self) -> &Pd {
        let base = self.base.get();
        // SAFETY: set at creation and never changed.
        let pd = unsafe { (*base).pd };
        // SAFETY: a domain outlives its objects.
        unsafe { Pd::from_raw(pd) }
    }

    /// Takes the oldest receive, and reports the limit when that leaves too few.
    pub(crate) fn take(&self) -> Option<Receive> {
        let mut shared = self.shared.lock();
        let receive = shared.ring.pop();
        let reached = shared.ring.len() < shared.limit;
        if reached {
            shared.limit = 0;
        }
        drop(shared);
        if reached {
            let element = ibv_async_event__bindgen_ty_1 { srq: ptr::from_ref(self).cast_mut().cast() };
            self.pd().context().raise(ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED, element);
        }
        receive
    }
}

pub(crate) unsafe extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: the caller passes valid attributes, which are also an output.
    let init = unsafe { &mut *init };
    if init.attr.max_wr == 0 || init.attr.max_wr > MAX_QUEUE || init.attr.max_sge > MAX_SGE {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller passes a live domain.
    let domain = unsafe { Pd::from_raw(pd) };
    domain.born();
    // SAFETY: all zeroes is a valid `ibv_srq`: null pointers, an unlocked mutex, a condition without waiters.
    let mut base = unsafe { MaybeUninit::<ibv_srq>::zeroed().assume_init() };
    base.context = domain.raw_context();
    base.srq_context = init.srq_context;
    base.pd = pd;
    let srq = Srq {
        base: UnsafeCell::new(base),
        shared: Mutex::new(Shared { ring: ReceiveRing::new(init.attr.max_wr), limit: 0 }),
        max_sge: init.attr.max_sge,
        uses: AtomicU32::new(0),
        acks: Acks::default(),
    };
    Box::into_raw(Box::new(srq)).cast()
}

pub(crate) unsafe extern "C" fn modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    // SAFETY: the caller passes a live queue.
    let srq = unsafe { Srq::from_raw(srq) };
    // SAFETY: and valid attributes.
    let attr = unsafe { &*attr };
    let mask = ibv_srq_attr_mask(mask.cast_unsigned());
    if mask.0 & !(ibv_srq_attr_mask::IBV_SRQ_MAX_WR | ibv_srq_attr_mask::IBV_SRQ_LIMIT).0 != 0 {
        return libc::EINVAL;
    }
    let mut shared = srq.shared.lock();
    if mask.0 & ibv_srq_attr_mask::IBV_SRQ_MAX_WR.0 != 0 {
        if attr.max_wr < shared.ring.len() || attr.max_wr == 0 || attr.max_wr > MAX_QUEUE {
            return libc::EINVAL;
        }
        let mut resized = ReceiveRing::new(attr.max_wr);
        while let Some(receive) = shared.ring.pop() {
            resized.push(receive);
        }
        shared.ring = resized;
    }
    if mask.0 & ibv_srq_attr_mask::IBV_SRQ_LIMIT.0 != 0 {
        if attr.srq_limit > shared.ring.depth {
            return libc::EINVAL;
        }
        shared.limit = attr.srq_limit;
    }
    0
}

pub(crate) unsafe extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: the caller passes a live queue.
    let srq = unsafe { Srq::from_raw(srq) };
    let shared = srq.shared.lock();
    let found = ibv_srq_attr { max_wr: shared.ring.depth, max_sge: srq.max_sge, srq_limit: shared.limit };
    // SAFETY: the caller passes a valid output pointer.
    unsafe { attr.write(found) };
    0
}

pub(crate) unsafe extern "C" fn destroy_srq(raw: *mut ibv_srq) -> c_int {
    // SAFETY: the caller passes a live queue.
    let srq = unsafe { Srq::from_raw(raw) };
    if srq.uses.load(Ordering::Acquire) != 0 {
        return libc::EBUSY;
    }
    srq.pd().context().async_events.settle(&srq.acks, |event| Subject::of(event) == Subject::Srq(raw));
    srq.pd().died();
    // SAFETY: it came from `Box::into_raw` in `create_srq`, and nothing refers to it any more.
    drop(unsafe { Box::from_raw(raw.cast::<Srq>()) });
    0
}
