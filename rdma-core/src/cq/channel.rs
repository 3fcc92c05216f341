//! Completion channels: a file descriptor that tells of completions.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use verbs_sys::{ibv_comp_channel, ibv_cq};

use super::{CompletionQueue, CqInner};
use crate::context::ContextInner;
use crate::{Error, fd, leak};

/// Events of a queue acknowledged at once: acknowledging takes a lock of the provider's.
const ACK_BATCH: u32 = 64;

/// A live completion channel.
pub(crate) struct ChannelInner {
    pub(crate) ptr: NonNull<ibv_comp_channel>,
    context: Arc<ContextInner>,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Queues {
    next: usize,
    /// By the cookie that events carry.
    by_key: BTreeMap<usize, Entry>,
}

struct Entry {
    ptr: NonNull<ibv_cq>,
    queue: Weak<CqInner>,
    unacknowledged: u32,
}

// SAFETY: verbs are thread-safe (S-6), the pointers live as long as their owners (S-1).
unsafe impl Send for ChannelInner {}
// SAFETY: as above.
unsafe impl Sync for ChannelInner {}

impl ChannelInner {
    fn fd(&self) -> RawFd {
        // SAFETY: live (S-1).
        unsafe { self.ptr.as_ref() }.fd
    }

    pub(crate) fn reserve_key(&self) -> usize {
        let mut queues = self.queues.lock();
        queues.next += 1;
        queues.next
    }

    pub(crate) fn add_queue(&self, key: usize, queue: &Arc<CqInner>) {
        let entry = Entry { ptr: queue.ptr, queue: Arc::downgrade(queue), unacknowledged: 0 };
        self.queues.lock().by_key.insert(key, entry);
    }

    /// Acknowledges what was read for a queue that is about to be destroyed: the verb waits until
    /// all events were.
    pub(crate) fn forget_queue(&self, key: usize) {
        if let Some(entry) = self.queues.lock().by_key.remove(&key)
            && entry.unacknowledged > 0
        {
            self.acknowledge(entry.ptr, entry.unacknowledged);
        }
    }

    fn acknowledge(&self, queue: NonNull<ibv_cq>, count: u32) {
        // SAFETY: an event of the queue that was read and not acknowledged keeps its destruction
        // waiting, so the queue is live (`man ibv_ack_cq_events`).
        unsafe { (self.context.verbs.ibv_ack_cq_events)(queue.as_ptr(), count) };
    }
}

impl Drop for ChannelInner {
    fn drop(&mut self) {
        // SAFETY: created by `create`, destroyed once; its queues hold an Arc (S-1).
        let code = unsafe { (self.context.verbs.ibv_destroy_comp_channel)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_destroy_comp_channel", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.context));
        }
    }
}

impl std::fmt::Debug for ChannelInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompletionChannel").field("fd", &self.fd()).finish_non_exhaustive()
    }
}

/// A completion channel (`man ibv_create_comp_channel`): any number of completion queues report on it.
///
/// Its file descriptor is readable when there are events; it is non-blocking and fit for epoll.
/// The order that loses no wake-up: arm, poll the queue until it is empty, sleep; when woken, take
/// every event, arm again, poll again.
#[derive(Debug, Clone)]
pub struct CompletionChannel {
    pub(crate) inner: Arc<ChannelInner>,
}

impl CompletionChannel {
    pub(crate) fn new(context: &Arc<ContextInner>) -> Result<CompletionChannel, Error> {
        // SAFETY: the context is live (S-1).
        let ptr = unsafe { (context.verbs.ibv_create_comp_channel)(context.ptr.as_ptr()) };
        let ptr = NonNull::new(ptr).ok_or_else(|| Error::last("ibv_create_comp_channel"))?;
        let inner = ChannelInner { ptr, context: Arc::clone(context), queues: Mutex::default() };
        fd::set_nonblocking(inner.fd()).map_err(|e| Error::verb("fcntl(O_NONBLOCK)", e))?;
        Ok(CompletionChannel { inner: Arc::new(inner) })
    }

    /// Takes one event, without waiting: the queue that has completions, or `None` when there are no
    /// more events. Events are acknowledged in batches, and at the latest when their queue goes.
    ///
    /// # Errors
    ///
    /// What `ibv_get_cq_event` says.
    pub fn next_event(&self) -> Result<Option<CompletionQueue>, Error> {
        loop {
            let mut queue = std::ptr::null_mut();
            let mut cookie = std::ptr::null_mut();
            let get = self.inner.context.verbs.ibv_get_cq_event;
            // SAFETY: the channel is live (S-1), the outputs are valid for writes.
            let code = unsafe { get(self.inner.ptr.as_ptr(), &raw mut queue, &raw mut cookie) };
            if code != 0 {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(Error::verb("ibv_get_cq_event", error)),
                }
            }
            let Some(queue) = NonNull::new(queue) else {
                return Err(Error::verb("ibv_get_cq_event", io::ErrorKind::InvalidData.into()));
            };
            let mut queues = self.inner.queues.lock();
            let Some(entry) = queues.by_key.get_mut(&cookie.addr()) else {
                drop(queues);
                // Its handle is being dropped, and waits for this acknowledgement.
                self.inner.acknowledge(queue, 1);
                continue;
            };
            entry.unacknowledged += 1;
            let due = entry.unacknowledged >= ACK_BATCH;
            let count = if due { std::mem::take(&mut entry.unacknowledged) } else { 0 };
            let owner = entry.queue.upgrade();
            let ptr = entry.ptr;
            if count > 0 {
                // Under the lock: `forget_queue` must not overtake it.
                self.inner.acknowledge(ptr, count);
            }
            drop(queues);
            if let Some(inner) = owner {
                return Ok(Some(CompletionQueue { inner }));
            }
        }
    }

    /// Waits until there are events, at most `limit`; true when there are.
    ///
    /// # Errors
    ///
    /// What `poll(2)` says.
    pub fn wait(&self, limit: Duration) -> Result<bool, Error> {
        fd::wait_readable(self.inner.fd(), limit).map_err(|e| Error::verb("poll", e))
    }
}

impl AsFd for CompletionChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the channel, which `self` keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.inner.fd()) }
    }
}

impl AsRawFd for CompletionChannel {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.fd()
    }
}
