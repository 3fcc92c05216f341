//! Connections: a pair of queue pairs, made and ended together.

mod config;
mod establish;
mod link;
mod listener;
mod receive;
mod transport;
mod watch;

use std::{future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use rdma_core::{
    Payload, RemoteSlice, WorkRequest,
    qp::transport::{Atomics, Rc, RdmaRead, Uc},
};
use tokio::{sync::Mutex, task::JoinHandle};

pub use config::Config;
pub use establish::{connect, connect_over};
use link::Link;
pub(crate) use link::check;
pub use listener::Listener;
pub use transport::Connected;

use crate::{
    counters::ConnectionCounters,
    domain::Domain,
    error::{Ended, OperationError},
    message::Message,
    pool::BufferPool,
    queue::CompletionQueue,
    source::{Source, Target, prepare},
};

/// A reliable connection.
pub type RcConnection = Connection<Rc>;
/// An unreliable connection.
pub type UcConnection = Connection<Uc>;

/// A queue pair connected to a peer's, for any number of tasks at once.
///
/// Made by [`connect`], by [`Listener::accept`], or with [`connect_over`] over a stream of the caller's, which stays open
/// as long as the connection: its end is how a peer's death is noticed by a side that only receives.
///
/// # Operations
///
/// An operation takes its memory and gives it back with the result. Nothing happens before its future is first polled.
/// Dropping a future gives up interest, not memory: what it posted is carried out, then the memory goes where it belongs
/// (a pool's buffer to its pool). When the send queue is full, futures wait their turn. Operations of one task are carried out
/// in the order in which their futures are first polled.
///
/// The connection ends with the first operation that the device fails, when the peer closes or dies, by a
/// [deadline](Connection::with_deadline), by [`close`](Connection::close) and when it is dropped. Everything in flight
/// resolves then with the reason, [`OperationError::Ended`], and gives its memory back.
#[derive(Debug)]
pub struct Connection<T: Connected> {
    link: Arc<Link<T>>,
    domain: Domain,
    peer: Peer,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

/// What the peer said of itself.
#[derive(Debug)]
struct Peer {
    address: Option<SocketAddr>,
    message_size: usize,
    regions: Vec<RemoteSlice>,
    data: Vec<u8>,
}

impl<T: Connected> Connection<T> {
    /// Sends a message: the peer's next [`recv`](Connection::recv) gets it. On RC the future is ready when the peer's device
    /// has it, on UC when it left.
    ///
    /// # Errors
    ///
    /// [`OperationError`]; [`TooLong`](OperationError::TooLong) leaves the connection as it was.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have sent the message or not.
    pub async fn send<S: Source>(&self, source: S) -> (Result<(), OperationError>, S) {
        self.message(source, WorkRequest::send).await
    }

    /// As [`send`](Connection::send), with 32 bits of immediate data: [`Message::imm`].
    ///
    /// # Errors
    ///
    /// As [`send`](Connection::send).
    pub async fn send_with_imm<S: Source>(&self, source: S, imm: u32) -> (Result<(), OperationError>, S) {
        self.message(source, |payload| WorkRequest::send_with_imm(payload, imm)).await
    }

    /// Writes to the start of a peer's memory, which is not told. On RC the future is ready when the bytes are there.
    ///
    /// # Errors
    ///
    /// [`OperationError`]; more bytes than `remote` has are refused ([`Post`](OperationError::Post)) and leave the connection as it
    /// was.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have written all, a part, or nothing.
    pub async fn write<S: Source>(&self, source: S, remote: RemoteSlice) -> (Result<(), OperationError>, S) {
        self.operate(source, |payload| WorkRequest::write(payload, remote)).await
    }

    /// As [`write`](Connection::write), and then the peer's next [`recv`](Connection::recv) gets an empty message with
    /// [`Message::imm`] and [`Message::written`].
    ///
    /// # Errors
    ///
    /// As [`write`](Connection::write).
    pub async fn write_with_imm<S: Source>(
        &self,
        source: S,
        remote: RemoteSlice,
        imm: u32,
    ) -> (Result<(), OperationError>, S) {
        self.operate(source, |payload| WorkRequest::write_with_imm(payload, remote, imm)).await
    }

    /// Reads from the start of a peer's memory until `target` is full.
    ///
    /// # Errors
    ///
    /// [`OperationError`]; after an error the bytes of `target` are undefined. More bytes than `remote` has are refused
    /// ([`Post`](OperationError::Post)) and leave the connection as it was.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: nothing changes at the peer.
    pub async fn read<B: Target>(&self, target: B, remote: RemoteSlice) -> (Result<(), OperationError>, B)
    where
        T: RdmaRead,
    {
        self.operate(target, |payload| WorkRequest::read(payload, remote)).await
    }

    /// Stores `new` in the 8 bytes at the start of `remote` if they hold `expected`; gives what they held, in this machine's
    /// byte order. Atomic among operations of the peer's device
    /// ([`AtomicCapability`](rdma_core::AtomicCapability)).
    ///
    /// # Errors
    ///
    /// [`OperationError`]; an address that is no multiple of 8 is refused ([`Post`](OperationError::Post)).
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have been carried out or not.
    pub async fn compare_and_swap(
        &self,
        remote: RemoteSlice,
        expected: u64,
        new: u64,
    ) -> Result<u64, OperationError>
    where
        T: Atomics,
    {
        self.atomic(|payload| WorkRequest::compare_and_swap(payload, remote, expected, new)).await
    }

    /// Adds `add` to the 8 bytes at the start of `remote`; gives what they held, in this machine's byte order. See
    /// [`compare_and_swap`](Connection::compare_and_swap).
    ///
    /// # Errors
    ///
    /// As [`compare_and_swap`](Connection::compare_and_swap).
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have been carried out or not.
    pub async fn fetch_and_add(&self, remote: RemoteSlice, add: u64) -> Result<u64, OperationError>
    where
        T: Atomics,
    {
        self.atomic(|payload| WorkRequest::fetch_and_add(payload, remote, add)).await
    }

    /// The next message that arrived, in order. Receives are kept posted from the connection's [pool](Connection::pool): a
    /// message keeps its buffer until it is dropped, and when all are kept the peer's sends wait.
    ///
    /// # Errors
    ///
    /// [`OperationError`], once all messages that arrived before the end were handed out.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped future consumed no message. Several tasks are served in the order of asking.
    pub async fn recv(&self) -> Result<Message, OperationError> {
        receive::next(&self.link).await
    }

    /// Awaits `operation`, an operation of this connection, at most `limit`: past it the connection ends
    /// ([`Ended::Deadline`]), so that the operation resolves and gives its memory back.
    ///
    /// To give up waiting without ending the connection, drop the future ([`tokio::time::timeout`]).
    pub async fn with_deadline<F: Future>(&self, limit: Duration, operation: F) -> F::Output {
        let mut operation = pin!(operation);
        match tokio::time::timeout(limit, &mut operation).await {
            Ok(output) => output,
            Err(_) => {
                self.link.end(Ended::Deadline { limit });
                operation.await
            }
        }
    }

    /// Waits for what was posted, tells the peer, and destroys the queue pair. Operations that start after this
    /// one get [`Ended::Closed`]. Messages that arrived and were not received are lost.
    ///
    /// # Errors
    ///
    /// The reason for which the connection had ended otherwise, before or during the call; if it was closed by the peer, only when
    /// something of this side was in flight.
    ///
    /// # Cancel safety
    ///
    /// A dropped call leaves the connection open or closed, depending on how far it came.
    pub async fn close(&self) -> Result<(), OperationError> {
        let idle = self.link.sends_in_flight() == 0;
        let result = match self.link.why_ended() {
            Some(Ended::Closed | Ended::ClosedByPeer) => Ok(()),
            Some(reason) => Err(reason.clone().into()),
            // A send queue completes in order: when this is done, so is what was posted before.
            None => match self.link.probe().await {
                // Both sides closed at the same time.
                Err(OperationError::Ended(Ended::ClosedByPeer)) if idle => Ok(()),
                result => result,
            },
        };
        self.link.end(Ended::Closed);
        if let Some(watcher) = self.watcher.lock().await.take() {
            // It ends by itself in bounded time; a runtime that shuts down may cancel it.
            let _ = watcher.await;
        }
        result
    }

    /// Ends the connection now: what is in flight resolves with [`Ended::Closed`].
    pub fn abort(&self) {
        self.link.end(Ended::Closed);
    }

    /// Why the connection ended; `None` while it is healthy.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.link.why_ended().cloned()
    }

    /// Waits until the connection ended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn until_ended(&self) -> Ended {
        self.link.ended().await
    }

    /// The pool that messages are received into; its spare buffers are for sending.
    #[must_use]
    pub fn pool(&self) -> &BufferPool {
        &self.link.pool
    }

    /// The completion queue it uses.
    #[must_use]
    pub fn completion_queue(&self) -> &CompletionQueue {
        &self.link.queue
    }

    /// The domain it was made in.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The number of its queue pair.
    #[must_use]
    pub fn qp_num(&self) -> u32 {
        self.link.qp_num
    }

    /// The other end of the exchange's stream, where that has an address.
    #[must_use]
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.peer.address
    }

    /// The peer's private data: [`Config::private_data`].
    #[must_use]
    pub fn peer_data(&self) -> &[u8] {
        &self.peer.data
    }

    /// The memory that the peer opened: [`Config::regions`].
    #[must_use]
    pub fn peer_regions(&self) -> &[RemoteSlice] {
        &self.peer.regions
    }

    /// The longest message that the peer receives, in bytes.
    #[must_use]
    pub fn peer_message_size(&self) -> usize {
        self.peer.message_size
    }

    /// What happened on this connection so far.
    #[must_use]
    pub fn counters(&self) -> ConnectionCounters {
        self.link.counters()
    }

    async fn message<S: Source>(
        &self,
        source: S,
        request: impl FnOnce(Payload<'static>) -> WorkRequest<'static, T>,
    ) -> (Result<(), OperationError>, S) {
        let length = source.len();
        if length > self.peer.message_size {
            return (Err(OperationError::TooLong { length, limit: self.peer.message_size }), source);
        }
        self.operate(source, request).await
    }

    async fn operate<S: Source>(
        &self,
        source: S,
        request: impl FnOnce(Payload<'static>) -> WorkRequest<'static, T>,
    ) -> (Result<(), OperationError>, S) {
        let (payload, kept) = match prepare(source, &self.link.pool, self.domain.protection_domain()).await {
            Ok(prepared) => prepared,
            Err((error, source)) => return (Err(OperationError::Verb(Arc::new(error))), source),
        };
        match self.link.post(request(payload)).await {
            Ok(operation) => {
                let finished = self.link.finish(operation).await;
                let result = finished.result().map(drop).map_err(|error| self.link.fail(error));
                (result, S::rejoin(kept, finished.into_buffers()))
            }
            Err((error, request)) => (Err(error), S::rejoin(kept, request.into_payload().into_buffers())),
        }
    }

    async fn atomic(
        &self,
        request: impl FnOnce(Payload<'static>) -> WorkRequest<'static, T>,
    ) -> Result<u64, OperationError> {
        let mut word = self.link.pool.acquire().await;
        word.set_len(size_of::<u64>());
        let (result, word) = self.operate(word, request).await;
        result?;
        let mut bytes = [0; size_of::<u64>()];
        bytes.copy_from_slice(&word);
        Ok(u64::from_ne_bytes(bytes))
    }
}

impl<T: Connected> Drop for Connection<T> {
    fn drop(&mut self) {
        self.link.end(Ended::Closed);
    }
}
