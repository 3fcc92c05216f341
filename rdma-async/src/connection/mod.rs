//! Connections: a pair of queue pairs, made and ended together.

mod batch;
mod config;
mod establish;
mod link;
mod listener;
mod receive;
mod transport;
mod watch;

use std::{future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use rdma_core::{
    RemoteSlice, Status, WorkRequest,
    qp::transport::{Atomics, Rc, RdmaRead, Uc},
};
use tokio::{sync::Mutex, task::JoinHandle};

pub use batch::Batch;
pub use config::Config;
pub use establish::{connect, connect_over};
use link::Link;
pub use listener::Listener;
pub use receive::Recv;
pub use transport::Connected;
use watch::{FAREWELL, PATIENCE};

use crate::{
    counters::ConnectionCounters,
    domain::Domain,
    error::{Ended, OperationError},
    message::Message,
    operate::{Operate, Request, acquire},
    pool::BufferPool,
    queue::CompletionQueue,
    source::{Source, Target},
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
/// in the order in which their futures are first polled. A future that was polled keeps its turn until it is dropped, as with tokio's locks:
/// one that is forgotten, or kept and not polled, holds up those behind it.
///
/// An operation that needs a buffer of the pool, an atomic or one of [`Bytes`](bytes::Bytes) that [have to be copied](Source), has no turn
/// while the pool has none: others pass it, for theirs may be the buffers that it waits for.
///
/// The connection ends with the first operation that the device fails, when the peer closes, fails or dies, by a
/// [deadline](Connection::with_deadline), by [`close`](Connection::close), when it is dropped, and with the runtime that it was made on,
/// where its task watches for the peer's end. Everything in flight resolves then with the reason, [`OperationError::Ended`], and gives its
/// memory back.
///
/// Memory that the device may still touch is never given back: where completions do not come, and the driver fails to destroy the queue
/// pair, what was in flight is leaked ([`rdma_core::leaks`]), and the futures that hold it stay pending. Drop them.
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
    path_mtu: u32,
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
    #[inline]
    pub fn send<S: Source>(
        &self,
        source: S,
    ) -> impl Future<Output = (Result<(), OperationError>, S)> + Send + use<'_, T, S> {
        Operate::new(&*self.link, self.peer.message_size, source, WorkRequest::send)
    }

    /// As [`send`](Connection::send), with 32 bits of immediate data: [`Message::imm`](crate::Message::imm).
    ///
    /// # Errors
    ///
    /// As [`send`](Connection::send).
    #[inline]
    pub fn send_with_imm<S: Source>(
        &self,
        source: S,
        imm: u32,
    ) -> impl Future<Output = (Result<(), OperationError>, S)> + Send + use<'_, T, S> {
        let request = move |payload| WorkRequest::send_with_imm(payload, imm);
        Operate::new(&*self.link, self.peer.message_size, source, request)
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
    #[inline]
    pub fn write<S: Source>(
        &self,
        source: S,
        remote: RemoteSlice,
    ) -> impl Future<Output = (Result<(), OperationError>, S)> + Send + use<'_, T, S> {
        Operate::new(&*self.link, usize::MAX, source, move |payload| WorkRequest::write(payload, remote))
    }

    /// As [`write`](Connection::write), and then the peer's next [`recv`](Connection::recv) gets an empty message with
    /// [`Message::imm`](crate::Message::imm) and [`Message::written`](crate::Message::written).
    ///
    /// # Errors
    ///
    /// As [`write`](Connection::write).
    #[inline]
    pub fn write_with_imm<S: Source>(
        &self,
        source: S,
        remote: RemoteSlice,
        imm: u32,
    ) -> impl Future<Output = (Result<(), OperationError>, S)> + Send + use<'_, T, S> {
        let request = move |payload| WorkRequest::write_with_imm(payload, remote, imm);
        Operate::new(&*self.link, usize::MAX, source, request)
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
    #[inline]
    pub fn read<B: Target>(
        &self,
        target: B,
        remote: RemoteSlice,
    ) -> impl Future<Output = (Result<(), OperationError>, B)> + Send + use<'_, T, B>
    where
        T: RdmaRead,
    {
        Operate::new(&*self.link, usize::MAX, target, move |payload| WorkRequest::read(payload, remote))
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
        self.atomic(move |payload| WorkRequest::compare_and_swap(payload, remote, expected, new)).await
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
        self.atomic(move |payload| WorkRequest::fetch_and_add(payload, remote, add)).await
    }

    /// An empty batch: operations that are posted together.
    pub fn batch(&self) -> Batch<'_, T> {
        Batch::new(self)
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
    #[inline]
    pub fn recv(&self) -> Recv<'_, T> {
        Recv::new(&self.link)
    }

    /// Waits for a message, and appends it to `messages` with those behind it that were found with it, in order, at most `limit` in all; gives
    /// how many: perhaps one, though more have arrived. It costs less than as many calls of [`recv`](Connection::recv): one wait, and one
    /// lock. Of several tasks one gets that many before the next in line gets any.
    ///
    /// With a `limit` of 0 it gives 0 at once.
    ///
    /// # Errors
    ///
    /// As [`recv`](Connection::recv); then nothing was appended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped future consumed no message, and appended none.
    pub async fn recv_many(
        &self,
        messages: &mut Vec<Message>,
        limit: usize,
    ) -> Result<usize, OperationError> {
        if limit == 0 {
            return Ok(0);
        }
        let before = messages.len();
        messages.push(self.recv().await?);
        self.link.lane.take_many(limit - 1, |message| messages.push(message));
        Ok(messages.len() - before)
    }

    /// Awaits `operation`, an operation of this connection, at most `limit`: past it the connection ends
    /// ([`Ended::Deadline`]), so that the operation resolves and gives its memory back, also when nobody drives the runtime that the
    /// connection was made on. That takes milliseconds, and at most two seconds with a device that does not flush what is in flight. If its
    /// driver cannot destroy the queue pair either, the operation [stays pending](Connection#operations).
    ///
    /// To give up waiting without ending the connection, drop the future ([`tokio::time::timeout`]).
    pub async fn with_deadline<F: Future>(&self, limit: Duration, operation: F) -> F::Output {
        let mut operation = pin!(operation);
        match tokio::time::timeout(limit, &mut operation).await {
            Ok(output) => output,
            Err(_) => {
                self.link.lane.end(Ended::Deadline { limit });
                // The watcher does the same, if its runtime runs.
                tokio::select! {
                    biased;
                    output = &mut operation => return output,
                    () = self.link.settle(PATIENCE) => {}
                }
                operation.await
            }
        }
    }

    /// Waits for what was posted or waits its turn, tells the peer, and destroys the queue pair. A peer that lives and posts no receives makes sends wait for
    /// as long as that lasts, and so this call: bound it by [`with_deadline`](Connection::with_deadline). Operations that start after this
    /// one get [`Ended::Closed`]. Messages that arrived and were not received are lost. Several tasks may call it: each call takes its turn,
    /// and is done when the queue pair is gone.
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
        // Until the end: another call finds the connection closed, and its queue pair destroyed.
        let mut watcher = self.watcher.lock().await;
        let idle = self.link.lane.lock().sends_in_flight() == 0;
        let result = match self.link.lane.why_ended() {
            Some(Ended::Closed | Ended::ClosedByPeer) => Ok(()),
            Some(reason) => Err(reason.into()),
            // A send queue completes in order: when this is done, so is what was posted before.
            None => match self.link.probe().await {
                // Both sides closed at the same time.
                Err(OperationError::Ended(Ended::ClosedByPeer)) if idle => Ok(()),
                result => result,
            },
        };
        self.link.lane.end(Ended::Closed);
        if let Some(task) = &mut *watcher {
            // It ends by itself, unless nobody drives its runtime; one that shuts down may cancel it.
            if tokio::time::timeout(FAREWELL, task).await.is_err() {
                self.link.settle(PATIENCE).await;
            }
            *watcher = None;
        }
        result
    }

    /// Ends the connection now: what is in flight resolves with [`Ended::Closed`].
    pub fn abort(&self) {
        self.link.lane.end(Ended::Closed);
    }

    /// Its health: why it ended, or `None` while nothing is wrong. An error completion, the peer's end and an asynchronous event that is
    /// fatal to the queue pair all end it.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.link.lane.why_ended()
    }

    /// Waits until the connection ended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn until_ended(&self) -> Ended {
        self.link.lane.until_ended().await
    }

    /// The pool that messages are received into; its spare buffers are for sending.
    #[must_use]
    pub fn pool(&self) -> &BufferPool {
        &self.link.lane.pool
    }

    /// The completion queue it uses.
    #[must_use]
    pub fn completion_queue(&self) -> &CompletionQueue {
        &self.link.lane.queue
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

    /// The path MTU that both sides agreed on, in bytes: the most payload of a packet.
    #[must_use]
    pub fn path_mtu(&self) -> u32 {
        self.peer.path_mtu
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

    /// The statuses of completions that failed, in the order of their first appearance, and how often each came. Operations that nobody
    /// waited for and receives that were flushed do not count.
    #[must_use]
    pub fn errors_by_status(&self) -> Vec<(Status, u64)> {
        self.link.errors_by_status()
    }

    async fn atomic(&self, request: impl Request<T>) -> Result<u64, OperationError> {
        let mut word = acquire(&self.link.lane).await?;
        word.set_len(size_of::<u64>());
        let (result, word) = Operate::new(&*self.link, usize::MAX, word, request).await;
        result?;
        let mut bytes = [0; size_of::<u64>()];
        bytes.copy_from_slice(&word);
        Ok(u64::from_ne_bytes(bytes))
    }
}

impl<T: Connected> Drop for Connection<T> {
    fn drop(&mut self) {
        self.link.lane.end(Ended::Closed);
    }
}
