//! Events that a program waits for on a file descriptor.
//!
//! The descriptor that programs get is an epoll instance: it becomes readable through poll, select and
//! epoll as any other, its `O_NONBLOCK` flag is the program's to set, and what it watches is ours. One
//! thing it watches is an eventfd that says whether the queue of events holds any.
//!
//! No wake-up is lost because of two rules, both under the queue's lock: `raised` is set before the
//! eventfd is written, and is cleared only together with a read that took the write away. So while
//! `raised` is set the eventfd is readable or about to be, and once [`EventQueue::signal`] returned
//! `raised` is set whenever the queue holds anything. The write itself happens outside of the lock, so
//! that whom it wakes does not run into it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{OFlags, fcntl_getfl};

/// An event of an object that counts those which programs have.
pub(crate) trait OfObject {
    fn count(&self) -> &EventCount;
}

/// Events of one kind and the descriptors that announce them.
#[derive(Debug)]
pub(crate) struct EventQueue<T> {
    state: Mutex<State<T>>,
    /// There is no event and `raised` is not set: to see without the lock, under which it changes.
    quiet: AtomicBool,
    eventfd: OwnedFd,
    epoll: OwnedFd,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<T>,
    raised: bool,
    /// Of objects that are about to be destroyed: nobody takes them.
    aside: Vec<T>,
}

impl<T: OfObject> EventQueue<T> {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &eventfd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let state = Mutex::new(State { queue: VecDeque::new(), raised: false, aside: Vec::new() });
        Ok(EventQueue { state, quiet: AtomicBool::new(true), eventfd, epoll })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the descriptor is readable also when `fd` is.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?)
    }

    /// The descriptor for the program.
    pub(crate) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Whether the program asked not to be blocked.
    pub(crate) fn is_nonblocking(&self) -> bool {
        fcntl_getfl(&self.epoll).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK))
    }

    /// Queues an event; [`signal`](Self::signal) must follow before anyone can sleep on it. Nothing comes of one whose object is gone.
    pub(crate) fn push(&self, event: T) {
        let mut state = self.lock();
        match event.count().stage.load(Ordering::Relaxed) {
            OPEN => {
                state.queue.push_back(event);
                self.quiet.store(false, Ordering::Release);
            }
            CLOSING => state.aside.push(event),
            _ => {}
        }
    }

    /// Makes the descriptor readable if events wait that it does not announce yet.
    pub(crate) fn signal(&self) {
        // Most likely the thread that drove the device took them itself.
        if self.is_quiet() {
            return;
        }
        {
            let mut state = self.lock();
            if state.queue.is_empty() || state.raised {
                return;
            }
            state.raised = true;
        }
        // Cannot fail: the counter is far from its limit, as each write is preceded by a read.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Takes the oldest event, which counts as taken from then on.
    pub(crate) fn pop(&self) -> Option<T> {
        if self.is_quiet() {
            return None;
        }
        let mut state = self.lock();
        let event = state.queue.pop_front();
        if let Some(event) = &event {
            event.count().taken();
        }
        if state.queue.is_empty() && state.raised {
            // Nothing to read means that the write is still on its way: the descriptor will be readable
            // without an event once, and `raised` stays until that is read.
            if rustix::io::read(&self.eventfd, &mut [0; 8]).is_ok() {
                state.raised = false;
            }
        }
        self.quiet.store(state.queue.is_empty() && !state.raised, Ordering::Release);
        event
    }

    fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire)
    }

    /// The object is to be destroyed: nobody takes its events from now on. Waits until those that a program has are acknowledged; if that
    /// takes too long, all is as before, and the answer false. Otherwise [`forget`](Self::forget) or [`reopen`](Self::reopen) must follow.
    pub(crate) fn close(&self, count: &EventCount) -> bool {
        let mut state = self.lock();
        count.stage.store(CLOSING, Ordering::Relaxed);
        let State { queue, aside, .. } = &mut *state;
        for _ in 0..queue.len() {
            match queue.pop_front() {
                Some(event) if is_of(&event, count) => aside.push(event),
                Some(other) => queue.push_back(other),
                None => break,
            }
        }
        drop(state);
        let closed = count.wait();
        if !closed {
            self.reopen(count);
        }
        closed
    }

    /// The object is not destroyed after all.
    pub(crate) fn reopen(&self, count: &EventCount) {
        let mut state = self.lock();
        count.stage.store(OPEN, Ordering::Relaxed);
        for event in std::mem::take(&mut state.aside) {
            let State { queue, aside, .. } = &mut *state;
            if is_of(&event, count) { queue.push_back(event) } else { aside.push(event) }
        }
        self.quiet.store(state.queue.is_empty() && !state.raised, Ordering::Release);
        drop(state);
        self.signal();
    }

    /// The object is gone, and so are its events, also those that are still to come.
    pub(crate) fn forget(&self, count: &EventCount) {
        let mut state = self.lock();
        count.stage.store(CLOSED, Ordering::Relaxed);
        state.aside.retain(|event| !is_of(event, count));
    }

    /// Sleeps until the descriptor is readable, without end.
    pub(crate) fn sleep(&self) -> io::Result<()> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
        epoll::wait(&self.epoll, &mut events, None)?;
        Ok(())
    }
}

fn is_of(event: &impl OfObject, count: &EventCount) -> bool {
    std::ptr::eq(event.count(), count)
}

/// Events of the object are queued and taken.
const OPEN: u8 = 0;
/// It is about to be destroyed.
const CLOSING: u8 = 1;
/// It is gone.
const CLOSED: u8 = 2;

/// How many events of an object a program took and how many it acknowledged, all from one queue.
#[derive(Debug, Default)]
pub(crate) struct EventCount {
    counts: Mutex<(u32, u32)>,
    acknowledged: Condvar,
    /// Changed and looked at under the lock of the queue of its events.
    stage: AtomicU8,
}

impl EventCount {
    fn taken(&self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.0 = counts.0.wrapping_add(1);
    }

    pub(crate) fn acknowledge(&self, n: u32) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.1 = counts.1.wrapping_add(n);
        self.acknowledged.notify_all();
    }

    /// Waits until every event taken was acknowledged, as the manual pages say of the destroy calls; false
    /// if that did not happen within a few seconds, where libibverbs would wait for ever.
    fn wait(&self) -> bool {
        const LIMIT: Duration = Duration::from_secs(5);
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (_guard, timeout) = self
            .acknowledged
            .wait_timeout_while(counts, LIMIT, |(taken, acknowledged)| taken != acknowledged)
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }
}

/// An asynchronous event of this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AsyncEvent {
    CqError,
    Qp(crate::proto::Event),
    LastWqeReached,
    SrqLimitReached,
}

impl OfObject for QueuedEvent {
    fn count(&self) -> &EventCount {
        &self.count
    }
}

/// One asynchronous event as it waits: what, of which object, and that object's count.
#[derive(Debug)]
pub(crate) struct QueuedEvent {
    pub(crate) event: AsyncEvent,
    /// Address of the C structure, never followed here.
    pub(crate) identity: usize,
    count: Arc<EventCount>,
}

/// The asynchronous events of one context.
#[derive(Debug)]
pub(crate) struct AsyncEvents(EventQueue<QueuedEvent>);

impl AsyncEvents {
    pub(crate) fn new() -> io::Result<Self> {
        EventQueue::new().map(AsyncEvents)
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.fd()
    }

    pub(crate) fn raise(&self, event: AsyncEvent, identity: usize, count: &Arc<EventCount>) {
        self.0.push(QueuedEvent { event, identity, count: Arc::clone(count) });
        self.0.signal();
    }

    /// The next event; blocks unless the descriptor says otherwise.
    pub(crate) fn take(&self) -> io::Result<QueuedEvent> {
        loop {
            if let Some(event) = self.0.pop() {
                return Ok(event);
            }
            if self.0.is_nonblocking() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.0.sleep()?;
        }
    }

    /// See [`EventQueue::close`].
    pub(crate) fn close(&self, count: &EventCount) -> bool {
        self.0.close(count)
    }

    /// See [`EventQueue::forget`].
    pub(crate) fn forget(&self, count: &EventCount) {
        self.0.forget(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    struct Numbered {
        number: u32,
        object: Arc<EventCount>,
    }

    impl OfObject for Numbered {
        fn count(&self) -> &EventCount {
            &self.object
        }
    }

    fn push(queue: &EventQueue<Numbered>, number: u32, object: &Arc<EventCount>) {
        queue.push(Numbered { number, object: Arc::clone(object) });
        queue.signal();
    }

    /// Takes and acknowledges.
    fn pop(queue: &EventQueue<Numbered>) -> Option<u32> {
        let event = queue.pop()?;
        event.object.acknowledge(1);
        Some(event.number)
    }

    fn readable<T>(queue: &EventQueue<T>) -> bool {
        let mut fds = [PollFd::new(&queue.epoll, PollFlags::IN)];
        poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn the_descriptor_says_whether_events_wait() {
        let (queue, object) = (EventQueue::new().unwrap(), Arc::default());
        assert!(!readable(&queue));
        push(&queue, 1, &object);
        push(&queue, 2, &object);
        assert!(readable(&queue));
        assert_eq!(pop(&queue), Some(1));
        assert!(readable(&queue));
        assert_eq!(pop(&queue), Some(2));
        assert!(!readable(&queue));
        assert_eq!(pop(&queue), None);
    }

    #[test]
    fn no_wake_up_is_lost_between_two_threads() {
        let queue = Arc::new(EventQueue::new().unwrap());
        let producer = {
            let (queue, object) = (Arc::clone(&queue), Arc::default());
            std::thread::spawn(move || (0..20_000).for_each(|i| push(&queue, i, &object)))
        };
        let mut next = 0;
        while next < 20_000 {
            match pop(&queue) {
                Some(number) => {
                    assert_eq!(number, next);
                    next += 1;
                }
                None => queue.sleep().unwrap(),
            }
        }
        producer.join().unwrap();
    }

    #[test]
    fn acknowledgements_are_waited_for() {
        let (queue, object) = (EventQueue::new().unwrap(), Arc::default());
        push(&queue, 1, &object);
        push(&queue, 2, &object);
        let taken = (queue.pop().unwrap(), queue.pop().unwrap());
        let acknowledges = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            taken.0.object.acknowledge(2);
        });
        assert!(queue.close(&object));
        assert!(acknowledges.is_finished() || acknowledges.join().is_ok());
        assert_eq!(*object.counts.lock().unwrap(), (2, 2));
    }

    #[test]
    fn nobody_takes_an_event_of_an_object_that_goes() {
        let queue = EventQueue::new().unwrap();
        let (first, second) = (Arc::default(), Arc::default());
        push(&queue, 1, &first);
        push(&queue, 2, &second);
        push(&queue, 3, &first);
        assert!(queue.close(&first));
        push(&queue, 4, &first);
        assert_eq!((pop(&queue), pop(&queue)), (Some(2), None));
        // It stays after all, and has lost nothing.
        queue.reopen(&first);
        assert!(readable(&queue));
        assert_eq!([(); 4].map(|()| pop(&queue)), [Some(1), Some(3), Some(4), None]);
        // It goes, and what comes late comes to nothing.
        push(&queue, 5, &first);
        push(&queue, 6, &second);
        assert!(queue.close(&first));
        queue.forget(&first);
        push(&queue, 7, &first);
        assert_eq!((pop(&queue), pop(&queue)), (Some(6), None));
        assert!(queue.lock().aside.is_empty());
    }
}
