//! Unreliable traffic within this machine waits for its receiver.
//!
//! What UC and UD lose is lost for good, and a receiver's socket buffer is the one place between two processes of
//! a machine where packets get lost. Hardware has flow control on the link; here the sender asks the kernel how
//! full the receiver's buffer is, each time it has sent what surely fitted, and pauses while that is half full.
//! The queue pair keeps its place in the list of those with more to send: no thread waits.
//!
//! A receiver on another host is not known to the kernel here, and nothing is held back for it. RC has a window.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Device;
use super::counters::DeviceCounter;
use crate::net::{Occupancy, SocketDiag};
use crate::proto::Time;

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
    looked: Time,
}

impl Default for Pacing {
    fn default() -> Self {
        let budget = || Budget { left: AtomicI64::new(LEAST), given_up: AtomicBool::new(false) };
        Pacing { budgets: std::array::from_fn(|_| budget()), diag: Mutex::default() }
    }
}

impl Pacing {
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
    fn full(&self, own: SocketAddr, peer: SocketAddr) -> Option<u32> {
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
        budget.left.store(left, Ordering::Relaxed);
        (left == 0).then_some(queued)
    }
}

impl Device {
    /// Counts unreliable datagrams that were just sent to one peer; a pause if its buffer has to drain first.
    pub(super) fn pace(&self, peer: SocketAddr, bytes: usize, datagrams: usize, now: Time) -> Option<Pause> {
        if !self.pacing.spend(peer, bytes, datagrams) {
            return None;
        }
        // A system call in a sending thread, for a megabyte that would be lost without.
        let queued = self.pacing.full(self.own_address(), peer)?;
        self.counters.count(DeviceCounter::SendPaused);
        Some(Pause { peer, queued, progress: now, looked: now })
    }

    /// Whether the pause goes on.
    pub(super) fn still_paused(&self, pause: &mut Pause, now: Time) -> bool {
        if now.saturating_since(pause.looked) < INTERVAL {
            return true;
        }
        pause.looked = now;
        let Some(queued) = self.pacing.full(self.own_address(), pause.peer) else { return false };
        if queued < pause.queued {
            (pause.queued, pause.progress) = (queued, now);
        } else if now.saturating_since(pause.progress) > PATIENCE {
            self.pacing.budget(pause.peer).given_up.store(true, Ordering::Relaxed);
            return false;
        }
        true
    }
}
