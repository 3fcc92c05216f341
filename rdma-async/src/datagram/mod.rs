//! Datagrams: one queue pair that talks to any number of others.

mod address;

use std::{
    collections::VecDeque,
    future::poll_fn,
    ops::Deref,
    sync::{Arc, Mutex, PoisonError, RwLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use rdma_core::{
    Buffer, Error, Payload, PostErrorKind, QueuePair, WorkRequest,
    inflight::{Finished, Operation, WorkQueue},
    qp::{
        state::Rts,
        transport::{Ud, UdInit, UdRtr, UdRts},
    },
};

pub use address::UdAddress;
use address::{GRH, Handles};

use crate::{
    connection::check,
    domain::Domain,
    error::{Ended, OperationError},
    pool::BufferPool,
    queue::{CompletionQueue, Waiter},
    source::{Source, prepare},
    wait::WaitMode,
};

/// How a [`UdEndpoint`] is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UdConfig {
    /// How futures wait; [`WaitMode::Adaptive`] unless set.
    pub wait_mode: WaitMode,
    /// The key that datagrams must carry to be received, and that those sent carry: endpoints that talk to one another have the
    /// same. The high bit is for privileged ones (IBTA vol. 1, 10.2.5).
    pub qkey: u32,
    /// The most sends in flight; 32 unless set. More wait their turn.
    pub send_depth: u32,
    /// The receives kept posted; 128 unless set. What arrives when none is posted is lost.
    pub receive_depth: u32,
    /// Buffers of the pool on top of those that receives hold; 32 unless set.
    pub spare_buffers: usize,
    /// The device's port; 1 unless set.
    pub port: u8,
    /// The index of the local GID; the first RoCEv2 one of an IPv4 address unless set.
    pub gid_index: Option<u8>,
}

impl Default for UdConfig {
    fn default() -> Self {
        UdConfig {
            wait_mode: WaitMode::default(),
            qkey: 0x1111_1111,
            send_depth: 32,
            receive_depth: 128,
            spare_buffers: 32,
            port: 1,
            gid_index: None,
        }
    }
}

/// A queue pair for unreliable datagrams (UD), for any number of tasks at once.
///
/// A datagram is at most the [path MTU](UdEndpoint::max_message) long, and may be lost, repeated and overtaken.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use rdma_async::{Domain, UdConfig, UdEndpoint};
/// let domain = Domain::open(None)?;
/// let (a, b) = (UdEndpoint::new(&domain, &UdConfig::default())?, UdEndpoint::new(&domain, &UdConfig::default())?);
/// let mut buffer = a.pool().acquire().await;
/// buffer.set_len(2);
/// buffer.copy_from_slice(b"hi");
/// a.send_to(buffer, &b.address()).await.0?;
/// let datagram = b.recv_from().await?;
/// assert_eq!((&datagram[..], datagram.sender()), (&b"hi"[..], a.address()));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct UdEndpoint {
    /// Gone when its completion queue could not be read any more: destroying it ends what is in flight.
    qp: RwLock<Option<QueuePair<Ud, Rts>>>,
    send_queue: Arc<WorkQueue>,
    queue: CompletionQueue,
    domain: Domain,
    pool: BufferPool,
    address: UdAddress,
    port: u8,
    gid_index: u8,
    qkey: u32,
    mtu: usize,
    handles: Mutex<Handles>,
    /// Futures are served in the order of asking.
    receives: tokio::sync::Mutex<VecDeque<Option<Operation>>>,
    line: tokio::sync::Mutex<()>,
}

impl UdEndpoint {
    /// Makes a queue pair in `domain` and posts its receives.
    ///
    /// # Errors
    ///
    /// What the verbs say.
    pub fn new(domain: &Domain, config: &UdConfig) -> Result<UdEndpoint, Error> {
        let context = domain.context();
        let port = context.port(config.port)?;
        let (gid, gid_index) = match config.gid_index {
            Some(index) => (Some(context.gid(config.port, index.into())?), index),
            None if port.needs_gid() => {
                let entry = context.choose_gid(config.port)?.entry;
                let index = u8::try_from(entry.index).map_err(|_| Error::Invalid {
                    what: "the GID chosen has an index above 255, more than an address vector holds"
                        .to_owned(),
                })?;
                (Some(entry.gid), index)
            }
            None => (None, 0),
        };
        let mtu = port.active_mtu.bytes() as usize;
        // One more, for the signalled send that ends a run of unsignalled ones.
        let depth = config.send_depth + config.receive_depth + 1;
        let queue = domain.completion_queue(depth, config.wait_mode)?;
        let pool = domain.buffer_pool(config.receive_depth as usize + config.spare_buffers, GRH + mtu)?;
        let cq = &queue.shared.cq;
        let builder = domain.protection_domain().queue_pair::<Ud>(cq, cq);
        let qp = builder.max_send(config.send_depth).max_recv(config.receive_depth).build()?;
        let qp = qp.init(&UdInit { port: config.port, pkey_index: 0, qkey: config.qkey })?;
        let qp = qp.rtr(&UdRtr {})?.rts(&UdRts { sq_psn: 0 })?;
        let address = UdAddress { gid, lid: port.lid, service_level: 0, qp_num: qp.num() };
        let endpoint = UdEndpoint {
            send_queue: Arc::clone(qp.send_queue()),
            qp: RwLock::new(Some(qp)),
            queue,
            domain: domain.clone(),
            pool,
            address,
            port: config.port,
            gid_index,
            qkey: config.qkey,
            mtu,
            handles: Mutex::default(),
            receives: tokio::sync::Mutex::new(VecDeque::with_capacity(config.receive_depth as usize)),
            line: tokio::sync::Mutex::new(()),
        };
        if let Ok(mut receives) = endpoint.receives.try_lock() {
            endpoint.refill(&mut receives);
        }
        Ok(endpoint)
    }

    /// Its address, to tell others.
    #[must_use]
    pub fn address(&self) -> UdAddress {
        self.address
    }

    /// The longest datagram, in bytes: the path MTU.
    #[must_use]
    pub fn max_message(&self) -> usize {
        self.mtu
    }

    /// The pool that datagrams are received into; its spare buffers are for sending.
    #[must_use]
    pub fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// Sends a datagram; the future is ready when it left. The address handle is made with the first datagram to an address and
    /// kept for the next ones.
    ///
    /// # Errors
    ///
    /// [`OperationError`]; [`TooLong`](OperationError::TooLong) for more than [`max_message`](UdEndpoint::max_message) bytes. A
    /// completion with an error leaves the send queue unusable, not the receive queue.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have sent the datagram or not.
    pub async fn send_to<S: Source>(&self, source: S, to: &UdAddress) -> (Result<(), OperationError>, S) {
        let length = source.len();
        if length > self.mtu {
            return (Err(OperationError::TooLong { length, limit: self.mtu }), source);
        }
        let handle = {
            let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            handles.get(self.domain.protection_domain(), self.port, self.gid_index, to)
        };
        let handle = match handle {
            Ok(handle) => handle,
            Err(error) => return (Err(OperationError::Verb(Arc::new(error))), source),
        };
        let (payload, kept) = match prepare(source, &self.pool, self.domain.protection_domain()).await {
            Ok(prepared) => prepared,
            Err((error, source)) => return (Err(OperationError::Verb(Arc::new(error))), source),
        };
        let request = WorkRequest::send_to(payload, &handle, to.qp_num, self.qkey);
        match self.post(request).await {
            Ok(operation) => {
                let finished = self.finish(operation).await;
                let result = finished.result().map(drop).map_err(OperationError::from);
                (result, S::rejoin(kept, finished.into_buffers()))
            }
            Err((error, payload)) => (Err(error), S::rejoin(kept, payload.into_buffers())),
        }
    }

    /// Posts `request` when the send queue has a place for it.
    async fn post(
        &self,
        request: WorkRequest<'static, Ud>,
    ) -> Result<Operation, (OperationError, Payload<'static>)> {
        let _first = self.line.lock().await;
        let mut request = Some(request);
        let mut waiter = Waiter::new(&self.queue.shared);
        let posted = poll_fn(|cx| waiter.poll(cx, |cx| self.try_post(&mut request, cx))).await;
        match posted {
            Ok(posted) => posted.map_err(|(error, request)| (error, request.into_payload())),
            Err(error) => {
                let payload = request.map_or_else(Payload::empty, WorkRequest::into_payload);
                Err((self.fail(&error), payload))
            }
        }
    }

    fn try_post(
        &self,
        request: &mut Option<WorkRequest<'static, Ud>>,
        mut cx: Option<&mut Context<'_>>,
    ) -> Poll<Result<Operation, Refused>> {
        while let Some(work) = request.take() {
            match self.start_send(work) {
                Err((OperationError::Post(PostErrorKind::QueueFull), work)) => *request = Some(work),
                posted => return Poll::Ready(posted),
            }
            let Some(cx) = &mut cx else { break };
            if self.send_queue.poll_ready(cx).is_pending() {
                break;
            }
        }
        Poll::Pending
    }

    #[expect(clippy::result_large_err, reason = "the error gives the request back")]
    fn start_send(&self, request: WorkRequest<'static, Ud>) -> Result<Operation, Refused> {
        match &*self.qp.read().unwrap_or_else(PoisonError::into_inner) {
            None => Err((gone(), request)),
            Some(qp) => match qp.start_send(request) {
                Ok(operation) => Ok(operation.detach()),
                Err(error) => Err((error.kind.into(), error.request)),
            },
        }
    }

    fn start_recv(&self, mut buffer: Buffer) -> Result<Operation, OperationError> {
        buffer.set_len(GRH + self.mtu);
        match &*self.qp.read().unwrap_or_else(PoisonError::into_inner) {
            None => Err(gone()),
            Some(qp) => Ok(qp.start_recv(buffer).map_err(|error| error.kind)?.detach()),
        }
    }

    /// The completion queue cannot be read: nothing will complete any more unless the pair is destroyed.
    #[cold]
    fn fail(&self, error: &Error) -> OperationError {
        self.qp.write().unwrap_or_else(PoisonError::into_inner).take();
        Ended::Queue { reason: error.to_string() }.into()
    }

    /// Waits for a posted send.
    async fn finish(&self, operation: Operation) -> Finished {
        let mut operation = Some(operation);
        let mut waiter = Waiter::new(&self.queue.shared);
        match poll_fn(|cx| waiter.poll(cx, |cx| check(&mut operation, cx))).await {
            Ok(finished) => finished,
            Err(error) => {
                self.fail(&error);
                poll_fn(|cx| Operation::poll_finished(&mut operation, cx)).await
            }
        }
    }

    /// The next datagram that arrived, in the order of arrival.
    ///
    /// # Errors
    ///
    /// [`OperationError`]: the queue pair failed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped future consumed no datagram. Several tasks are served in the order of asking.
    pub async fn recv_from(&self) -> Result<Datagram, OperationError> {
        let mut receives = self.receives.lock().await;
        loop {
            if receives.is_empty() {
                // Every buffer of the pool is in a datagram that somebody keeps.
                let operation = self.start_recv(self.pool.acquire().await)?;
                receives.push_back(Some(operation));
            }
            let mut waiter = Waiter::new(&self.queue.shared);
            let first = poll_fn(|cx| {
                waiter.poll(cx, |cx| match receives.front_mut() {
                    Some(first) => check(first, cx),
                    None => Poll::Pending,
                })
            });
            let finished = first.await.map_err(|error| self.fail(&error))?;
            receives.pop_front();
            self.refill(&mut receives);
            // One whose sender cannot be told is dropped, as a device drops what it cannot read.
            if let Some(datagram) = self.datagram(finished)? {
                return Ok(datagram);
            }
        }
    }

    /// Posts receives as long as the pool has buffers and the queue room.
    fn refill(&self, receives: &mut VecDeque<Option<Operation>>) {
        while receives.len() < receives.capacity() {
            let Some(buffer) = self.pool.try_acquire() else { break };
            // What keeps a receive from being posted shows when none is left.
            let Ok(operation) = self.start_recv(buffer) else { break };
            receives.push_back(Some(operation));
        }
    }

    fn datagram(&self, finished: Finished) -> Result<Option<Datagram>, OperationError> {
        let completion = *finished.completion();
        let success = completion.result()?;
        let imm = success.imm();
        let Some(buffer) = finished.into_buffer() else { return Ok(None) };
        let Some(header) = buffer.get(..GRH) else { return Ok(None) };
        let on_roce = self.address.lid == 0 && self.address.gid.is_some();
        let sender = UdAddress::of_sender(success, header, on_roce);
        Ok(sender.map(|sender| Datagram { buffer, sender, imm }))
    }
}

/// A work request that was not posted: why, and the request.
type Refused = (OperationError, WorkRequest<'static, Ud>);

#[cold]
fn gone() -> OperationError {
    Ended::Queue { reason: "it could not be read".into() }.into()
}

/// A datagram that was received: its bytes, without the header, and who sent it.
///
/// It derefs to the bytes. Dropped, its buffer goes back to the pool.
#[derive(Debug)]
pub struct Datagram {
    /// With the header in front.
    buffer: Buffer,
    sender: UdAddress,
    imm: Option<u32>,
}

impl Datagram {
    /// Who sent it: where an answer goes.
    #[must_use]
    pub fn sender(&self) -> UdAddress {
        self.sender
    }

    /// The 32 bits of immediate data that came with it, if the sender gave some.
    #[must_use]
    pub fn imm(&self) -> Option<u32> {
        self.imm
    }

    /// The buffer, showing the bytes, to be changed and sent: they move to its front.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        let mut buffer = self.buffer;
        let length = buffer.len() - GRH;
        buffer.copy_within(GRH.., 0);
        buffer.truncate(length);
        buffer
    }

    /// The bytes; the buffer goes back to its pool when their last clone is dropped. One allocation.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.buffer).slice(GRH..)
    }
}

impl Deref for Datagram {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[GRH..]
    }
}

impl AsRef<[u8]> for Datagram {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
