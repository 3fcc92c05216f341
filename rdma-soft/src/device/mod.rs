//! The device: queue pairs, memory, completion queues, and the threads that move packets between them.
//!
//! One device exists per process; all contexts share it. It is opened with the first context and closed
//! with the last. Nothing here knows C: `abi` holds the structures that programs see, and names them here by
//! their addresses, which are never followed.
//!
//! Locks, in the order in which they are taken: the receiver; then a queue pair, one at a time; then, one
//! at a time and never while waiting for anything else, a completion queue, a shared receive queue, the
//! memory table, a list, a queue of events. No system call that wakes anybody is made under them.

mod background;
mod channel;
mod completion_queue;
mod counters;
mod egress;
mod events;
mod inbox;
mod ingress;
mod lists;
mod memory;
mod memory_table;
mod moderation;
mod multicast;
mod overrun;
mod pacing;
mod peer;
mod progress;
mod queue_pair;
mod random;
mod receive_queue;
mod requests;
mod scratch;
mod settings;
mod slab;
mod withdraw;

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::thread::JoinHandle;

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};

pub(crate) use channel::Channel;
pub(crate) use completion_queue::{CompletionQueue, Entry};
pub(crate) use events::{AsyncEvent, AsyncEvents};
pub(crate) use memory::{Paging, RawMemory};
pub(crate) use memory_table::{Access, MAX_KEYS, MemoryTable, Region, RemoveError, WindowType};
pub(crate) use moderation::Moderation;
pub(crate) use multicast::{AttachError, MAX_GROUPS, MAX_MEMBERS, Multicast};
pub(crate) use peer::{address_of_gid, eui64, mac_of};
pub(crate) use queue_pair::{Parts, QueuePair};
pub(crate) use receive_queue::{ReceiveError, SharedReceiveQueue};
pub(crate) use requests::Poster;

use background::Background;
use counters::Counters;
use egress::Delayed;
use lists::Lists;
use moderation::Moderated;
use overrun::Overruns;
use pacing::Pacing;
use queue_pair::NEVER;
use settings::Settings;
use slab::Slab;

use crate::net::{
    Capture, Envelope, Faults, IcrcCache, Local, OpenError, PCAP_VARIABLE, ReceiveBuffer, Socket, choose,
    send_groups_from, to_gid,
};
use crate::proto::{Counter, PathMtu, Time};
use crate::wire::ICRC_LEN;

/// As many queue pairs may exist.
pub(crate) const MAX_QUEUE_PAIRS: usize = 1 << 20;

/// The device of this process.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) address: IpAddr,
    pub(crate) interface_index: u32,
    /// The largest path MTU that fits the interface.
    pub(crate) active_mtu: PathMtu,
    settings: Settings,
    socket: Socket,
    receiver: Mutex<Receiver>,
    queue_pairs: ShardedLock<QueuePairs>,
    pub(crate) memory: MemoryTable,
    pub(crate) multicast: Multicast,
    lists: Lists,
    /// No timer is due before this; in nanoseconds of the clock.
    next_deadline: AtomicU64,
    /// Queue pairs that packets from the socket can be for.
    remote_peers: AtomicUsize,
    /// All completion queues, for the background thread.
    completion_queues: Mutex<Vec<Weak<CompletionQueue>>>,
    /// Inboxes may hold packets that nobody polls for.
    local_pending: AtomicBool,
    moderated: Moderated,
    overruns: Overruns,
    delayed: Delayed,
    pacing: Pacing,
    background: Background,
    counters: Counters,
    capture: Option<Capture>,
    faults: Option<Mutex<FaultState>>,
    /// Zero of the clock, on the system's, and on the wall's.
    epoch: u64,
    wall_epoch: u64,
}

type QueuePairs = Slab<Arc<QueuePair>, 24>;

/// What the thread that receives needs.
#[derive(Debug, Default)]
struct Receiver {
    buffer: ReceiveBuffer,
    /// Of packets that are received.
    icrcs: IcrcCache,
    last: ingress::LastFound,
}

#[derive(Debug)]
struct FaultState {
    source: Faults,
    /// A packet that is to arrive after the next one, and where it goes.
    held: Option<(peer::Peer, Vec<u8>)>,
}

/// The right to use the device; the last one closes it.
#[derive(Debug)]
pub(crate) struct Handle {
    device: Arc<Device>,
    thread: Option<JoinHandle<()>>,
    /// Who opened it: a forked child must not touch what it shares with its parent.
    process: u32,
}

impl std::ops::Deref for Handle {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // In a forked child the thread does not exist, and its eventfd is the parent's.
        if self.process == std::process::id() {
            self.device.background.stop();
            if let Some(thread) = self.thread.take() {
                // A panic there was reported by the panic hook; the socket closes either way.
                let _ = thread.join();
            }
        }
    }
}

static OPEN: Mutex<Weak<Handle>> = Mutex::new(Weak::new());

/// Called by the C library when the process ends through `exit` or the end of `main`. A message that the program saw complete is
/// acknowledged, as an adapter would have done long ago.
extern "C" fn at_exit() {
    let handle = OPEN.try_lock().ok().and_then(|open| open.upgrade());
    if let Some(handle) = handle.filter(|handle| handle.process == std::process::id()) {
        handle.send_all_owed();
        // The last one would wait for the device's thread, which may wait for what this one holds.
        std::mem::forget(handle);
    }
}

/// The device of this process, opened if it is not.
pub(crate) fn open() -> Result<Arc<Handle>, OpenError> {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = open.upgrade()
        && handle.process == std::process::id()
    {
        return Ok(handle);
    }
    let handle = Arc::new(Handle::new(Settings::from_environment()?)?);
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| crate::sys::at_exit(at_exit));
    *open = Arc::downgrade(&handle);
    Ok(handle)
}

/// The device of this process if it is open.
pub(crate) fn current() -> Option<Arc<Handle>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
}

impl Handle {
    fn new(settings: Settings) -> Result<Handle, OpenError> {
        let local = choose(settings.address.as_deref())?;
        let capture = match &settings.capture {
            Some(path) => Some(Capture::create(path).map_err(|e| {
                OpenError::system(format!("create the capture file ({PCAP_VARIABLE}={path})"), &e)
            })?),
            None => None,
        };
        if settings.no_segmentation {
            local.socket.disable_segmentation();
        }
        let Local { address, interface_index, interface_mtu, socket } = local;
        // Where it is refused, sending to groups is left to the routes.
        let _ = send_groups_from(socket.as_fd(), address, interface_index);
        let pacing = Pacing::new(socket.receive_buffer());
        let device = Arc::new(Device {
            address,
            interface_index,
            active_mtu: mtu_that_fits(interface_mtu),
            socket,
            receiver: Mutex::default(),
            queue_pairs: ShardedLock::new(Slab::new(MAX_QUEUE_PAIRS)),
            memory: MemoryTable::new(),
            multicast: Multicast::new().map_err(|e| OpenError::system("create an epoll descriptor", &e))?,
            lists: Lists::default(),
            next_deadline: AtomicU64::new(NEVER),
            remote_peers: AtomicUsize::new(0),
            completion_queues: Mutex::default(),
            local_pending: AtomicBool::new(false),
            moderated: Moderated::default(),
            overruns: Overruns::default(),
            delayed: Delayed::default(),
            pacing,
            background: Background::new().map_err(|e| OpenError::system("create an eventfd", &e))?,
            counters: Counters::new(),
            capture,
            faults: settings
                .fault
                .map(|rates| Mutex::new(FaultState { source: Faults::new(rates), held: None })),
            epoch: monotonic(),
            wall_epoch: wall(),
            settings,
        });
        let thread = background::start(Arc::clone(&device))
            .map_err(|e| OpenError::system("start its background thread", &e))?;
        Ok(Handle { device, thread: Some(thread), process: std::process::id() })
    }
}

/// As the kernel's Soft-RoCE: the interface's MTU less the longest headers.
fn mtu_that_fits(interface_mtu: u32) -> PathMtu {
    const HEADERS: u32 = 80;
    (1..=5)
        .rev()
        .filter_map(PathMtu::from_verbs)
        .find(|mtu| mtu.bytes() + HEADERS <= interface_mtu)
        .unwrap_or(PathMtu::Mtu256)
}

impl Device {
    pub(crate) fn now(&self) -> Time {
        Time::from_nanoseconds(monotonic().saturating_sub(self.epoch))
    }

    fn socket_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue_pairs(&self) -> ShardedLockReadGuard<'_, QueuePairs> {
        self.queue_pairs.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue_pairs_mut(&self) -> ShardedLockWriteGuard<'_, QueuePairs> {
        self.queue_pairs.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GID of an index: 0 is link-local, 1 the address itself, as the kernel's Soft-RoCE has it.
    pub(crate) fn gid(&self, index: usize) -> Option<Ipv6Addr> {
        [peer::link_local(self.address), to_gid(self.address)].get(index).copied()
    }

    pub(crate) fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.snapshot()
    }

    /// How often something happened at any of its queue pairs.
    pub(crate) fn total(&self, counter: Counter) -> u64 {
        self.counters.total(counter)
    }

    /// Adds a packet to the capture file, if there is one. `sealed`: its ICRC is there.
    fn record(&self, envelope: &Envelope, packet: &[u8], sealed: bool) {
        if let Some(capture) = &self.capture
            && let Some((transport, icrc)) = packet.split_last_chunk::<ICRC_LEN>()
            && capture.record(envelope, transport, sealed.then_some(*icrc)).is_err()
        {
            // A full disk must not stop the traffic; the count says that the file is not whole.
            self.counters.count(counters::DeviceCounter::CaptureFailed);
        }
    }

    /// What the wall clock showed at `time`, in nanoseconds since 1970, if nobody has set it since the device was opened.
    pub(crate) fn wall_clock(&self, time: Time) -> u64 {
        self.wall_epoch.saturating_add(time.nanoseconds())
    }

    /// Clock for timestamps, in nanoseconds.
    pub(crate) fn clock(&self) -> u64 {
        self.now().nanoseconds()
    }
}

/// The system's monotonic clock in nanoseconds. `Instant` checks its differences, which costs more than asking.
fn monotonic() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// The wall clock in nanoseconds since 1970.
fn wall() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.ok().and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

/// Loads relaxed; for values that only inform.
pub(crate) fn load(value: &std::sync::atomic::AtomicUsize) -> usize {
    value.load(Ordering::Acquire)
}
