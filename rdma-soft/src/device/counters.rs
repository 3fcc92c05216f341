//! What happened, by name, as the kernel's `hw_counters` of a device show it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::proto::Counter;

macro_rules! device_counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What the device counts below the queue pairs.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum DeviceCounter {
            $($(#[$doc])* $name,)*
        }

        const DEVICE_NAMES: &[&str] = &[$($text),*];
    };
}

device_counters! {
    /// Calls of the program that did the device's work: polls in vain and sleeps.
    Drives = "drives",
    /// Datagrams that could not be sent at once and were sent later.
    SendDelayed = "send_delayed",
    /// Datagrams that the system refused, or that waited too long to be sent.
    SendRefused = "send_refused",
    /// Times that unreliable traffic waited for its receiver on this machine.
    SendPaused = "send_paused",
    /// Calls that received something.
    ReceiveCalls = "rcv_calls",
    /// Datagrams received from the socket.
    DatagramsReceived = "rcvd_datagrams",
    /// Packets between queue pairs of this process.
    LocalPackets = "local_pkts",
    /// Packets for a queue pair of this process that took no more.
    DropInboxFull = "drop_inbox_full",
    /// Packets too short for their headers.
    DropShort = "drop_too_short",
    /// Packets of an unknown transport version.
    DropVersion = "drop_version",
    /// Packets with an unknown operation code.
    DropOpcode = "drop_unknown_opcode",
    /// Packets with padding that does not fit.
    DropPad = "drop_pad",
    /// Packets with payload where none may be.
    DropPayload = "drop_unexpected_payload",
    /// Packets whose ICRC fits an IPv4 identification that a device of this kind would not have sent. The
    /// check is then one of 16 bits.
    OtherIdentification = "rx_other_identification",
    /// Packets with a wrong ICRC.
    IcrcError = "rx_icrc_errors",
    /// Packets for a queue pair that does not exist.
    DropNoQueuePair = "drop_no_qp",
    /// Packets from another address than that of the connected peer.
    DropSource = "drop_wrong_source",
    /// Packets to a multicast group that nobody here is attached to.
    DropMulticast = "drop_no_multicast_group",
    /// Congestion notification packets, which are ignored.
    Cnp = "rcvd_cnp",
    /// Completions that found their queue full.
    CqOverrun = "cq_overrun",
    /// Packets that fault injection dropped, doubled, delayed or corrupted.
    Injected = "injected_faults",
    /// Packets that could not be written to the capture file.
    CaptureFailed = "capture_errors",
}

const PROTO: usize = Counter::ALL.len();
const ALL: usize = PROTO + DEVICE_NAMES.len();

/// As many threads but one count in a shard of their own; the others share the last.
const SHARDS: usize = 32;
const SHARED: usize = SHARDS - 1;

/// Counters of one device since it was opened. Each thread counts in a shard of its own, as far as they
/// reach: a line that two processors write costs more than the packet it counts, and so does an atomic
/// addition, which a shard of one thread does without.
#[derive(Debug)]
pub(crate) struct Counters([CachePadded<[AtomicU64; ALL]>; SHARDS]);

/// Shards that no thread has, as bits.
static FREE: AtomicU32 = AtomicU32::new(!(1 << SHARED));

thread_local! {
    /// The thread's shard, or one past the last before its first count. By itself, because a value without a
    /// destructor costs one load to find.
    static SHARD: Cell<usize> = const { Cell::new(SHARDS) };
    /// Gives the shard back when the thread ends.
    static LEASE: Lease = const { Lease };
}

struct Lease;

impl Drop for Lease {
    fn drop(&mut self) {
        // What other values count that are dropped after this one goes where all may.
        let shard = SHARD.replace(SHARED);
        if shard != SHARED {
            FREE.fetch_or(1 << shard, Ordering::Release);
        }
    }
}

/// Finds a shard for a thread that has none yet.
fn take_shard() {
    let mut shard = SHARED;
    // Acquire, and release above: the last count of the thread before is seen.
    let _ = FREE.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
        shard = if free == 0 { SHARED } else { free.trailing_zeros() as usize };
        (free != 0).then(|| free & (free - 1))
    });
    SHARD.set(shard);
    // From now on the thread has something to give back.
    LEASE.with(|_| ());
}

impl Counters {
    pub(crate) fn new() -> Self {
        Counters(std::array::from_fn(|_| CachePadded::new([const { AtomicU64::new(0) }; ALL])))
    }

    fn add_at(&self, place: usize, n: u64) {
        let shard = SHARD.get();
        let Some(counters) = self.0.get(shard) else { return self.add_first(place, n) };
        let counter = &counters[place];
        if shard == SHARED {
            counter.fetch_add(n, Ordering::Relaxed);
        } else {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        }
    }

    #[cold]
    fn add_first(&self, place: usize, n: u64) {
        take_shard();
        self.add_at(place, n);
    }

    pub(crate) fn add(&self, counter: Counter, n: u64) {
        self.add_at(counter.index(), n);
    }

    pub(crate) fn count(&self, counter: DeviceCounter) {
        self.count_many(counter, 1);
    }

    pub(crate) fn count_many(&self, counter: DeviceCounter, n: usize) {
        self.add_at(PROTO + counter as usize, n as u64);
    }

    fn sum(&self, place: usize) -> u64 {
        self.0.iter().map(|shard| shard[place].load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }

    pub(crate) fn total(&self, counter: Counter) -> u64 {
        self.sum(counter.index())
    }

    /// How often threads of the program drove the device.
    pub(crate) fn drives(&self) -> u64 {
        self.sum(PROTO + DeviceCounter::Drives as usize)
    }

    pub(crate) fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let names = Counter::ALL.iter().map(|c| c.name()).chain(DEVICE_NAMES.iter().copied());
        names.enumerate().map(|(place, name)| (name, self.sum(place))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More threads than shards, and threads that come after others have ended.
    #[test]
    fn no_count_is_lost() {
        let counters = Counters::new();
        for _ in 0..3 {
            std::thread::scope(|scope| {
                for _ in 0..2 * SHARDS {
                    scope.spawn(|| (0..1000).for_each(|_| counters.count(DeviceCounter::Drives)));
                }
            });
        }
        assert_eq!(counters.drives(), 3 * 2 * SHARDS as u64 * 1000);
    }
}
