//! Traffic within this machine waits for its receiver.
//!
//! What UC and UD lose is lost for good, and a receiver's socket buffer is the one place between two processes of
//! a machine where packets get lost. Hardware has flow control on the link; here the sender asks the kernel how
//! full the receiver's buffer is, each time it has sent what surely fitted, and pauses while that is half full.
//! The queue pair keeps its place in the list of those with more to send: no thread waits.
//!
//! RC has a window, and a few connections do without this. The windows of many together overrun a buffer all the same:
//! each of a thousand has at least a packet on its way, sends it again when the others do, and some lose it each time.
//! So RC is paced like the others as soon as there are more connections than the buffer has room for windows.
//!
//! A receiver on another host is not known to the kernel here, and nothing is held back for it.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Device;
use super::counters::DeviceCounter;
use crate::net::{Occupancy, SocketDiag};
use crate::proto::{CongestionConfig, Time};

/// Sent to a peer before its buffer is looked at for the first time, and at least sent between two looks. Fits
/// the smallest default buffer of Linux.
const LEAST: i64 = 64 << 10;
/// Sent between two looks at most. One costs a few microseconds, a hundredth of the time to send so much.
const MOST: i64 = 1 << 20;
/// The kernel's overhead for a datagram.
const OVERHEAD: usize = 1 << 10;
/// Between two looks at a buffer that was too full.
const INTERVAL: Duration = Duration::from_micros(20);
/// A receiver that takes nothing for so long is stopped or gone: packets to it may be lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// Peers that are counted apart, by the last bits of their addresses; one share of the others may be looked at
/// for another's traffic, sooner than need be.
const PEERS: usize = 64;

/// What may be sent to whom.
#[derive(Debug)]
pub(super) struct Pacing {
    /// Connections whose windows fit a receive buffer.
    few: usize,
    budgets: [Budget; PEERS],
    diag: Mutex<Diag>,
}

#[derive(Debug, Default)]
enum Diag {
    #[default]
    Unopened,
    Open(SocketDiag),
    /// The kernel does not tell; nothing is held back.
    Refused,
}

#[derive(Debug)]
struct Budget {
    /// Bytes until the next look.
    left: AtomicI64,
    /// The buffer was found too full: no look before this, in nanoseconds of the device's clock.
    full_until: AtomicU64,
    /// The receiver takes nothing; nothing is held back until it does.
    given_up: AtomicBool,
}

/// Why a queue pair sends nothing at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pause {
    peer: SocketAddr,
    /// The least that was found in the buffer, and when.
    queued: u32,
    progress: Time,
}

impl Pacing {
    /// For receivers with a buffer of `receive_buffer` bytes, as the kernel counts them: most likely they have one like
    /// ours.
    pub(super) fn new(receive_buffer: usize) -> Self {
        let budget = || Budget {
            left: AtomicI64::new(LEAST),
            full_until: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
        };
        // The kernel counts a full packet about twice.
        let few = receive_buffer / (2 * CongestionConfig::default().max as usize);
        Pacing { few: few.max(1), budgets: std::array::from_fn(|_| budget()), diag: Mutex::default() }
    }

    fn budget(&self, peer: SocketAddr) -> &Budget {
        let last = match peer.ip() {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        &self.budgets[usize::from(last) % PEERS]
    }

    /// Counts datagrams that were sent; true if it is time to look.
    fn spend(&self, peer: SocketAddr, bytes: usize, datagrams: usize) -> bool {
        let charge = i64::try_from(bytes + datagrams * OVERHEAD).unwrap_or(i64::MAX);
        self.budget(peer).left.fetch_sub(charge, Ordering::Relaxed) <= charge
    }

    /// Looks at the peer's buffer; `None` where the kernel does not tell.
    fn look(&self, own: SocketAddr, peer: SocketAddr) -> Option<Occupancy> {
        let mut diag = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        if let Diag::Unopened = *diag {
            // Where our own socket is not found, the kernel lacks the module, and would look for it each time.
            *diag = match SocketDiag::open().and_then(|mut diag| Ok((diag.udp_receive_buffer(own)?, diag))) {
                Ok((Some(_), opened)) => Diag::Open(opened),
                _ => Diag::Refused,
            };
        }
        let Diag::Open(open) = &mut *diag else { return None };
        // A failure is most likely memory that is short: the next look may find out.
        open.udp_receive_buffer(peer).ok().flatten()
    }

    /// Looks, and grants what may be sent until the next look. The buffer's state if nothing may be sent.
    fn full(&self, own: SocketAddr, peer: SocketAddr, now: Time) -> Option<u32> {
        let budget = self.budget(peer);
        let Some(Occupancy { queued, capacity }) = self.look(own, peer) else {
            budget.left.store(MOST, Ordering::Relaxed);
            return None;
        };
        let full = queued > capacity / 2;
        let left = if !full {
            budget.given_up.store(false, Ordering::Relaxed);
            // A quarter of the room: others send to it as well.
            (i64::from(capacity.saturating_sub(queued)) / 4).clamp(LEAST, MOST)
        } else if budget.given_up.load(Ordering::Relaxed) {
            MOST
        } else {
            0
        };
        if left == 0 {
            budget.full_until.store((now + INTERVAL).nanoseconds(), Ordering::Relaxed);
        }
        budget.left.store(left, Ordering::Relaxed);
        (left == 0).then_some(queued)
    }
}

impl Device {
    /// Whether there are so many connections that windows alone do not keep them from overrunning a receiver.
    pub(super) fn is_crowded(&self) -> bool {
        self.remote_peers.load(Ordering::Relaxed) > self.pacing.few
    }

    /// A pause for a queue pair that has not sent yet: if nothing may be sent to its peer before the next look, or
    /// others have waited longer.
    pub(super) fn pause_before(&self, peer: SocketAddr, now: Time) -> Option<Pause> {
        let waits =
            self.pacing.budget(peer).left.load(Ordering::Relaxed) <= 0 || self.lists.runnable.len() > 0;
        waits.then_some(Pause { peer, queued: u32::MAX, progress: now })
    }

    /// Counts datagrams that were just sent to one peer; a pause if its buffer has to drain first.
    pub(super) fn pace(&self, peer: SocketAddr, bytes: usize, datagrams: usize, now: Time) -> Option<Pause> {
        if !self.pacing.spend(peer, bytes, datagrams) {
            return None;
        }
        // A system call in a sending thread, for a megabyte that would be lost without.
        let queued = self.pacing.full(self.own_address(), peer, now)?;
        self.counters.count(DeviceCounter::SendPaused);
        Some(Pause { peer, queued, progress: now })
    }

    /// Whether the pause goes on, when it is the queue pair's turn.
    pub(super) fn still_paused(&self, pause: &mut Pause, now: Time) -> bool {
        let budget = self.pacing.budget(pause.peer);
        // Another queue pair has looked: there is room, or there was none just now.
        if budget.left.load(Ordering::Relaxed) > 0 {
            return false;
        }
        if now.nanoseconds() < budget.full_until.load(Ordering::Relaxed) {
            return true;
        }
        let Some(queued) = self.pacing.full(self.own_address(), pause.peer, now) else { return false };
        if queued < pause.queued {
            (pause.queued, pause.progress) = (queued, now);
        } else if now.saturating_since(pause.progress) > PATIENCE {
            budget.given_up.store(true, Ordering::Relaxed);
            return false;
        }
        true
    }
}
