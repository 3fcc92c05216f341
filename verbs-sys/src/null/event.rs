//! Events on a file descriptor, and the count of those that were not yet acknowledged.

use core::ffi::c_int;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use parking_lot::{Condvar, Mutex};

use super::cq::Cq;
use super::device::Context;
use super::qp::Qp;
use super::srq::Srq;
use crate::bindings::*;
use crate::inline::set_errno;

/// A queue of events behind an eventfd that is readable while the queue is not empty.
pub(crate) struct EventQueue<T> {
    fd: OwnedFd,
    queue: Mutex<VecDeque<T>>,
}

impl<T> EventQueue<T> {
    pub(crate) fn new() -> io::Result<EventQueue<T>> {
        // SAFETY: no precondition.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just created and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(EventQueue { fd, queue: Mutex::new(VecDeque::with_capacity(16)) })
    }

    pub(crate) fn raw_fd(&self) -> c_int {
        self.fd.as_raw_fd()
    }

    /// Adds an event. Every one writes to the descriptor, so that edge-triggered sleepers see it.
    pub(crate) fn push(&self, event: T) {
        let mut queue = self.queue.lock();
        queue.push_back(event);
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight readable bytes; the count stays far below an eventfd's limit, so that this cannot block.
        unsafe { libc::write(self.raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Takes the oldest event; waits for one unless the descriptor is non-blocking (`EAGAIN`).
    pub(crate) fn take(&self) -> io::Result<T> {
        loop {
            let mut queue = self.queue.lock();
            if let Some(event) = queue.pop_front() {
                self.clear_if_empty(&queue);
                return Ok(event);
            }
            drop(queue);
            // SAFETY: no precondition beyond an open descriptor, which `self` owns.
            let flags = unsafe { libc::fcntl(self.raw_fd(), libc::F_GETFL) };
            if flags < 0 || flags & libc::O_NONBLOCK != 0 {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            let mut wait = libc::pollfd { fd: self.raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            if unsafe { libc::poll(&raw mut wait, 1, -1) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }

    /// Removes the events that nobody took of an object about to be destroyed, and waits for the
    /// acknowledgement of the others.
    pub(crate) fn settle(&self, acks: &Acks, is_its: impl Fn(&T) -> bool) {
        let mut queue = self.queue.lock();
        let before = queue.len();
        queue.retain(|event| !is_its(event));
        let removed = before - queue.len();
        if removed > 0 {
            self.clear_if_empty(&queue);
        }
        drop(queue);
        acks.settle(removed);
    }

    /// Makes the descriptor unreadable when the last event left the queue, whose lock is held.
    fn clear_if_empty(&self, queue: &VecDeque<T>) {
        if queue.is_empty() {
            let mut count = [0_u8; 8];
            // SAFETY: eight writable bytes; the descriptor is readable, since the queue was not empty, so this cannot block.
            unsafe { libc::read(self.raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        }
    }
}

/// Events of one object that were raised and not yet acknowledged. They keep the object alive.
#[derive(Default)]
pub(crate) struct Acks {
    /// Negative after one acknowledgement too many.
    pending: Mutex<i64>,
    settled: Condvar,
}

impl Acks {
    /// Counts an event, before it can be taken.
    pub(crate) fn raised(&self) {
        *self.pending.lock() += 1;
    }

    pub(crate) fn acknowledge(&self, count: u32) {
        let mut pending = self.pending.lock();
        *pending -= i64::from(count);
        // Under the lock: once it is free the waiter may free this structure.
        self.settled.notify_all();
    }

    /// Waits until every event but the `removed` ones was acknowledged, as destroying the object must.
    fn settle(&self, removed: usize) {
        let mut pending = self.pending.lock();
        *pending -= i64::try_from(removed).unwrap_or(i64::MAX);
        while *pending > 0 {
            self.settled.wait(&mut pending);
        }
    }
}

/// What an asynchronous event is about.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Subject {
    Cq(*mut ibv_cq),
    Qp(*mut ibv_qp),
    Srq(*mut ibv_srq),
    /// The port, the device, or something that this provider does not know.
    Device,
}

impl Subject {
    pub(crate) fn of(event: &ibv_async_event) -> Subject {
        match event.event_type {
            // SAFETY: the type says which element was set.
            ibv_event_type::IBV_EVENT_CQ_ERR => Subject::Cq(unsafe { event.element.cq }),
            ibv_event_type::IBV_EVENT_SRQ_ERR | ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED => {
                // SAFETY: as above.
                Subject::Srq(unsafe { event.element.srq })
            }
            ibv_event_type::IBV_EVENT_QP_FATAL
            | ibv_event_type::IBV_EVENT_QP_REQ_ERR
            | ibv_event_type::IBV_EVENT_QP_ACCESS_ERR
            | ibv_event_type::IBV_EVENT_COMM_EST
            | ibv_event_type::IBV_EVENT_SQ_DRAINED
            | ibv_event_type::IBV_EVENT_PATH_MIG
            | ibv_event_type::IBV_EVENT_PATH_MIG_ERR
            | ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED => {
                // SAFETY: as above.
                Subject::Qp(unsafe { event.element.qp })
            }
            _ => Subject::Device,
        }
    }

    /// The acknowledgements that the object waits for.
    ///
    /// # Safety
    ///
    /// The object is live.
    unsafe fn acks<'a>(self) -> Option<&'a Acks> {
        match self {
            // SAFETY: the caller's promise.
            Subject::Cq(cq) => Some(&unsafe { Cq::from_raw(cq) }.async_acks),
            // SAFETY: as above.
            Subject::Qp(qp) => Some(&unsafe { Qp::from_raw(qp) }.acks),
            // SAFETY: as above.
            Subject::Srq(srq) => Some(&unsafe { Srq::from_raw(srq) }.acks),
            Subject::Device => None,
        }
    }
}

impl Context {
    /// Raises an asynchronous event about an object of this context, or about the device.
    pub(crate) fn raise(&self, event_type: ibv_event_type, element: ibv_async_event__bindgen_ty_1) {
        let event = ibv_async_event { element, event_type };
        // SAFETY: whoever raises an event about an object has that object.
        if let Some(acks) = unsafe { Subject::of(&event).acks() } {
            acks.raised();
        }
        self.async_events.push(event);
    }
}

pub(crate) unsafe extern "C" fn get_async_event(
    context: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let context = unsafe { Context::from_raw(context) };
    match context.async_events.take() {
        Ok(taken) => {
            // SAFETY: the caller passes a valid output pointer.
            unsafe { event.write(taken) };
            0
        }
        Err(error) => {
            set_errno(error.raw_os_error().unwrap_or(libc::EIO));
            -1
        }
    }
}

pub(crate) unsafe extern "C" fn ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the caller passes an event that it got above; its object waits for this call.
    let event = unsafe { &*event };
    // SAFETY: as above.
    if let Some(acks) = unsafe { Subject::of(event).acks() } {
        acks.acknowledge(1);
    }
}
