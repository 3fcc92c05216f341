//! What a connection is made of.

use std::{marker::PhantomData, time::Duration};

use rdma_core::{
    RemoteSlice,
    qp::transport::{Rc, Uc},
};

use crate::{queue::CompletionQueue, wait::WaitMode};

/// Looks that followed one another sooner would leave a peer no time to answer.
const SHORTEST_KEEP_ALIVE: Duration = Duration::from_millis(10);

/// How a [`Connection`](crate::Connection) is set up; the type says over which transport.
///
/// ```
/// use rdma_async::{Config, WaitMode};
/// use std::time::Duration;
///
/// let config = Config::rc()
///     .wait_mode(WaitMode::Busy)
///     .message_size(64 << 10)
///     .private_data(b"shard 7".to_vec())
///     .keep_alive(Some(Duration::from_secs(1)));
/// # let _ = config;
/// ```
#[derive(Debug)]
#[must_use]
pub struct Config<T> {
    pub(crate) queue: Option<CompletionQueue>,
    pub(crate) wait_mode: WaitMode,
    pub(crate) message_size: usize,
    pub(crate) send_depth: u32,
    pub(crate) receive_depth: u32,
    pub(crate) spare_buffers: usize,
    pub(crate) max_sge: u32,
    pub(crate) port: u8,
    pub(crate) gid_index: Option<u32>,
    pub(crate) private_data: Vec<u8>,
    pub(crate) regions: Vec<RemoteSlice>,
    pub(crate) handshake_timeout: Duration,
    pub(crate) keep_alive: Option<Duration>,
    transport: PhantomData<fn() -> T>,
}

impl Config<Rc> {
    /// A reliable connection: every message arrives once and in order, or the connection ends.
    pub fn rc() -> Self {
        Self::new()
    }
}

impl Config<Uc> {
    /// An unreliable connection: messages arrive in order, but may be lost, and then nobody is told.
    pub fn uc() -> Self {
        Self::new()
    }
}

impl<T> Config<T> {
    fn new() -> Self {
        Config {
            queue: None,
            wait_mode: WaitMode::default(),
            message_size: 4096,
            send_depth: 32,
            receive_depth: 32,
            spare_buffers: 32,
            max_sge: 1,
            port: 1,
            gid_index: None,
            private_data: Vec::new(),
            regions: Vec::new(),
            handshake_timeout: Duration::from_secs(5),
            keep_alive: Some(Duration::from_secs(5)),
            transport: PhantomData,
        }
    }

    /// Uses `queue`, which other connections may share, and its way to wait. Unless set, the connection gets a
    /// completion queue of its own.
    pub fn completion_queue(mut self, queue: &CompletionQueue) -> Self {
        self.wait_mode = queue.wait_mode();
        self.queue = Some(queue.clone());
        self
    }

    /// How futures wait on the connection's own completion queue; [`WaitMode::Adaptive`] unless set.
    pub fn wait_mode(mut self, mode: WaitMode) -> Self {
        self.wait_mode = mode;
        self
    }

    /// The longest message to receive, in bytes: the size of the buffers of the connection's pool; 4096 unless set.
    /// The peer learns it, and refuses to send longer ones.
    pub fn message_size(mut self, bytes: usize) -> Self {
        self.message_size = bytes;
        self
    }

    /// The most sends, writes, reads and atomics in flight; 32 unless set. More wait their turn.
    pub fn send_depth(mut self, operations: u32) -> Self {
        self.send_depth = operations.max(1);
        self
    }

    /// The receives kept posted; 32 unless set. They hold that many buffers of the pool.
    pub fn receive_depth(mut self, receives: u32) -> Self {
        self.receive_depth = receives.max(1);
        self
    }

    /// Buffers of the pool on top of those that receives hold: for messages received and not yet dropped, and for
    /// sending; 32 unless set, and at least one: atomics and copied messages pass through it.
    pub fn spare_buffers(mut self, buffers: usize) -> Self {
        self.spare_buffers = buffers.max(1);
        self
    }

    /// The most buffers that one operation gathers or scatters; 1 unless set.
    pub fn max_sge(mut self, buffers: u32) -> Self {
        self.max_sge = buffers.max(1);
        self
    }

    /// The device's port; 1 unless set.
    pub fn port(mut self, port: u8) -> Self {
        self.port = port;
        self
    }

    /// The index of the local GID; the first RoCEv2 one of an IPv4 address unless set.
    pub fn gid_index(mut self, index: u32) -> Self {
        self.gid_index = Some(index);
        self
    }

    /// Bytes for the peer, which reads them with [`Connection::peer_data`](crate::Connection::peer_data); with the
    /// regions at most about 4000.
    pub fn private_data(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.private_data = data.into();
        self
    }

    /// Memory of this side that the peer may reach, which reads the list with
    /// [`Connection::peer_regions`](crate::Connection::peer_regions).
    pub fn regions(mut self, regions: impl Into<Vec<RemoteSlice>>) -> Self {
        self.regions = regions.into();
        self
    }

    /// The time from the first byte of the exchange to the connection; 5 s unless set.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// How long the connection may be idle before it looks whether the peer still answers; 5 s unless set, at least 10 ms, `None` for
    /// never.
    ///
    /// On RC the look is an RDMA write of no bytes, which the peer's device acknowledges: a peer that is gone is noticed, whether it was
    /// killed, stopped or cut off, when the device gives up repeating it (about 4 s with the library's timeouts); a stopped process whose
    /// device lives on, as hardware does, is not, and need not be. On UC nothing is acknowledged, so the look is a byte on the exchange's
    /// stream, which the peer's process answers: one that was killed, stopped or cut off is noticed at the latest after four intervals, by a
    /// side that only receives and by one that only sends. What UC does not notice is a path that fails for RDMA alone, while the stream goes
    /// on: messages are lost then, and nobody is told.
    pub fn keep_alive(mut self, interval: Option<Duration>) -> Self {
        self.keep_alive = interval.map(|interval| interval.max(SHORTEST_KEEP_ALIVE));
        self
    }
}

// By hand: a derived one would ask for `T: Clone`.
impl<T> Clone for Config<T> {
    fn clone(&self) -> Self {
        Config {
            queue: self.queue.clone(),
            private_data: self.private_data.clone(),
            regions: self.regions.clone(),
            ..*self
        }
    }
}
