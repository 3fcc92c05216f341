//! Datagrams: one queue pair that talks to any number of others.

mod address;

use std::{
    future::poll_fn,
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use rdma_core::{
    Buffer, CompletionError, Error, LinkLayer, Opcode, Payload, Success, WorkCompletion, WorkRequest,
    qp::transport::{Ud, UdInit, UdRtr, UdRts},
};

pub use address::UdAddress;
use address::{GRH, Handles};

use crate::{
    counters::UdCounters,
    domain::Domain,
    error::{Ended, OperationError},
    lane::{Carries, Lane},
    operate::{Operate, Owner},
    pool::BufferPool,
    receive::{Receive, Receiver},
    source::Source,
    trace,
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
    /// The most sends in flight; 32 unless set, and at least one. More wait their turn.
    pub send_depth: u32,
    /// The receives kept posted; 128 unless set, and at least one. What arrives when none is posted is lost.
    pub receive_depth: u32,
    /// Buffers of the pool on top of those that receives hold; 32 unless set, and at least one: copied messages pass through it.
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
    lane: Lane<Ud>,
    domain: Domain,
    address: UdAddress,
    is_roce: bool,
    port: u8,
    gid_index: u8,
    qkey: u32,
    mtu: usize,
    tables: Mutex<Tables>,
}

/// A datagram as it arrived, and what the completion says.
#[derive(Debug)]
pub struct Arrival {
    buffer: Buffer,
    completion: WorkCompletion,
}

impl Carries for Ud {
    type Mail = Arrival;

    fn mail(mut buffer: Buffer, success: Success<'_>, completion: &WorkCompletion) -> Arrival {
        buffer.truncate(success.len());
        Arrival { buffer, completion: *completion }
    }
}

/// What is seldom needed.
#[derive(Debug, Default)]
struct Tables {
    handles: Handles,
    unreadable: u64,
    recovered: u64,
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
        let (send_depth, receive_depth) = (config.send_depth.max(1), config.receive_depth.max(1));
        // One more, for the signalled send that ends a run of unsignalled ones.
        let depth = send_depth.saturating_add(receive_depth).saturating_add(1);
        let queue = domain.completion_queue(depth, config.wait_mode)?;
        let buffers = (receive_depth as usize).saturating_add(config.spare_buffers.max(1));
        let pool = domain.buffer_pool(buffers, GRH + mtu)?;
        let cq = &queue.shared.cq;
        let builder = domain.protection_domain().queue_pair::<Ud>(cq, cq);
        let qp = builder.max_send(send_depth).max_recv(receive_depth).build()?;
        let qp = qp.init(&UdInit { port: config.port, pkey_index: 0, qkey: config.qkey })?;
        let qp = qp.rtr(&UdRtr {})?.rts(&UdRts { sq_psn: 0 })?;
        let address = UdAddress { gid, lid: port.lid, service_level: 0, qp_num: qp.num() };
        let places = queue.shared.keep_places(receive_depth)?;
        let lane = Lane::new(&queue, pool, places, send_depth, receive_depth);
        {
            let mut state = lane.lock();
            state.qp = Some(qp);
            state.refill(&lane);
        }
        domain.watch(address.qp_num, lane.watched());
        Ok(UdEndpoint {
            lane,
            domain: domain.clone(),
            address,
            is_roce: port.link_layer == LinkLayer::Ethernet,
            port: config.port,
            gid_index,
            qkey: config.qkey,
            mtu,
            tables: Mutex::default(),
        })
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
        &self.lane.pool
    }

    /// Sends a datagram; the future is ready when it left. The address handle is made with the first datagram to an address and
    /// kept for the next ones.
    ///
    /// # Errors
    ///
    /// [`OperationError`]; [`DatagramTooLong`](OperationError::DatagramTooLong) for more than [`max_message`](UdEndpoint::max_message)
    /// bytes. Datagrams that were posted behind one that the device failed are flushed and not sent; those that are sent after the error
    /// was returned go out again.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have sent the datagram or not.
    pub async fn send_to<S: Source>(&self, source: S, to: &UdAddress) -> (Result<(), OperationError>, S) {
        self.operate(source, to, None).await
    }

    /// As [`send_to`](UdEndpoint::send_to), with 32 bits of immediate data: [`Datagram::imm`].
    ///
    /// # Errors
    ///
    /// As [`send_to`](UdEndpoint::send_to).
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have sent the datagram or not.
    pub async fn send_to_with_imm<S: Source>(
        &self,
        source: S,
        to: &UdAddress,
        imm: u32,
    ) -> (Result<(), OperationError>, S) {
        self.operate(source, to, Some(imm)).await
    }

    async fn operate<S: Source>(
        &self,
        source: S,
        to: &UdAddress,
        imm: Option<u32>,
    ) -> (Result<(), OperationError>, S) {
        let length = source.len();
        if length > self.mtu {
            return (Err(OperationError::DatagramTooLong { length, limit: self.mtu }), source);
        }
        let handle = {
            let mut tables = self.tables();
            tables.handles.get(self.domain.protection_domain(), self.port, self.gid_index, to)
        };
        let handle = match handle {
            Ok(handle) => handle,
            Err(error) => return (Err(OperationError::Verb(Arc::new(error))), source),
        };
        let (qp_num, qkey) = (to.qp_num, self.qkey);
        let request = move |payload: Payload<'static>| match imm {
            None => WorkRequest::send_to(payload, &handle, qp_num, qkey),
            Some(imm) => WorkRequest::send_to_with_imm(payload, &handle, qp_num, qkey, imm),
        };
        Operate::new(self, usize::MAX, source, request).await
    }

    fn tables(&self) -> std::sync::MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next datagram that arrived, in the order of arrival. One whose header does not tell its sender is dropped, and
    /// [counted](UdCounters::unreadable).
    ///
    /// # Errors
    ///
    /// [`OperationError`]: the queue pair failed.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped future consumed no datagram. Several tasks are served in the order of asking.
    pub async fn recv_from(&self) -> Result<Datagram, OperationError> {
        loop {
            let mut receive = Receive::new(self);
            let arrival = poll_fn(|cx| receive.poll(cx)).await?;
            drop(receive);
            match self.datagram(arrival) {
                Ok(datagram) => return Ok(datagram),
                Err(_unreadable) => self.tables().unreadable += 1,
            }
        }
    }

    /// Waits for a datagram, and appends it to `datagrams` with those behind it that were found with it, in order, at most `limit` in all;
    /// gives how many: perhaps one, though more have arrived. It costs less than as many calls of [`recv_from`](UdEndpoint::recv_from). Of
    /// several tasks one gets that many before the next in line gets any.
    ///
    /// With a `limit` of 0 it gives 0 at once.
    ///
    /// # Errors
    ///
    /// As [`recv_from`](UdEndpoint::recv_from); then nothing was appended.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped future consumed no datagram, and appended none.
    pub async fn recv_many_from(
        &self,
        datagrams: &mut Vec<Datagram>,
        limit: usize,
    ) -> Result<usize, OperationError> {
        if limit == 0 {
            return Ok(0);
        }
        let before = datagrams.len();
        datagrams.push(self.recv_from().await?);
        let mut unreadable = Vec::new();
        self.lane.take_many(limit - 1, |arrival| match self.datagram(arrival) {
            Ok(datagram) => datagrams.push(datagram),
            // Dropped when no lock is held.
            Err(arrival) => unreadable.push(arrival),
        });
        self.tables().unreadable += unreadable.len() as u64;
        Ok(datagrams.len() - before)
    }

    /// One whose header does not tell its sender comes back.
    fn datagram(&self, arrival: Arrival) -> Result<Datagram, Arrival> {
        let Arrival { buffer, completion } = &arrival;
        let read = || {
            let success = completion.result().ok()?;
            Some((UdAddress::of_sender(success, buffer.get(..GRH)?, self.is_roce)?, success.imm()))
        };
        match read() {
            Some((sender, imm)) => Ok(Datagram { buffer: arrival.buffer, sender, imm }),
            None => Err(arrival),
        }
    }

    /// What happened on this endpoint so far.
    #[must_use]
    pub fn counters(&self) -> UdCounters {
        // In this order: what is unreadable was received before.
        let Tables { unreadable, recovered, .. } = *self.tables();
        let lane = self.lane.lock().counters();
        UdCounters {
            posted: lane.posted,
            completed: lane.completed,
            failed: lane.failed,
            receives_posted: lane.receives_posted,
            received: lane.received - unreadable,
            unreadable,
            recovered,
        }
    }

    /// Brings the send queue back from SQE, where a failed send leaves it (IBTA vol. 1, 10.3.1).
    fn recover(&self) {
        let mut state = self.lane.lock();
        let Some(qp) = state.qp.take() else { return };
        let error = match qp.send_failed() {
            // It had not got there, or somebody else has brought it back.
            Err(error) => {
                state.qp = Some(error.queue_pair);
                return;
            }
            Ok(qp) => match qp.resume() {
                Ok(qp) => {
                    state.qp = Some(qp);
                    drop(state);
                    self.tables().recovered += 1;
                    return;
                }
                Err(error) => error,
            },
        };
        drop(state);
        trace::recovery_failed(self.address.qp_num, &error.error);
        self.end(Ended::Queue { reason: error.error.to_string() });
    }

    /// Nothing works any more: destroying the queue pair ends what is in flight.
    fn end(&self, reason: Ended) {
        self.lane.end(reason);
        drop(self.lane.take_qp());
        let _ = self.lane.queue.shared.dispatch();
    }

    /// Its health: why it ended, or `None` while nothing is wrong. A failed send does not end it; a failed receive, a completion queue that
    /// cannot be read and an asynchronous event that is fatal to the queue pair do.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.lane.why_ended()
    }
}

impl Owner for UdEndpoint {
    type Transport = Ud;

    #[inline(always)]
    fn lane(&self) -> &Lane<Ud> {
        &self.lane
    }

    fn failed(&self, error: CompletionError) -> OperationError {
        match self.lane.why_ended() {
            Some(reason) if error.is_flush() => reason.into(),
            Some(_) => error.into(),
            // It leaves the queue pair in ERR (IBTA vol. 1, 10.3.1): nothing arrives any more.
            None if error.opcode() == Opcode::Recv => {
                self.lane.end(Ended::Failed(error.clone()));
                error.into()
            }
            None => {
                self.recover();
                error.into()
            }
        }
    }

    fn unreadable(&self, error: &Error) -> OperationError {
        let reason = Ended::Queue { reason: error.to_string() };
        self.end(reason.clone());
        reason.into()
    }
}

impl Receiver for UdEndpoint {
    async fn ended(&self) -> OperationError {
        self.lane.until_ended().await.into()
    }
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
