//! Completion queues and channels.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_uint, c_void};
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use super::device::{Context, MAX_CQE};
use super::event::{Acks, EventQueue, Subject};
use super::fail;
use super::qp::Qp;
use crate::bindings::*;
use crate::inline::set_errno;

/// A completion channel.
#[repr(C)]
pub(crate) struct Channel {
    base: UnsafeCell<ibv_comp_channel>,
    events: EventQueue<*mut ibv_cq>,
    /// Completion queues that report to it.
    uses: AtomicU32,
}

impl Channel {
    /// # Safety
    ///
    /// `raw` is null or a live channel of this provider.
    unsafe fn from_raw<'a>(raw: *mut ibv_comp_channel) -> Option<&'a Channel> {
        // SAFETY: it points to the first field of a `Channel`.
        unsafe { raw.cast::<Channel>().as_ref() }
    }
}

pub(crate) unsafe extern "C" fn create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let events = match EventQueue::new() {
        Ok(events) => events,
        Err(error) => return fail(error.raw_os_error().unwrap_or(libc::EMFILE)),
    };
    // SAFETY: the caller passes a live context.
    unsafe { Context::from_raw(context) }.born();
    let base = UnsafeCell::new(ibv_comp_channel { context, fd: events.raw_fd(), refcnt: 0 });
    Box::into_raw(Box::new(Channel { base, events, uses: AtomicU32::new(0) })).cast()
}

pub(crate) unsafe extern "C" fn destroy_comp_channel(raw: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the caller passes a live channel, made by `Box::into_raw` above.
    let channel = unsafe { &*raw.cast::<Channel>() };
    if channel.uses.load(Ordering::Acquire) != 0 {
        return libc::EBUSY;
    }
    let base = channel.base.get();
    // SAFETY: set at creation and never changed.
    let context = unsafe { (*base).context };
    // SAFETY: a context outlives its objects.
    unsafe { Context::from_raw(context) }.died();
    // SAFETY: as above, and no completion queue refers to it any more.
    drop(unsafe { Box::from_raw(raw.cast::<Channel>()) });
    0
}

/// What `ibv_req_notify_cq` asked for.
#[derive(Clone, Copy, PartialEq)]
enum Armed {
    No,
    Solicited,
    Any,
}

/// A completion on its way into a queue.
pub(crate) struct Entry {
    pub(crate) wc: ibv_wc,
    /// Set by the sender's request, on the receiver's completion.
    pub(crate) solicited: bool,
    /// For a completion of a send queue: whose, and how many requests were posted up to this one.
    pub(crate) retires: Option<(*const Qp, u32)>,
}

/// The completions: a ring, allocated at creation.
struct Ring {
    entries: Box<[MaybeUninit<Entry>]>,
    /// Entries taken out and put in so far, wrapping; the ring's length is a power of two.
    head: u32,
    tail: u32,
    armed: Armed,
}

impl Ring {
    fn new(cqe: u32) -> Ring {
        let entries = Box::new_uninit_slice(cqe.next_power_of_two() as usize);
        Ring { entries, head: 0, tail: 0, armed: Armed::No }
    }

    fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    /// The ring's length is that of an allocation of at most `MAX_CQE` entries.
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_CQE")]
    fn capacity(&self) -> u32 {
        self.entries.len() as u32
    }

    fn push(&mut self, entry: Entry) -> bool {
        if self.len() == self.capacity() {
            return false;
        }
        let at = self.tail & (self.capacity() - 1);
        self.entries[at as usize].write(entry);
        self.tail = self.tail.wrapping_add(1);
        true
    }

    #[inline]
    fn pop(&mut self) -> Option<Entry> {
        if self.len() == 0 {
            return None;
        }
        let at = self.head & (self.capacity() - 1);
        self.head = self.head.wrapping_add(1);
        // SAFETY: entries from `head` to `tail` are written, and advancing `head` gives this one up.
        Some(unsafe { self.entries[at as usize].assume_init_read() })
    }
}

/// A completion queue.
#[repr(C)]
pub(crate) struct Cq {
    base: UnsafeCell<ibv_cq>,
    ring: Mutex<Ring>,
    /// Queue pairs that complete to it.
    pub(crate) uses: AtomicU32,
    /// Of events on the channel.
    acks: Acks,
    pub(crate) async_acks: Acks,
}

impl Cq {
    /// # Safety
    ///
    /// `raw` is a live completion queue of this provider.
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_cq) -> &'a Cq {
        // SAFETY: it points to the first field of a `Cq`.
        unsafe { &*raw.cast::<Cq>() }
    }

    fn as_raw(&self) -> *mut ibv_cq {
        ptr::from_ref(self).cast_mut().cast()
    }

    fn context(&self) -> &Context {
        let base = self.base.get();
        // SAFETY: set at creation and never changed.
        let context = unsafe { (*base).context };
        // SAFETY: a context outlives its objects.
        unsafe { Context::from_raw(context) }
    }

    /// Adds an event to the channel, if there is one.
    pub(crate) fn notify(&self) {
        if let Some(channel) = self.channel() {
            self.acks.raised();
            channel.events.push(self.as_raw());
        }
    }

    fn channel(&self) -> Option<&Channel> {
        let base = self.base.get();
        // SAFETY: set at creation and never changed.
        let channel = unsafe { (*base).channel };
        // SAFETY: a channel outlives its queues (destroying it is refused otherwise).
        unsafe { Channel::from_raw(channel) }
    }

    /// Adds a completion, and an event to the channel if the queue was armed for one like it.
    #[inline]
    pub(crate) fn push(&self, entry: Entry) {
        let mut ring = self.ring.lock();
        let wakes = match ring.armed {
            Armed::No => false,
            Armed::Any => true,
            Armed::Solicited => entry.solicited || entry.wc.status != ibv_wc_status::IBV_WC_SUCCESS,
        };
        let fitted = ring.push(entry);
        if wakes {
            ring.armed = Armed::No;
        }
        drop(ring);
        if wakes {
            self.notify();
        }
        if !fitted {
            self.overrun();
        }
    }

    #[cold]
    fn overrun(&self) {
        let element = ibv_async_event__bindgen_ty_1 { cq: self.as_raw() };
        self.context().raise(ibv_event_type::IBV_EVENT_CQ_ERR, element);
    }

    /// Ends a queue pair's tie to its completions; `keep` leaves them in the queue.
    pub(crate) fn disown(&self, qp_num: u32, keep: bool) {
        let mut ring = self.ring.lock();
        for _ in 0..ring.len() {
            if let Some(mut entry) = ring.pop() {
                let its = entry.wc.qp_num == qp_num;
                if its {
                    entry.retires = None;
                }
                if keep || !its {
                    ring.push(entry);
                }
            }
        }
    }
}

pub(crate) unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    let Some(asked) = u32::try_from(cqe).ok().filter(|cqe| (1..=MAX_CQE).contains(cqe)) else {
        return fail(libc::EINVAL);
    };
    if comp_vector != 0 {
        return fail(libc::EINVAL);
    }
    let ring = Ring::new(asked);
    // SAFETY: all zeroes is a valid `ibv_cq`: null pointers, an unlocked mutex, a condition without waiters.
    let mut base = unsafe { MaybeUninit::<ibv_cq>::zeroed().assume_init() };
    base.context = context;
    base.channel = channel;
    base.cq_context = cq_context;
    base.cqe = ring.capacity().cast_signed();
    // SAFETY: the caller passes a live context.
    unsafe { Context::from_raw(context) }.born();
    // SAFETY: the caller passes null or a live channel.
    if let Some(channel) = unsafe { Channel::from_raw(channel) } {
        channel.uses.fetch_add(1, Ordering::Relaxed);
    }
    let cq = Cq {
        base: UnsafeCell::new(base),
        ring: Mutex::new(ring),
        uses: AtomicU32::new(0),
        acks: Acks::default(),
        async_acks: Acks::default(),
    };
    Box::into_raw(Box::new(cq)).cast()
}

pub(crate) unsafe extern "C" fn resize_cq(raw: *mut ibv_cq, cqe: c_int) -> c_int {
    // SAFETY: the caller passes a live queue.
    let cq = unsafe { Cq::from_raw(raw) };
    let Some(asked) = u32::try_from(cqe).ok().filter(|cqe| (1..=MAX_CQE).contains(cqe)) else {
        return libc::EINVAL;
    };
    let mut ring = cq.ring.lock();
    if ring.len() > asked {
        return libc::EINVAL;
    }
    let mut larger = Ring::new(asked);
    larger.armed = ring.armed;
    while let Some(entry) = ring.pop() {
        larger.push(entry);
    }
    let capacity = larger.capacity().cast_signed();
    *ring = larger;
    // SAFETY: the caller serialises a resize with other uses of the public structure.
    unsafe { (*raw).cqe = capacity };
    0
}

pub(crate) unsafe extern "C" fn destroy_cq(raw: *mut ibv_cq) -> c_int {
    // SAFETY: the caller passes a live queue.
    let cq = unsafe { Cq::from_raw(raw) };
    if cq.uses.load(Ordering::Acquire) != 0 {
        return libc::EBUSY;
    }
    if let Some(channel) = cq.channel() {
        channel.events.settle(&cq.acks, |&event| event == raw);
        channel.uses.fetch_sub(1, Ordering::Release);
    }
    cq.context().async_events.settle(&cq.async_acks, |event| Subject::of(event) == Subject::Cq(raw));
    cq.context().died();
    // SAFETY: it came from `Box::into_raw` in `create_cq`, and nothing refers to it any more.
    drop(unsafe { Box::from_raw(raw.cast::<Cq>()) });
    0
}

pub(crate) unsafe extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller passes a live channel.
    let Some(channel) = (unsafe { Channel::from_raw(channel) }) else {
        set_errno(libc::EINVAL);
        return -1;
    };
    match channel.events.take() {
        Ok(raw) => {
            // SAFETY: the queue is live: it waits for the acknowledgement of this event before it goes.
            let user = unsafe { (*raw).cq_context };
            // SAFETY: the caller passes a valid output pointer.
            unsafe { cq.write(raw) };
            // SAFETY: as above.
            unsafe { cq_context.write(user) };
            0
        }
        Err(error) => {
            set_errno(error.raw_os_error().unwrap_or(libc::EIO));
            -1
        }
    }
}

pub(crate) unsafe extern "C" fn ack_cq_events(cq: *mut ibv_cq, count: c_uint) {
    // SAFETY: the caller passes a live queue.
    unsafe { Cq::from_raw(cq) }.acks.acknowledge(count);
}

pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live queue.
    let mut ring = unsafe { Cq::from_raw(cq) }.ring.lock();
    // A later, weaker request does not undo a stronger one (IBTA 11.4.2.2).
    if solicited_only == 0 {
        ring.armed = Armed::Any;
    } else if ring.armed == Armed::No {
        ring.armed = Armed::Solicited;
    }
    0
}

pub(crate) unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller passes a live queue.
    let mut ring = unsafe { Cq::from_raw(cq) }.ring.lock();
    let mut count = 0;
    while count < num_entries
        && let Some(entry) = ring.pop()
    {
        if let Some((qp, posted)) = entry.retires {
            // SAFETY: a queue pair removes its completions before it goes, under this queue's lock.
            unsafe { &*qp }.retire(posted);
        }
        // SAFETY: the caller's array has `num_entries` entries.
        let at = unsafe { wc.add(count as usize) };
        // SAFETY: as above.
        unsafe { at.write(entry.wc) };
        count += 1;
    }
    count
}
