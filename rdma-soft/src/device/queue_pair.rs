//! A queue pair: its state machine, its receive side, its peer, and its place in the device's lists.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::Device;
use super::completion_queue::{CompletionQueue, Place, Polled, Pushed};
use super::events::{AsyncEvent, AsyncEvents, EventCount};
use super::memory_table::Accessor;
use super::pacing::Pause;
use super::peer::Peer;
use super::receive_queue::{CurrentReceive, ReceiveError, ReceiveRing, SharedReceiveQueue};
use super::scratch::Wakes;
use crate::proto::{
    self, AtomicOp, BindRequest, Completion, CompletionKind, CompletionOpcode, Counter, Host, ImmediateOrKey,
    LocalError, ReceiveRequest, RemoteAccess, RemoteError, Sge, Status, Time,
};
use crate::wire::{Qpn, Transport};

/// No timer is set.
pub(super) const NEVER: u64 = u64::MAX;

#[derive(Debug)]
pub(crate) struct QueuePair {
    pub(crate) qp_num: Qpn,
    pub(crate) transport: Transport,
    pub(crate) pd: u32,
    pub(crate) send_cq: Arc<CompletionQueue>,
    pub(crate) recv_cq: Arc<CompletionQueue>,
    pub(crate) srq: Option<Arc<SharedReceiveQueue>>,
    /// Where its completions go.
    pub(super) send_place: Place,
    pub(super) recv_place: Place,
    /// Address of the C structure, never followed here.
    pub(crate) identity: usize,
    pub(crate) async_events: Arc<AsyncEvents>,
    pub(crate) event_count: Arc<EventCount>,
    inner: Mutex<Inner>,
    pub(super) listed: Listed,
}

/// Where the device's lists know the queue pair from, readable without its lock.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) in_runnable: AtomicBool,
    pub(super) in_timers: AtomicBool,
    /// An acknowledgement is held for company.
    pub(super) owes_ack: AtomicBool,
    /// No timer is due before this, in nanoseconds of the device's clock, or [`NEVER`].
    pub(super) deadline: AtomicU64,
    /// Who sends, see [`Sending`].
    pub(super) sending: Sending,
}

/// One thread at a time sends what it took from the state machine, without the lock, so that packets leave
/// in the order in which they were made. Others leave sending to it, and leave word.
///
/// Entered and asked under the queue pair's lock only, left without it.
#[derive(Debug)]
pub(super) struct Sending(AtomicU8);

const IDLE: u8 = 0;
const SENDING: u8 = 1;
/// Somebody left word: there may be more to send.
const CALLED: u8 = 2;

impl Sending {
    /// True if the caller is to send; false if another thread does and will look again.
    pub(super) fn enter(&self) -> bool {
        // The lock orders this against other threads that enter; only leaving happens without it.
        if self.0.load(Ordering::Acquire) == IDLE {
            self.0.store(SENDING, Ordering::Relaxed);
            return true;
        }
        let called =
            self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |s| (s != IDLE).then_some(CALLED));
        if called.is_ok() {
            return false;
        }
        // It left meanwhile.
        self.0.store(SENDING, Ordering::Relaxed);
        true
    }

    /// Stops sending though there is more.
    pub(super) fn stop(&self) {
        self.0.store(IDLE, Ordering::Release);
    }

    /// True if nobody left word. Otherwise the caller goes on sending, and looks again.
    pub(super) fn leave(&self) -> bool {
        let left = self.0.compare_exchange(SENDING, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if !left {
            self.0.store(SENDING, Ordering::Release);
        }
        left
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) machine: proto::QueuePair,
    pub(crate) receive: ReceiveSide,
    /// The other end of a connection (RC, UC).
    pub(crate) peer: Option<Arc<Peer>>,
    /// Nothing is sent for the moment.
    pub(super) pause: Option<Pause>,
    /// Sends whose completions were queued.
    pub(super) completed_sends: u32,
}

#[derive(Debug)]
pub(crate) struct ReceiveSide {
    pub(crate) ring: ReceiveRing,
    current: CurrentReceive,
    /// Receives that left the ring.
    taken: u32,
}

impl ReceiveSide {
    /// Takes a receive. `polled` counts those that were polled, whose places are free again.
    #[inline]
    pub(crate) fn push(
        &mut self,
        polled: &Polled,
        wr_id: u64,
        sges: impl ExactSizeIterator<Item = Sge>,
    ) -> Result<(), ReceiveError> {
        self.ring.push(wr_id, sges, polled.waiting_of(self.taken) as usize)
    }

    /// Forgets all, those whose completions were purged among them.
    pub(super) fn clear(&mut self, polled: &Polled) {
        self.ring.clear();
        self.taken = self.taken.wrapping_sub(polled.waiting_of(self.taken));
    }

    /// Takes a place for a receive that is completed at once; false if there is none.
    pub(super) fn take_place(&mut self, polled: &Polled) -> bool {
        let is_free = self.ring.len() + (polled.waiting_of(self.taken) as usize) < self.ring.depth();
        self.taken = self.taken.wrapping_add(u32::from(is_free));
        is_free
    }

    fn pop(&mut self) -> bool {
        let taken = self.ring.pop(&mut self.current);
        self.taken = self.taken.wrapping_add(u32::from(taken));
        taken
    }
}

/// What a queue pair is made of.
pub(crate) struct Parts {
    pub(crate) config: proto::Config,
    pub(crate) max_recv_wr: usize,
    pub(crate) max_recv_sge: usize,
    pub(crate) pd: u32,
    pub(crate) send_cq: Arc<CompletionQueue>,
    pub(crate) recv_cq: Arc<CompletionQueue>,
    pub(crate) srq: Option<Arc<SharedReceiveQueue>>,
    pub(crate) identity: usize,
    pub(crate) async_events: Arc<AsyncEvents>,
}

impl QueuePair {
    pub(super) fn new(parts: Parts, qp_num: Qpn) -> Self {
        let config = proto::Config { qp_num, ..parts.config };
        let polled = parts.srq.as_ref().map_or_else(Arc::default, |srq| Arc::clone(&srq.polled));
        let send_place = parts.send_cq.add_work_queue(Arc::default());
        let recv_place = parts.recv_cq.add_work_queue(polled);
        let sges = parts.srq.as_ref().map_or(parts.max_recv_sge, |srq| srq.max_sge());
        QueuePair {
            qp_num,
            transport: config.transport,
            pd: parts.pd,
            send_cq: parts.send_cq,
            recv_cq: parts.recv_cq,
            srq: parts.srq,
            send_place,
            recv_place,
            identity: parts.identity,
            async_events: parts.async_events,
            event_count: Arc::default(),
            inner: Mutex::new(Inner {
                machine: proto::QueuePair::new(&config),
                receive: ReceiveSide {
                    ring: ReceiveRing::new(parts.max_recv_wr, parts.max_recv_sge),
                    current: CurrentReceive { wr_id: 0, sges: Vec::with_capacity(sges) },
                    taken: 0,
                },
                peer: None,
                pause: None,
                completed_sends: 0,
            }),
            listed: Listed {
                in_runnable: AtomicBool::new(false),
                in_timers: AtomicBool::new(false),
                owes_ack: AtomicBool::new(false),
                deadline: AtomicU64::new(NEVER),
                sending: Sending(AtomicU8::new(IDLE)),
            },
        }
    }

    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(inner) => Some(inner),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn accessor(&self) -> Accessor {
        Accessor { pd: self.pd, qp: self.qp_num }
    }
}

/// The device as one queue pair sees it during one call.
pub(super) struct QpHost<'a> {
    pub(super) device: &'a Device,
    pub(super) qp: &'a QueuePair,
    pub(super) receive: &'a mut ReceiveSide,
    pub(super) completed_sends: &'a mut u32,
    pub(super) wakes: &'a mut Wakes,
    pub(super) now: Time,
}

impl QpHost<'_> {
    /// What a completion calls for beyond its place in the queue. By itself, so that `complete` needs few registers.
    #[inline(never)]
    fn announce(&mut self, cq: &Arc<CompletionQueue>, pushed: Pushed, status: Status) {
        match pushed {
            Pushed::Quiet => {}
            Pushed::Notify => self.wakes.add(cq),
            Pushed::Wait(due) => self.device.wait_for_more(cq, due),
            Pushed::Overrun { first } => self.device.note_overrun(cq, first, status),
        }
    }
}

impl Host for QpHost<'_> {
    fn gather(&mut self, sges: &[Sge], offset: u32, out: &mut [u8]) -> Result<(), LocalError> {
        self.device.memory.gather(self.qp.pd, sges, offset, out)
    }

    fn scatter(&mut self, sges: &[Sge], offset: u32, data: &[u8]) -> Result<(), LocalError> {
        self.device.memory.scatter(self.qp.pd, sges, offset, data)
    }

    fn next_receive(&mut self) -> Option<ReceiveRequest> {
        let taken = match &self.qp.srq {
            Some(srq) => srq.pop(&mut self.receive.current),
            None => self.receive.pop(),
        };
        let current = &self.receive.current;
        taken.then(|| ReceiveRequest {
            wr_id: current.wr_id,
            length: current.sges.iter().map(|sge| u64::from(sge.length)).sum(),
        })
    }

    fn scatter_receive(&mut self, offset: u32, data: &[u8]) -> Result<(), LocalError> {
        // Receives of a shared queue belong to its protection domain.
        let pd = self.qp.srq.as_ref().map_or(self.qp.pd, |srq| srq.pd);
        self.device.memory.scatter(pd, &self.receive.current.sges, offset, data)
    }

    fn flush_receives(&mut self) {
        if self.qp.srq.is_some() {
            self.qp.async_events.raise(AsyncEvent::LastWqeReached, self.qp.identity, &self.qp.event_count);
            return;
        }
        while self.receive.pop() {
            let wr_id = self.receive.current.wr_id;
            self.complete(flushed_receive(wr_id));
        }
    }

    fn check_remote(
        &mut self,
        rkey: u32,
        va: u64,
        length: u32,
        access: RemoteAccess,
    ) -> Result<(), RemoteError> {
        self.device.memory.check_remote(self.qp.accessor(), rkey, va, length, access)
    }

    fn write_remote(&mut self, rkey: u32, va: u64, data: &[u8]) -> Result<(), RemoteError> {
        self.device.memory.write_remote(self.qp.accessor(), rkey, va, data)
    }

    fn read_remote(&mut self, rkey: u32, va: u64, out: &mut [u8]) -> Result<(), RemoteError> {
        self.device.memory.read_remote(self.qp.accessor(), rkey, va, out)
    }

    fn atomic(&mut self, rkey: u32, va: u64, op: AtomicOp) -> Result<u64, RemoteError> {
        self.device.memory.atomic(self.qp.accessor(), rkey, va, op)
    }

    fn invalidate_remote(&mut self, rkey: u32) -> Result<(), RemoteError> {
        self.device.memory.invalidate(self.qp.accessor(), rkey).map_err(|LocalError| RemoteError)
    }

    fn invalidate_local(&mut self, key: u32) -> Result<(), LocalError> {
        self.device.memory.invalidate(self.qp.accessor(), key)
    }

    fn bind_window(&mut self, request: &BindRequest) -> Result<(), LocalError> {
        self.device.memory.bind(self.qp.accessor(), request)
    }

    fn complete(&mut self, completion: Completion) {
        let qp = self.qp;
        let (cq, place) = match completion.kind {
            CompletionKind::Send => (&qp.send_cq, &qp.send_place),
            CompletionKind::Receive => (&qp.recv_cq, &qp.recv_place),
        };
        let pushed = cq.push(&completion, qp.qp_num, place, self.now);
        match (completion.kind, &qp.srq) {
            // Lost, it is never polled.
            _ if matches!(pushed, Pushed::Overrun { .. }) => {}
            (CompletionKind::Send, _) => *self.completed_sends = self.completed_sends.wrapping_add(1),
            (CompletionKind::Receive, Some(srq)) => srq.count_completed(),
            (CompletionKind::Receive, None) => {}
        }
        if pushed != Pushed::Quiet {
            self.announce(cq, pushed, completion.status);
        }
    }

    fn unpolled_sends(&self) -> u32 {
        self.qp.send_place.polled.waiting_of(*self.completed_sends)
    }

    fn event(&mut self, event: proto::Event) {
        self.qp.async_events.raise(AsyncEvent::Qp(event), self.qp.identity, &self.qp.event_count);
    }

    fn add(&mut self, counter: Counter, n: u64) {
        self.device.counters.add(counter, n);
    }
}

/// What a receive completes with that is posted to a failed queue pair, or left on one.
pub(super) fn flushed_receive(wr_id: u64) -> Completion {
    Completion {
        kind: CompletionKind::Receive,
        wr_id,
        status: Status::WrFlush,
        opcode: CompletionOpcode::Receive,
        byte_len: 0,
        immediate: ImmediateOrKey::None,
        src_qp: 0,
        grh: false,
        solicited: false,
    }
}

/// Calls a method of the state machine with the host that belongs to it.
macro_rules! with_host {
    ($device:expr, $qp:expr, $inner:expr, $wakes:expr, $now:expr, |$machine:ident, $host:ident| $body:expr) => {{
        let $crate::device::queue_pair::Inner { machine: $machine, receive, completed_sends, .. } =
            &mut *$inner;
        #[allow(unused_mut, reason = "not every body changes it")]
        let mut $host = $crate::device::queue_pair::QpHost {
            device: $device,
            qp: $qp,
            receive,
            completed_sends,
            wakes: $wakes,
            now: $now,
        };
        $body
    }};
}
pub(super) use with_host;
