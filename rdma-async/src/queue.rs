//! A completion queue that futures wait on.

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll, Waker},
    time::Instant,
};

use parking_lot::Mutex;
use rdma_core::{Error, Notify, PollError};

use crate::{
    counters::QueueCounters,
    driver::Driver,
    reader::{self, Deliver, Key, Reader, Room},
    trace,
    wait::{BUSY_TURN, WaitMode, WaitTimes},
};

/// A completion queue whose completions wake futures; any number of queue pairs can share one.
///
/// Clones are the same queue. Made by [`Domain::completion_queue`](crate::Domain::completion_queue).
#[derive(Clone)]
pub struct CompletionQueue {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) cq: rdma_core::CompletionQueue,
    pub(crate) reader: Mutex<Reader>,
    /// Registered with `rdma-core` for futures that wait for room: see `Room`.
    room: Waker,
    mode: WaitMode,
    times: WaitTimes,
    /// The next completion raises an event, or an event was raised that the driver has yet to take. See `sleep`.
    armed: AtomicBool,
    /// Futures that rely on an event.
    sleepers: AtomicUsize,
    statistics: Statistics,
    /// Takes this queue's events; declared last so that it outlives the queue.
    driver: Arc<Driver>,
}

#[derive(Default)]
struct Statistics {
    spins: AtomicU64,
    sleeps: AtomicU64,
    arms: AtomicU64,
    events: AtomicU64,
}

impl CompletionQueue {
    pub(crate) fn new(cq: rdma_core::CompletionQueue, mode: WaitMode, driver: Arc<Driver>) -> Self {
        let room = Arc::new(Room::default());
        CompletionQueue {
            shared: Arc::new(Shared {
                cq,
                reader: Mutex::new(Reader::new(Arc::clone(&room))),
                room: room.into(),
                mode,
                times: WaitTimes::new(),
                armed: AtomicBool::new(false),
                sleepers: AtomicUsize::new(0),
                statistics: Statistics::default(),
                driver,
            }),
        }
    }

    /// How futures wait on this queue.
    #[must_use]
    pub fn wait_mode(&self) -> WaitMode {
        self.shared.mode
    }

    /// Dispatches what has completed, without waiting; gives the number of completions.
    ///
    /// Operations do this themselves. It is for a program that waits for its *memory* to change, because a peer writes it:
    /// nothing completes then, but a device in software receives when its queue is asked.
    ///
    /// # Errors
    ///
    /// The queue cannot be read.
    pub fn dispatch(&self) -> Result<usize, PollError> {
        self.shared.dispatch()
    }

    /// What happened on this queue so far.
    #[must_use]
    pub fn counters(&self) -> QueueCounters {
        let Statistics { spins, sleeps, arms, events } = &self.shared.statistics;
        QueueCounters {
            spins: spins.load(Relaxed),
            sleeps: sleeps.load(Relaxed),
            arms: arms.load(Relaxed),
            events: events.load(Relaxed),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.driver.remove(self.cq.user());
    }
}

impl Shared {
    /// Reads completions once, hands them to their lanes, and wakes who waits for them. The caller holds no lane's lock. Gives how many
    /// there were.
    pub(crate) fn dispatch(&self) -> Result<usize, PollError> {
        let mut reader = self.reader.lock();
        let count = reader.read(&self.cq)?;
        let has_put_off = reader.has_put_off();
        drop(reader);
        if has_put_off {
            reader::run(&self.reader);
        }
        Ok(count)
    }

    pub(crate) fn add_lane(&self, lane: Arc<dyn Deliver>) -> Key {
        self.reader.lock().add(lane)
    }

    pub(crate) fn remove_lane(&self, key: Key) {
        let lane = self.reader.lock().remove(key);
        drop(lane);
    }

    /// Ready when `queue` has room for a work request; otherwise wakes when it may. The caller holds no lock.
    pub(crate) fn poll_room(&self, queue: &rdma_core::inflight::WorkQueue, waker: &Waker) -> Poll<()> {
        // In this order: room that is found after the second step wakes what the first one left.
        self.reader.lock().starve(waker);
        queue.poll_ready(&mut Context::from_waker(&self.room))
    }

    /// An event of this queue was taken, and with it the queue disarmed: dispatches what is there. `rearm` must follow.
    pub(crate) fn on_event(&self) {
        self.statistics.events.fetch_add(1, Relaxed);
        self.armed.store(false, SeqCst);
        if let Err(error) = self.drain() {
            trace::queue_failed(&error);
        }
    }

    /// Arms the queue again if futures still sleep and none of them did so meanwhile.
    pub(crate) fn rearm(&self) {
        // A future that is missed here, because it goes to sleep only now, finds the queue disarmed and arms it.
        if self.sleepers.load(SeqCst) > 0
            && !self.armed.swap(true, SeqCst)
            && let Err(error) = self.arm_and_drain()
        {
            // The futures that wait here meet the same error when they poll; a sleeping one does so when its
            // connection's keep-alive polls.
            self.armed.store(false, SeqCst);
            trace::queue_failed(&error);
        }
    }

    /// Completions that came before the queue was armed raise no event: they are dispatched here.
    fn arm_and_drain(&self) -> Result<(), Error> {
        self.statistics.arms.fetch_add(1, Relaxed);
        self.cq.arm(Notify::Any)?;
        self.drain()
    }

    /// A poll that read less than it could left the queue empty. Another one, in vain, would make a device in software send its
    /// acknowledgement alone, when the future that is woken here may be about to answer.
    fn drain(&self) -> Result<(), Error> {
        while self.dispatch()? >= rdma_core::CompletionQueue::BATCH {}
        Ok(())
    }
}

/// One future's wait for a completion of a queue, over any number of polls.
pub(crate) struct Waiter<'q> {
    queue: &'q Shared,
    /// When it first looked in vain.
    since: Option<Instant>,
    /// It counts among the queue's sleepers.
    asleep: bool,
}

impl<'q> Waiter<'q> {
    #[inline]
    pub(crate) fn new(queue: &'q Shared) -> Self {
        Waiter { queue, since: None, asleep: false }
    }

    /// Polls until `check` is ready or it is time to let other tasks run.
    ///
    /// `check` looks whether what the future waits for is there; with a context it registers the waker if not.
    ///
    /// # Errors
    ///
    /// A poll of the completion queue that failed: what the future waits for may never come.
    #[inline]
    pub(crate) fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut check: impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Poll<Result<T, Error>> {
        if let Poll::Ready(value) = check(None) {
            self.found();
            return Poll::Ready(Ok(value));
        }
        let dispatched = match self.queue.dispatch() {
            Ok(count) => count,
            Err(error) => return Poll::Ready(Err(error.into())),
        };
        if dispatched > 0
            && let Poll::Ready(value) = check(None)
        {
            self.found();
            return Poll::Ready(Ok(value));
        }
        self.wait(cx, check)
    }

    fn wait<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut check: impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Poll<Result<T, Error>> {
        self.wake_up();
        match self.spin(&mut check) {
            Ok(Spin::Found(value)) => {
                self.found();
                return Poll::Ready(Ok(value));
            }
            Ok(Spin::Yield) => {
                yield_to_runtime(cx);
                return Poll::Pending;
            }
            Ok(Spin::Sleep) => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
        // Sleep. First the waker, then the announcement, then the flag: an event that the driver takes after it saw no
        // sleeper leaves the flag cleared for us, and any other dispatches our completion, whose waker is in place.
        if let Poll::Ready(value) = check(Some(cx)) {
            self.found();
            return Poll::Ready(Ok(value));
        }
        match self.sleep() {
            Ok(true) => return Poll::Pending,
            Ok(false) => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
        match check(None) {
            Poll::Ready(value) => {
                self.found();
                Poll::Ready(Ok(value))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Whether a wait does not begin with spinning.
    #[inline]
    pub(crate) fn sleeps_at_once(&self) -> bool {
        self.queue.mode == WaitMode::Event
    }

    /// Goes to sleep; the waker is where it will be called. False when the queue had to be armed, which dispatched what had come before:
    /// then a last look is due.
    #[inline]
    pub(crate) fn sleep(&mut self) -> Result<bool, Error> {
        self.asleep = true;
        self.queue.statistics.sleeps.fetch_add(1, Relaxed);
        self.queue.sleepers.fetch_add(1, SeqCst);
        if self.queue.armed.swap(true, SeqCst) {
            return Ok(true);
        }
        if let Err(error) = self.queue.arm_and_drain() {
            self.queue.armed.store(false, SeqCst);
            return Err(error);
        }
        Ok(false)
    }

    fn spin<T>(
        &mut self,
        check: &mut impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Result<Spin<T>, Error> {
        let queue = self.queue;
        let (start, limit) = match queue.mode {
            WaitMode::Event => return Ok(Spin::Sleep),
            WaitMode::Busy => (Instant::now(), BUSY_TURN),
            WaitMode::Adaptive => (*self.since.get_or_insert_with(Instant::now), queue.times.spin()),
        };
        let at_the_end = if queue.mode == WaitMode::Busy { Spin::Yield } else { Spin::Sleep };
        let mut spins = 0;
        let end = loop {
            if start.elapsed() >= limit {
                break at_the_end;
            }
            spins += 1;
            std::hint::spin_loop();
            let dispatched = queue.dispatch()?;
            // Also without a completion of this round: another thread may have dispatched ours.
            if let Poll::Ready(value) = check(None) {
                break Spin::Found(value);
            }
            // Other futures were woken, probably of this thread: they have something to do, this one has not.
            if dispatched > 0 {
                break Spin::Yield;
            }
        };
        queue.statistics.spins.fetch_add(spins, Relaxed);
        Ok(end)
    }

    /// What the future waited for is there.
    #[inline]
    pub(crate) fn found(&mut self) {
        self.wake_up();
        if let Some(since) = self.since.take() {
            self.queue.times.learn(since.elapsed());
        }
    }

    #[inline]
    fn wake_up(&mut self) {
        if std::mem::take(&mut self.asleep) {
            self.queue.sleepers.fetch_sub(1, SeqCst);
        }
    }
}

enum Spin<T> {
    Found(T),
    Yield,
    Sleep,
}

impl Drop for Waiter<'_> {
    #[inline]
    fn drop(&mut self) {
        self.wake_up();
    }
}

/// Lets other tasks and the runtime's I/O run, then polls this one again.
fn yield_to_runtime(cx: &mut Context<'_>) {
    // The future is dropped at once: what counts is that its first poll put the waker behind all others.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("mode", &self.shared.mode).finish_non_exhaustive()
    }
}
