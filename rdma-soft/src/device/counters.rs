//! What happened, by name, as the kernel's `hw_counters` of a device show it.

use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Datagrams that could not be sent at once and were sent later.
    SendDelayed = "send_delayed",
    /// Datagrams that the system refused, or that waited too long to be sent.
    SendRefused = "send_refused",
    /// Calls that received something.
    ReceiveCalls = "rcv_calls",
    /// Datagrams received from the socket.
    DatagramsReceived = "rcvd_datagrams",
    /// Packets between queue pairs of this process.
    LocalPackets = "local_pkts",
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

/// Counters of one device since it was opened.
#[derive(Debug)]
pub(crate) struct Counters([AtomicU64; ALL]);

impl Counters {
    pub(crate) fn new() -> Self {
        Counters([const { AtomicU64::new(0) }; ALL])
    }

    pub(crate) fn add(&self, counter: Counter, n: u64) {
        self.0[counter.index()].fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, counter: DeviceCounter) {
        self.0[PROTO + counter as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let names = Counter::ALL.iter().map(|c| c.name()).chain(DEVICE_NAMES.iter().copied());
        names.zip(self.0.iter().map(|v| v.load(Ordering::Relaxed))).collect()
    }
}
