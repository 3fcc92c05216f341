//! A completion queue that futures wait on.

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;
use rdma_core::{Error, Notify, PollError};
use tokio::runtime::Handle;

use crate::{
    counters::QueueCounters,
    driver::Driver,
    duty::Duty,
    poller::Post,
    reader::{self, Deliver, Key, Reader, Room},
    trace,
    wait::{WaitMode, WaitTimes},
    waiter::Turn,
};

/// Completions that are dispatched at most before the futures that they wake run: as many tasks as a worker of tokio queues without
/// giving some to other workers.
const MOST_AT_ONCE: usize = 128;

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
    pub(crate) mode: WaitMode,
    pub(crate) times: WaitTimes,
    pub(crate) turn: Turn,
    /// Places that the receives of lanes hold.
    kept: AtomicU32,
    pub(crate) duty: Duty,
    pub(crate) post: Post,
    /// The poller runs whenever the driver's task does.
    driver_may_rely: bool,
    this: Weak<Shared>,
    pub(crate) statistics: Statistics,
    /// Takes this queue's events; declared last so that it outlives the queue.
    pub(crate) driver: Arc<Driver>,
}

#[derive(Default)]
pub(crate) struct Statistics {
    pub(crate) spins: AtomicU64,
    pub(crate) sleeps: AtomicU64,
    arms: AtomicU64,
    events: AtomicU64,
}

impl CompletionQueue {
    /// `home` is where its poller runs, `drives` where its events are taken.
    pub(crate) fn new(
        cq: rdma_core::CompletionQueue,
        mode: WaitMode,
        home: Handle,
        drives: &Handle,
        driver: Arc<Driver>,
    ) -> Self {
        let room = Arc::new(Room::default());
        let post = Post::new(home);
        let driver_may_rely = post.is_reliable_at(drives);
        CompletionQueue {
            shared: Arc::new_cyclic(|this| Shared {
                cq,
                reader: Mutex::new(Reader::new(Arc::clone(&room))),
                room: room.into(),
                mode,
                times: WaitTimes::new(),
                turn: Turn::new(),
                kept: AtomicU32::new(0),
                duty: Duty::new(),
                post,
                driver_may_rely,
                this: Weak::clone(this),
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

/// Places of a completion queue that are kept for a lane's receives.
pub(crate) struct Places {
    queue: Arc<Shared>,
    receives: u32,
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("receives", &self.receives).finish_non_exhaustive()
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.queue.kept.fetch_sub(self.receives, Relaxed);
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

    /// Keeps places for a lane's receives, which hold them for as long as it lives. The others are for sends, which give them back: all
    /// lanes get on as long as there are some.
    ///
    /// # Errors
    ///
    /// There are not as many, whatever is in flight.
    pub(crate) fn keep_places(self: &Arc<Self>, receives: u32) -> Result<Places, Error> {
        /// A send, and the signalled one that ends a run of unsignalled ones.
        const FOR_SENDS: u32 = 2;
        let depth = self.cq.depth();
        let keep =
            |kept: u32| kept.checked_add(receives).filter(|all| *all <= depth.saturating_sub(FOR_SENDS));
        match self.kept.fetch_update(Relaxed, Relaxed, keep) {
            Ok(_) => Ok(Places { queue: Arc::clone(self), receives }),
            Err(kept) => Err(Error::Invalid {
                what: format!(
                    "the completion queue has {depth} places, of which {kept} are kept for receives of others: {receives} receives and \
                     {FOR_SENDS} sends do not fit; make it deeper (Domain::completion_queue), or the receives fewer (Config::receive_depth)"
                ),
            }),
        }
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

    /// Reads until the queue is empty, or so many completions came that their futures are to run; wakes those then. Gives how many there
    /// were.
    pub(crate) fn read_all(&self) -> Result<usize, Error> {
        let mut reader = self.reader.lock();
        let mut count = 0;
        let result = loop {
            match reader.read(&self.cq) {
                Ok(read) => {
                    count += read;
                    if read < rdma_core::CompletionQueue::BATCH || count >= MOST_AT_ONCE {
                        break Ok(count);
                    }
                }
                Err(error) => break Err(error.into()),
            }
        };
        let has_put_off = reader.has_put_off();
        drop(reader);
        if has_put_off {
            reader::run(&self.reader);
        }
        result
    }

    /// Calls the poller, which the duty says is to look. The caller holds no lock.
    pub(crate) fn call_poller(&self) {
        self.post.call(&self.this);
    }

    /// Wakes everybody who waits, to look for themselves.
    #[cold]
    pub(crate) fn wake_all(&self) {
        self.reader.lock().wake_all();
        reader::run(&self.reader);
    }

    /// A future that met an error reads what is left: perhaps nobody else does.
    #[cold]
    pub(crate) fn read_out(&self) {
        /// Completions of others may come without end.
        const ROUNDS: usize = 64;
        for _ in 0..ROUNDS {
            if !matches!(self.dispatch(), Ok(1..)) {
                break;
            }
        }
    }

    /// A future that met an error is pending still: if nobody takes events, it has to look again.
    #[cold]
    pub(crate) fn look_again(&self, cx: &mut Context<'_>) {
        if self.driver.check().is_err() {
            yield_to_runtime(cx);
        }
    }

    pub(crate) fn count_spin(&self) {
        self.statistics.spins.fetch_add(1, Relaxed);
    }

    /// Nobody takes this queue's events any more: who slept looks, and does not sleep again.
    pub(crate) fn on_last_event(&self) {
        self.duty.end_service();
        self.wake_all();
    }

    /// An event of this queue was taken, and with it the queue disarmed: dispatches what is there. `rearm` must follow.
    pub(crate) fn on_event(&self) {
        self.statistics.events.fetch_add(1, Relaxed);
        self.duty.disarm();
        let may_rely = self.driver_may_rely;
        if may_rely && self.duty.is_polled() {
            return;
        }
        if let Err(error) = self.drain() {
            trace::queue_failed(&error);
            self.wake_all();
        }
        // Several wait: where one completion came there are more to come.
        if may_rely && self.duty.call() {
            self.call_poller();
        }
    }

    /// Arms the queue again if futures still wait, nobody looks for them, and none of them armed it meanwhile.
    pub(crate) fn rearm(&self) {
        // A future that is missed here, because it goes to sleep only now, finds the queue disarmed and arms it.
        if self.duty.rearm(self.driver_may_rely)
            && let Err(error) = self.arm_and_drain()
        {
            // The futures that wait here meet the same error when they poll.
            trace::queue_failed(&error);
            self.wake_all();
        }
    }

    /// Completions that came before the queue was armed raise no event: they are dispatched here. Gives how many there were.
    ///
    /// # Errors
    ///
    /// Then the queue does not count as armed.
    pub(crate) fn arm_and_drain(&self) -> Result<usize, Error> {
        self.statistics.arms.fetch_add(1, Relaxed);
        let result = self.cq.arm(Notify::Any).and_then(|()| self.drain());
        if result.is_err() {
            self.duty.disarm();
        }
        result
    }

    /// A poll that read less than it could left the queue empty. Another one, in vain, would make a device in software send its
    /// acknowledgement alone, when the future that is woken here may be about to answer.
    fn drain(&self) -> Result<usize, Error> {
        let mut count = 0;
        loop {
            let read = self.dispatch()?;
            count += read;
            if read < rdma_core::CompletionQueue::BATCH {
                return Ok(count);
            }
        }
    }
}

/// Lets other tasks and the runtime's I/O run, then polls this one again.
pub(crate) fn yield_to_runtime(cx: &mut Context<'_>) {
    // The future is dropped at once: what counts is that its first poll put the waker behind all others.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("mode", &self.shared.mode).finish_non_exhaustive()
    }
}
