//! The task that reads a completion queue on which several futures wait.
//!
//! A future that waits alone reads the queue itself, and finds its completion without a switch of tasks. When several wait, one task reads
//! for all: it wakes whom it found something for, lets them run, and reads again. It sleeps when nobody waits, when whoever waits does so
//! alone again, or, as the queue's [`WaitMode`] says, when nothing comes: then the queue is armed.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::{
    queue::{Shared, yield_to_runtime},
    trace,
    wait::WaitMode,
};

/// How long the poller looks in vain before other tasks, and the runtime's I/O, get their turn.
const TURN: Duration = Duration::from_micros(5);

/// Where a queue's poller runs, and how it is called.
pub(crate) struct Post {
    home: Handle,
    /// Only one thread drives the runtime at a time, and perhaps none.
    is_current_thread: bool,
    task: Mutex<Task>,
}

enum Task {
    Absent,
    /// It looks at the duty before it sleeps.
    Awake,
    Asleep(Waker),
}

impl Post {
    pub(crate) fn new(home: Handle) -> Post {
        let is_current_thread = home.runtime_flavor() == RuntimeFlavor::CurrentThread;
        Post { home, is_current_thread, task: Mutex::new(Task::Absent) }
    }

    /// Whether the poller can be relied on by the task that asks: it runs whenever that does.
    #[inline]
    pub(crate) fn is_reliable(&self) -> bool {
        !self.is_current_thread || Handle::try_current().is_ok_and(|here| self.is_reliable_at(&here))
    }

    /// As `is_reliable`, for a task that runs at `here`.
    pub(crate) fn is_reliable_at(&self, here: &Handle) -> bool {
        !self.is_current_thread || here.id() == self.home.id()
    }

    /// Wakes the poller, which the duty says is to look. The caller holds no lock.
    #[cold]
    pub(crate) fn call(&self, queue: &Weak<Shared>) {
        let mut task = self.task.lock();
        match std::mem::replace(&mut *task, Task::Awake) {
            Task::Absent => {
                drop(task);
                let poller = Poller { queue: Weak::clone(queue), in_vain: None, is_called: true };
                drop(self.home.spawn(poller));
            }
            Task::Asleep(waker) => {
                drop(task);
                waker.wake();
            }
            Task::Awake => {}
        }
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        // It finds the queue gone, and ends.
        if let Task::Asleep(waker) = std::mem::replace(self.task.get_mut(), Task::Awake) {
            waker.wake();
        }
    }
}

/// The task.
struct Poller {
    queue: Weak<Shared>,
    /// Since when nothing came.
    in_vain: Option<Instant>,
    /// It slept until now.
    is_called: bool,
}

impl Future for Poller {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(queue) = self.queue.upgrade() else { return Poll::Ready(()) };
        // Whoever called found something for others, who run first.
        if std::mem::take(&mut self.is_called) && queue.duty.is_polled() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut start = None;
        loop {
            if queue.duty.retire() {
                self.in_vain = None;
                if self.sleep(&queue, cx) {
                    return Poll::Pending;
                }
                continue;
            }
            let found = match queue.read_all() {
                Ok(0) => self.arm_when_due(&queue),
                found => found,
            };
            match found {
                Ok(0) => {}
                Ok(_) => {
                    if let Some(since) = self.in_vain.take() {
                        queue.times.learn(since.elapsed());
                    }
                    // Behind those that were woken.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Err(error) => {
                    // Each future meets the error itself.
                    trace::queue_failed(&error);
                    queue.duty.give_up();
                    queue.wake_all();
                    continue;
                }
            }
            let now = Instant::now();
            if now - *start.get_or_insert(now) >= TURN {
                yield_to_runtime(cx);
                return Poll::Pending;
            }
            std::hint::spin_loop();
        }
    }
}

impl Poller {
    /// Nothing came: arms the queue if that was so for long enough, and then stops. Gives how many completions came before it was armed.
    fn arm_when_due(&mut self, queue: &Shared) -> Result<usize, rdma_core::Error> {
        queue.count_spin();
        let limit = match queue.mode {
            WaitMode::Busy => return Ok(0),
            WaitMode::Adaptive => queue.times.spin(),
            WaitMode::Event => Duration::ZERO,
        };
        let since = *self.in_vain.get_or_insert_with(Instant::now);
        if since.elapsed() < limit {
            return Ok(0);
        }
        // Those who wait meet the same error themselves.
        queue.driver.check()?;
        let found = if queue.duty.arm() { queue.arm_and_drain()? } else { 0 };
        if found == 0 {
            // If it is not armed any more, the next round arms it again.
            queue.duty.rest();
        }
        Ok(found)
    }

    /// Sleeps until it is called; false when it was.
    fn sleep(&mut self, queue: &Arc<Shared>, cx: &Context<'_>) -> bool {
        let mut task = queue.post.task.lock();
        // Who calls it says so in the duty before looking here.
        if queue.duty.is_polled() {
            return false;
        }
        *task = Task::Asleep(cx.waker().clone());
        self.is_called = true;
        true
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // With the runtime; or the queue is gone, and nobody waits.
        if let Some(queue) = self.queue.upgrade() {
            queue.duty.orphan();
            queue.wake_all();
        }
    }
}
