//! Attributes that take a queue pair from state to state.

use std::time::Duration;

use bitflags::bitflags;

use crate::wire::{DEFAULT_PKEY, Psn, Qpn, RnrTimer};

/// State of a queue pair (clause 10.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Created or reset.
    Reset,
    /// Receives may be posted; nothing is processed.
    Init,
    /// Ready to receive.
    Rtr,
    /// Ready to send.
    Rts,
    /// The send queue drains or has drained; receiving goes on.
    Sqd,
    /// The send queue failed; receiving goes on (UC and UD).
    Sqe,
    /// Failed; everything posted is flushed.
    Err,
}

/// Path maximum transfer unit: how much of a message a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathMtu {
    /// 256 bytes.
    Mtu256,
    /// 512 bytes.
    Mtu512,
    /// 1024 bytes.
    Mtu1024,
    /// 2048 bytes.
    Mtu2048,
    /// 4096 bytes.
    Mtu4096,
}

impl PathMtu {
    /// From the verbs enumeration, 1 (256) to 5 (4096).
    #[must_use]
    pub const fn from_verbs(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Mtu256),
            2 => Some(Self::Mtu512),
            3 => Some(Self::Mtu1024),
            4 => Some(Self::Mtu2048),
            5 => Some(Self::Mtu4096),
            _ => None,
        }
    }

    /// The MTU in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        256 << self as u32
    }
}

bitflags! {
    /// What a peer may do through a queue pair (`qp_access_flags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct QpAccess: u8 {
        /// RDMA WRITE.
        const REMOTE_WRITE = 1;
        /// RDMA READ.
        const REMOTE_READ = 2;
        /// Atomic operations.
        const REMOTE_ATOMIC = 4;
    }
}

/// All attributes of a queue pair that concern the transport, already validated.
///
/// The caller keeps the merged set and passes it whole to [`QueuePair::modify`](super::QueuePair::modify);
/// which fields a transition reads is said at each. Fields of another transport are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Partition key of the chosen index. Read by every transition.
    pub pkey: u16,
    /// Queue key (UD). Read by every transition.
    pub qkey: u32,
    /// What the peer may do. Read by every transition.
    pub access: QpAccess,
    /// Path MTU (for UD: of the port). Read from RTR on, and by no transition between RTS and SQD.
    pub path_mtu: PathMtu,
    /// Queue pair of the peer (RC, UC). Read by INIT to RTR.
    pub dest_qp: Qpn,
    /// First PSN to receive (RC, UC). Read by INIT to RTR.
    pub receive_psn: Psn,
    /// READ and atomic requests that the peer may have outstanding, at most 255 (RC). Read from RTR on.
    pub max_dest_rd_atomic: u8,
    /// What a peer that found no receive is told to wait (RC). Read by every transition.
    pub min_rnr_timer: RnrTimer,
    /// First PSN to send. Read by RTR to RTS.
    pub send_psn: Psn,
    /// READ and atomic requests that may be outstanding, at most 255 (RC). Read from RTS on.
    pub max_rd_atomic: u8,
    /// Local ack timeout, the exponent: 4.096 us times 2 to this, 0 for none, at most 31 (RC). Read from RTS on.
    pub timeout: u8,
    /// How often a lost packet is sent again without progress before the queue pair fails, 0 to 7 (RC).
    pub retry_count: u8,
    /// The same for a receiver that is not ready; 7 is for ever (RC).
    pub rnr_retry: u8,
    /// Whether arriving in SQD with a drained queue raises [`Event::SendQueueDrained`](super::Event).
    pub sqd_event: bool,
}

impl Default for Attributes {
    fn default() -> Self {
        Self {
            pkey: DEFAULT_PKEY,
            qkey: 0,
            access: QpAccess::empty(),
            path_mtu: PathMtu::Mtu1024,
            dest_qp: 0,
            receive_psn: Psn::new(0),
            max_dest_rd_atomic: 0,
            min_rnr_timer: RnrTimer::new(0),
            send_psn: Psn::new(0),
            max_rd_atomic: 0,
            timeout: 0,
            retry_count: 0,
            rnr_retry: 0,
            sqd_event: false,
        }
    }
}

impl Attributes {
    /// The local ack timeout, or `None` if lost packets are never noticed by time (clause 9.7.6.1.3).
    #[must_use]
    pub fn ack_timeout(&self) -> Option<Duration> {
        self.ack_timeout_nanoseconds().map(Duration::from_nanos)
    }

    /// The same as a number: arithmetic of `Duration` costs as much as half of a packet's header.
    pub(super) fn ack_timeout_nanoseconds(&self) -> Option<u64> {
        (self.timeout != 0).then(|| 4096 << (self.timeout & 31))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ack_timeout_is_4_microseconds_times_a_power_of_two() {
        let timeout = |exponent| Attributes { timeout: exponent, ..Attributes::default() }.ack_timeout();
        assert_eq!(timeout(0), None);
        assert_eq!(timeout(1), Some(Duration::from_nanos(8192)));
        assert_eq!(timeout(14), Some(Duration::from_nanos(67_108_864)));
        assert_eq!(timeout(31), Some(Duration::from_nanos(4096 << 31)));
    }

    #[test]
    fn path_mtu_follows_the_verbs_enumeration() {
        let bytes: Vec<_> = (0..=6).map(|value| PathMtu::from_verbs(value).map(PathMtu::bytes)).collect();
        assert_eq!(bytes, [None, Some(256), Some(512), Some(1024), Some(2048), Some(4096), None]);
    }
}
