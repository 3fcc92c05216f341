//! Asynchronous events: what a device tells outside of completions.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use verbs_sys::{ibv_async_event, ibv_event_type as E};

use crate::context::Context;
use crate::cq::{CompletionQueue, CqInner};
use crate::qp::QueuePairHandle;
use crate::srq::{SharedReceiveQueue, SrqInner};
use crate::{Error, fd};

/// What happened (`man ibv_get_async_event`; IBTA vol. 1, 11.6.3). The object it happened to is
/// resolved, or `None` when it is gone already.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// Of a queue pair.
    QueuePair(EventKind, Option<QueuePairHandle>),
    /// Of a completion queue: [`CqError`](EventKind::CqError).
    CompletionQueue(EventKind, Option<CompletionQueue>),
    /// Of a shared receive queue.
    SharedReceiveQueue(EventKind, Option<SharedReceiveQueue>),
    /// Of a port, by number.
    Port(EventKind, u8),
    /// Of the device.
    Device(EventKind),
}

/// The kind of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// A completion queue overran or failed.
    CqError,
    /// A queue pair failed.
    QpFatal,
    /// A queue pair got a request that it cannot carry out.
    QpRequestError,
    /// A queue pair got a request that it must not carry out.
    QpAccessError,
    /// The first packet came to a pair in RTR.
    CommunicationEstablished,
    /// The send queue is drained (SQD).
    SendQueueDrained,
    /// The last receive that a failed pair had taken from its shared queue has completed.
    LastWqeReached,
    /// A path was migrated.
    PathMigrated,
    /// A path could not be migrated.
    PathMigrationError,
    /// A shared receive queue failed.
    SrqError,
    /// Fewer receives are left than the limit armed.
    SrqLimitReached,
    /// The device failed.
    DeviceFatal,
    /// A port became active.
    PortActive,
    /// A port failed.
    PortError,
    /// A port's LID changed.
    LidChange,
    /// A port's partition keys changed.
    PkeyChange,
    /// A port's GIDs changed.
    GidChange,
    /// A port's subnet manager changed.
    SmChange,
    /// The subnet manager asks clients to register again.
    ClientReregister,
    /// A value that this library does not know.
    Unknown(u32),
}

impl EventKind {
    fn from_raw(raw: E) -> EventKind {
        match raw {
            E::IBV_EVENT_CQ_ERR => EventKind::CqError,
            E::IBV_EVENT_QP_FATAL => EventKind::QpFatal,
            E::IBV_EVENT_QP_REQ_ERR => EventKind::QpRequestError,
            E::IBV_EVENT_QP_ACCESS_ERR => EventKind::QpAccessError,
            E::IBV_EVENT_COMM_EST => EventKind::CommunicationEstablished,
            E::IBV_EVENT_SQ_DRAINED => EventKind::SendQueueDrained,
            E::IBV_EVENT_QP_LAST_WQE_REACHED => EventKind::LastWqeReached,
            E::IBV_EVENT_PATH_MIG => EventKind::PathMigrated,
            E::IBV_EVENT_PATH_MIG_ERR => EventKind::PathMigrationError,
            E::IBV_EVENT_SRQ_ERR => EventKind::SrqError,
            E::IBV_EVENT_SRQ_LIMIT_REACHED => EventKind::SrqLimitReached,
            E::IBV_EVENT_DEVICE_FATAL => EventKind::DeviceFatal,
            E::IBV_EVENT_PORT_ACTIVE => EventKind::PortActive,
            E::IBV_EVENT_PORT_ERR => EventKind::PortError,
            E::IBV_EVENT_LID_CHANGE => EventKind::LidChange,
            E::IBV_EVENT_PKEY_CHANGE => EventKind::PkeyChange,
            E::IBV_EVENT_GID_CHANGE => EventKind::GidChange,
            E::IBV_EVENT_SM_CHANGE => EventKind::SmChange,
            E::IBV_EVENT_CLIENT_REREGISTER => EventKind::ClientReregister,
            other => EventKind::Unknown(other.0),
        }
    }
}

/// An event that waits for a reader. It keeps nothing alive: the context, which keeps it, would outlive itself.
pub(crate) enum ParkedEvent {
    QueuePair(EventKind, Option<QueuePairHandle>),
    CompletionQueue(EventKind, Weak<CqInner>),
    SharedReceiveQueue(EventKind, Weak<SrqInner>),
    Port(EventKind, u8),
    Device(EventKind),
}

impl ParkedEvent {
    fn new(event: Event) -> ParkedEvent {
        match event {
            Event::QueuePair(kind, pair) => ParkedEvent::QueuePair(kind, pair),
            Event::CompletionQueue(kind, cq) => {
                ParkedEvent::CompletionQueue(kind, cq.map_or_else(Weak::new, |cq| Arc::downgrade(&cq.inner)))
            }
            Event::SharedReceiveQueue(kind, srq) => ParkedEvent::SharedReceiveQueue(
                kind,
                srq.map_or_else(Weak::new, |srq| Arc::downgrade(&srq.inner)),
            ),
            Event::Port(kind, port) => ParkedEvent::Port(kind, port),
            Event::Device(kind) => ParkedEvent::Device(kind),
        }
    }

    fn unpark(self) -> Event {
        match self {
            ParkedEvent::QueuePair(kind, pair) => Event::QueuePair(kind, pair),
            ParkedEvent::CompletionQueue(kind, cq) => {
                Event::CompletionQueue(kind, cq.upgrade().map(|inner| CompletionQueue { inner }))
            }
            ParkedEvent::SharedReceiveQueue(kind, srq) => {
                Event::SharedReceiveQueue(kind, srq.upgrade().map(|inner| SharedReceiveQueue { inner }))
            }
            ParkedEvent::Port(kind, port) => Event::Port(kind, port),
            ParkedEvent::Device(kind) => Event::Device(kind),
        }
    }
}

/// Events read at most before whoever waits for one looks whether it came.
const PUMP: usize = 64;

/// The asynchronous events of a context, as a file descriptor that is readable when there are some.
///
/// There is one stream of events per context; several of these share it.
#[derive(Debug, Clone)]
pub struct AsyncEvents {
    context: Context,
}

impl Context {
    /// The asynchronous events of this context. Makes their descriptor non-blocking.
    ///
    /// # Errors
    ///
    /// What `fcntl` says.
    pub fn events(&self) -> Result<AsyncEvents, Error> {
        let events = AsyncEvents { context: self.clone() };
        fd::set_nonblocking(events.as_raw_fd()).map_err(|e| Error::verb("fcntl(O_NONBLOCK)", e))?;
        Ok(events)
    }
}

impl AsyncEvents {
    /// Takes one event, without waiting, and acknowledges it; `None` when there are no more.
    ///
    /// Whoever [drains](crate::QueuePair::drain) a pair with a shared receive queue reads events too, and leaves them here: a
    /// reader that was woken by the descriptor and one that was not find the same.
    ///
    /// # Errors
    ///
    /// What `ibv_get_async_event` says.
    pub fn next_event(&self) -> Result<Option<Event>, Error> {
        let parked = self.context.inner.events.lock().pop_front();
        match parked {
            Some(event) => Ok(Some(event.unpark())),
            None => self.read(),
        }
    }

    /// Reads events and keeps them for `next_event`.
    pub(crate) fn pump(&self) -> Result<(), Error> {
        for _ in 0..PUMP {
            let Some(event) = self.read()? else { break };
            self.context.inner.events.lock().push_back(ParkedEvent::new(event));
        }
        Ok(())
    }

    fn read(&self) -> Result<Option<Event>, Error> {
        let inner = &self.context.inner;
        // SAFETY: an integer and a union of pointers and integers: all zeroes are a value.
        let mut raw: ibv_async_event = unsafe { std::mem::zeroed() };
        loop {
            // SAFETY: the context is live (S-1), the output valid for writes.
            if unsafe { (inner.verbs.ibv_get_async_event)(inner.ptr.as_ptr(), &raw mut raw) } == 0 {
                break;
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted => {}
                _ => return Err(Error::verb("ibv_get_async_event", error)),
            }
        }
        let event = self.resolve(&raw);
        // SAFETY: got above, acknowledged once; until then the object could not be destroyed.
        unsafe { (inner.verbs.ibv_ack_async_event)(&raw mut raw) };
        // Not before: what is resolved may be the last handle, whose destruction waits for the acknowledgement.
        if let Event::QueuePair(EventKind::LastWqeReached, Some(pair)) = &event {
            pair.note_last_receive();
        }
        Ok(Some(event))
    }

    fn resolve(&self, raw: &ibv_async_event) -> Event {
        let kind = EventKind::from_raw(raw.event_type);
        let inner = &self.context.inner;
        // SAFETY: every member is as wide as a pointer or less, and the value is only compared.
        let address = unsafe { raw.element.qp }.addr();
        match kind {
            EventKind::CqError => {
                let found = inner.queues.find_cq(address);
                Event::CompletionQueue(kind, found.map(|inner| CompletionQueue { inner }))
            }
            EventKind::QpFatal
            | EventKind::QpRequestError
            | EventKind::QpAccessError
            | EventKind::CommunicationEstablished
            | EventKind::SendQueueDrained
            | EventKind::LastWqeReached
            | EventKind::PathMigrated
            | EventKind::PathMigrationError => {
                let found =
                    inner.qps.lock().iter().find(|(key, _)| key.get() == address).map(|(_, qp)| qp.clone());
                Event::QueuePair(kind, found)
            }
            EventKind::SrqError | EventKind::SrqLimitReached => {
                let srqs = inner.srqs.lock();
                let found =
                    srqs.iter().find(|(key, _)| key.get() == address).and_then(|(_, srq)| srq.upgrade());
                drop(srqs);
                Event::SharedReceiveQueue(kind, found.map(|inner| SharedReceiveQueue { inner }))
            }
            EventKind::DeviceFatal | EventKind::Unknown(_) => Event::Device(kind),
            _ => {
                // SAFETY: port events carry a number.
                let port = unsafe { raw.element.port_num };
                Event::Port(kind, u8::try_from(port).unwrap_or(0))
            }
        }
    }

    /// Waits until there are events, at most `limit`; true when there are.
    ///
    /// # Errors
    ///
    /// What `poll(2)` says.
    pub fn wait(&self, limit: Duration) -> Result<bool, Error> {
        if !self.context.inner.events.lock().is_empty() {
            return Ok(true);
        }
        fd::wait_readable(self.as_raw_fd(), limit).map_err(|e| Error::verb("poll", e))
    }
}

impl AsRawFd for AsyncEvents {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: live (S-1).
        unsafe { self.context.inner.ptr.as_ref() }.async_fd
    }
}

impl AsFd for AsyncEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the context, which `self` keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}
