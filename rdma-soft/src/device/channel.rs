//! Completion channels.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Device;
use super::completion_queue::CompletionQueue;
use super::events::{EventCount, EventQueue, OfObject};

/// Where completion queues announce completions. Once one of them is armed its descriptor watches the device's
/// socket too, so that a packet wakes the sleeper itself, with no thread in between. Not before: each
/// descriptor that watches the socket costs every packet a tenth of a microsecond, also when nobody sleeps.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(super) events: EventQueue<Arc<CompletionQueue>>,
    watches_socket: AtomicBool,
    /// Completion queues that use it.
    pub(crate) users: AtomicUsize,
}

impl Channel {
    pub(crate) fn new() -> io::Result<Self> {
        let watches_socket = AtomicBool::new(false);
        Ok(Channel { events: EventQueue::new()?, watches_socket, users: AtomicUsize::new(0) })
    }

    /// Somebody is about to sleep. A thread that sleeps before another one is done here is woken by it.
    pub(super) fn watch_socket(&self, device: &Device) -> io::Result<()> {
        if self.watches_socket.load(Ordering::Relaxed) || self.watches_socket.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let watched = self.events.watch(device.socket_fd());
        if watched.is_err() {
            self.watches_socket.store(false, Ordering::Relaxed);
        }
        watched
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.events.fd()
    }

    /// The completion queue of the next event. Drives the socket before it sleeps and whenever a packet
    /// wakes it; blocks unless the descriptor says otherwise.
    pub(crate) fn take(&self, device: &Device) -> io::Result<Arc<CompletionQueue>> {
        let pop = || self.events.pop();
        loop {
            // An event that this very thread finds is taken here and needs no signal.
            if let Some(cq) = pop().or_else(|| device.drive_until(pop)) {
                return Ok(cq);
            }
            // The caller sleeps now, here or where it waits for the descriptor.
            device.before_sleep();
            // A system call, so not asked before an answer is needed.
            if self.events.is_nonblocking() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // While the socket has anything the descriptor is readable, so this does not sleep then.
            self.events.sleep()?;
        }
    }

    /// See [`EventQueue::close`]: of a completion queue that is to be destroyed.
    pub(crate) fn close(&self, cq: &CompletionQueue) -> bool {
        self.events.close(&cq.completion_events)
    }

    /// It is not destroyed after all.
    pub(crate) fn reopen(&self, cq: &CompletionQueue) {
        self.events.reopen(&cq.completion_events);
    }

    /// It is gone.
    pub(crate) fn forget(&self, cq: &CompletionQueue) {
        self.events.forget(&cq.completion_events);
    }
}

impl OfObject for Arc<CompletionQueue> {
    fn count(&self) -> &EventCount {
        &self.completion_events
    }
}
