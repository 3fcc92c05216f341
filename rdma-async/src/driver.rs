//! The task that takes the events of a completion channel.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    task::Poll,
};

use rdma_core::{CompletionChannel, Context, Error};
use tokio::{
    io::unix::AsyncFd,
    runtime::{Handle, RuntimeFlavor},
    task::AbortHandle,
};

use crate::{
    fd,
    queue::{CompletionQueue, Shared},
    trace,
    wait::WaitMode,
};

/// A completion channel and the task that waits for it. The queues made on it hold it.
#[derive(Debug)]
pub(crate) struct Driver {
    context: Context,
    channel: CompletionChannel,
    served: Arc<Served>,
    next: AtomicU64,
    task: AbortHandle,
    home: Handle,
}

/// What the driver and its task share.
#[derive(Debug, Default)]
struct Served {
    /// The queues by the number that their events carry.
    queues: Mutex<BTreeMap<u64, Weak<Shared>>>,
    /// The task has ended: nobody takes events any more.
    is_over: AtomicBool,
}

impl Served {
    fn queues(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Shared>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held by the task: the futures that rely on it meet [`Driver::check`] when it goes.
struct Task(Arc<Served>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.is_over.store(true, SeqCst);
        // A queue that goes away here takes the lock.
        let queues: Vec<_> = self.0.queues().values().filter_map(Weak::upgrade).collect();
        queues.iter().for_each(|queue| queue.on_last_event());
    }
}

impl Driver {
    /// Makes a channel and the task that serves it, on the current runtime.
    ///
    /// # Errors
    ///
    /// What the verbs say, or the runtime to the channel's file descriptor.
    pub(crate) fn spawn(context: &Context) -> Result<Arc<Driver>, Error> {
        let channel = context.completion_channel()?;
        let fd = fd::register(channel.clone())?;
        let served = Arc::new(Served::default());
        let task = tokio::spawn(serve(fd, Task(Arc::clone(&served)))).abort_handle();
        let (context, next, home) = (context.clone(), AtomicU64::new(0), Handle::current());
        Ok(Arc::new(Driver { context, channel, served, next, task, home }))
    }

    /// A completion queue on the channel.
    pub(crate) fn completion_queue(
        self: &Arc<Self>,
        depth: u32,
        mode: WaitMode,
    ) -> Result<CompletionQueue, Error> {
        if mode != WaitMode::Busy {
            self.check()?;
        }
        let key = self.next.fetch_add(1, Relaxed);
        let cq = self.context.completion_queue(depth).channel(&self.channel).user(key).build()?;
        let home = Handle::try_current().unwrap_or_else(|_| self.home.clone());
        let queue = CompletionQueue::new(cq, mode, home, &self.home, Arc::clone(self));
        self.served.queues().insert(key, Arc::downgrade(&queue.shared));
        Ok(queue)
    }

    /// Somebody takes events, on whom a future that sleeps can rely.
    ///
    /// # Errors
    ///
    /// The runtime of the domain is gone.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.served.is_over.load(SeqCst) {
            return Err(Error::Invalid {
                what: "the runtime that the domain was opened on is gone, so nobody takes the events of its completion queues; open \
                       the domain on a runtime that lives as long, or wait with WaitMode::Busy"
                    .to_owned(),
            });
        }
        Ok(())
    }

    /// Forgets a queue that is being dropped.
    pub(crate) fn remove(&self, key: u64) {
        self.served.queues().remove(&key);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes every event, lets its queue dispatch, and arms that again once the futures woken had their turn. It ends when the driver is
/// dropped.
async fn serve(fd: AsyncFd<CompletionChannel>, task: Task) {
    let is_alone = Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread;
    loop {
        let mut ready = match fd.readable().await {
            Ok(ready) => ready,
            Err(error) => return trace::channel_failed(&error),
        };
        while let Some(queue) = take_event(fd.get_ref(), &task.0) {
            queue.on_event();
            // The futures woken run before the driver looks for more events, which costs a system call and would make a device in
            // software send its acknowledgement alone instead of with the answer. They also arm the queue when they sleep
            // again; arming it now would cost an event for a completion that they look at anyway.
            behind_others(is_alone).await;
            queue.rearm();
        }
        ready.clear_ready();
    }
}

/// Lets the tasks run that were woken before. Where one thread runs all (`is_alone`) the end of its queue is behind them; of several
/// threads' queues it is not, so there the runtime is asked, which first looks for I/O with a system call.
async fn behind_others(is_alone: bool) {
    if !is_alone {
        return tokio::task::yield_now().await;
    }
    let mut has_yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut has_yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The queue of the next event; `None` when there are no more.
fn take_event(channel: &CompletionChannel, served: &Served) -> Option<Arc<Shared>> {
    loop {
        match channel.next_event() {
            Ok(Some(cq)) => {
                // Without an entry the queue is being dropped.
                if let Some(queue) = served.queues().get(&cq.user()).and_then(Weak::upgrade) {
                    return Some(queue);
                }
            }
            Ok(None) => return None,
            Err(error) => {
                trace::channel_failed(&error);
                return None;
            }
        }
    }
}
