//! The transports, as types, with what each needs at each step and what it can do.

use verbs_sys::{ibv_qp_attr, ibv_qp_attr_mask as M, ibv_qp_type};

use crate::ah::AddressVector;
use crate::mr::RemoteAccess;
use crate::port::Mtu;

/// A transport service (IBTA vol. 1, 9.2). Sealed.
pub trait Transport: sealed::Transport + Send + Sync + Sized + 'static {
    /// What the step from RESET to INIT needs.
    type Init: Attributes;
    /// What the step from INIT to RTR needs.
    type Rtr: Attributes;
    /// What the step from RTR to RTS needs.
    type Rts: Attributes;
    /// The transport's name.
    const NAME: &'static str;
    #[doc(hidden)]
    const RAW: ibv_qp_type;
}

/// Attributes of one step. Sealed.
pub trait Attributes: Clone + std::fmt::Debug + Send + Sync + 'static + sealed::Fill {}

/// Transports between two queue pairs: RC and UC.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a connected transport",
    label = "needs RC or UC",
    note = "on UD, use `WorkRequest::send_to` with an address handle"
)]
pub trait Connected: Transport {}

/// Transports with RDMA WRITE: RC and UC.
#[diagnostic::on_unimplemented(message = "`{Self}` has no RDMA write", label = "RDMA write needs RC or UC")]
pub trait RdmaWrite: Transport {}

/// Transports with RDMA READ: RC.
#[diagnostic::on_unimplemented(message = "`{Self}` has no RDMA read", label = "RDMA read needs RC")]
pub trait RdmaRead: Transport {}

/// Transports with atomic operations: RC.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no atomic operations",
    label = "atomic operations need RC"
)]
pub trait Atomics: Transport {}

/// Transports whose sends carry their destination: UD.
#[diagnostic::on_unimplemented(
    message = "`{Self}` sends to its one peer only",
    label = "`send_to` needs UD",
    note = "on RC and UC, use `WorkRequest::send`"
)]
pub trait Datagram: Transport {}

/// Transports whose send queue can fail alone (SQE): UC and UD.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no state SQE: its whole queue pair fails",
    label = "SQE needs UC or UD"
)]
pub trait SendQueueError: Transport {}

/// Reliable connection.
#[derive(Debug, Clone, Copy)]
pub struct Rc(());
/// Unreliable connection.
#[derive(Debug, Clone, Copy)]
pub struct Uc(());
/// Unreliable datagram.
#[derive(Debug, Clone, Copy)]
pub struct Ud(());

macro_rules! transport {
    ($name:ident $init:ident $rtr:ident $rts:ident $raw:ident) => {
        impl sealed::Transport for $name {}
        impl Transport for $name {
            type Init = $init;
            type Rtr = $rtr;
            type Rts = $rts;
            const NAME: &'static str = stringify!($name);
            const RAW: ibv_qp_type = ibv_qp_type::$raw;
        }
    };
}

transport!(Rc ConnectedInit RcRtr RcRts IBV_QPT_RC);
transport!(Uc ConnectedInit UcRtr UcRts IBV_QPT_UC);
transport!(Ud UdInit UdRtr UdRts IBV_QPT_UD);

impl Connected for Rc {}
impl Connected for Uc {}
impl RdmaWrite for Rc {}
impl RdmaWrite for Uc {}
impl RdmaRead for Rc {}
impl Atomics for Rc {}
impl Datagram for Ud {}
impl SendQueueError for Uc {}
impl SendQueueError for Ud {}

/// RC and UC, RESET to INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectedInit {
    /// Port, counted from 1.
    pub port: u8,
    /// Index of the partition key.
    pub pkey_index: u16,
    /// What the peer may do through this pair, on top of what the memory allows.
    pub access: RemoteAccess,
}

/// UD, RESET to INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdInit {
    /// Port, counted from 1.
    pub port: u8,
    /// Index of the partition key.
    pub pkey_index: u16,
    /// The Q_Key that incoming datagrams must carry.
    pub qkey: u32,
}

/// RC, INIT to RTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RcRtr {
    /// The path to the peer.
    pub path: AddressVector,
    /// Path MTU, the same on both sides.
    pub path_mtu: Mtu,
    /// The peer's queue pair number.
    pub dest_qp_num: u32,
    /// The first PSN the peer sends, 24 bits.
    pub rq_psn: u32,
    /// RDMA reads and atomics that the peer may have in flight towards this pair.
    pub max_dest_rd_atomic: u8,
    /// How long the peer waits after it found no receive posted: a code of IBTA vol. 1, table 45
    /// (12 is 0.64 ms; 0 is 655 ms, not none).
    pub min_rnr_timer: u8,
}

/// RC, RTR to RTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RcRts {
    /// The first PSN this pair sends, 24 bits.
    pub sq_psn: u32,
    /// How long to wait for an acknowledgement: 4.096 us x 2^timeout (14: 67 ms); 0 waits for ever.
    pub timeout: u8,
    /// Retries without an answer, 0 to 7.
    pub retry_count: u8,
    /// Retries when the peer has no receive posted, 0 to 6; 7 retries for ever.
    pub rnr_retry: u8,
    /// RDMA reads and atomics in flight from this pair; at most the peer's `max_dest_rd_atomic`.
    pub max_rd_atomic: u8,
}

/// UC, INIT to RTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UcRtr {
    /// The path to the peer.
    pub path: AddressVector,
    /// Path MTU, the same on both sides.
    pub path_mtu: Mtu,
    /// The peer's queue pair number.
    pub dest_qp_num: u32,
    /// The first PSN the peer sends, 24 bits.
    pub rq_psn: u32,
}

/// UC, RTR to RTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UcRts {
    /// The first PSN this pair sends, 24 bits.
    pub sq_psn: u32,
}

/// UD, INIT to RTR: nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UdRtr {}

/// UD, RTR to RTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UdRts {
    /// The first PSN this pair sends, 24 bits.
    pub sq_psn: u32,
}

impl Attributes for ConnectedInit {}
impl Attributes for UdInit {}
impl Attributes for RcRtr {}
impl Attributes for RcRts {}
impl Attributes for UcRtr {}
impl Attributes for UcRts {}
impl Attributes for UdRtr {}
impl Attributes for UdRts {}

impl sealed::Fill for ConnectedInit {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.port_num = self.port;
        attr.pkey_index = self.pkey_index;
        attr.qp_access_flags = self.access.bits();
        M(M::IBV_QP_PORT.0 | M::IBV_QP_PKEY_INDEX.0 | M::IBV_QP_ACCESS_FLAGS.0)
    }
}

impl sealed::Fill for UdInit {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.port_num = self.port;
        attr.pkey_index = self.pkey_index;
        attr.qkey = self.qkey;
        M(M::IBV_QP_PORT.0 | M::IBV_QP_PKEY_INDEX.0 | M::IBV_QP_QKEY.0)
    }
}

impl sealed::Fill for RcRtr {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        let connected = UcRtr {
            path: self.path,
            path_mtu: self.path_mtu,
            dest_qp_num: self.dest_qp_num,
            rq_psn: self.rq_psn,
        };
        let mask = connected.fill(attr);
        attr.max_dest_rd_atomic = self.max_dest_rd_atomic;
        attr.min_rnr_timer = self.min_rnr_timer;
        M(mask.0 | M::IBV_QP_MAX_DEST_RD_ATOMIC.0 | M::IBV_QP_MIN_RNR_TIMER.0)
    }
}

impl sealed::Fill for UcRtr {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.ah_attr = self.path.raw();
        attr.path_mtu = self.path_mtu.raw();
        attr.dest_qp_num = self.dest_qp_num;
        attr.rq_psn = self.rq_psn;
        M(M::IBV_QP_AV.0 | M::IBV_QP_PATH_MTU.0 | M::IBV_QP_DEST_QPN.0 | M::IBV_QP_RQ_PSN.0)
    }
}

impl sealed::Fill for UdRtr {
    fn fill(&self, _: &mut ibv_qp_attr) -> M {
        M(0)
    }
}

impl sealed::Fill for RcRts {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.sq_psn = self.sq_psn;
        attr.timeout = self.timeout;
        attr.retry_cnt = self.retry_count;
        attr.rnr_retry = self.rnr_retry;
        attr.max_rd_atomic = self.max_rd_atomic;
        M(M::IBV_QP_SQ_PSN.0
            | M::IBV_QP_TIMEOUT.0
            | M::IBV_QP_RETRY_CNT.0
            | M::IBV_QP_RNR_RETRY.0
            | M::IBV_QP_MAX_QP_RD_ATOMIC.0)
    }
}

impl sealed::Fill for UcRts {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.sq_psn = self.sq_psn;
        M::IBV_QP_SQ_PSN
    }
}

impl sealed::Fill for UdRts {
    fn fill(&self, attr: &mut ibv_qp_attr) -> M {
        attr.sq_psn = self.sq_psn;
        M::IBV_QP_SQ_PSN
    }
}

pub(crate) mod sealed {
    use verbs_sys::{ibv_qp_attr, ibv_qp_attr_mask};

    pub trait Transport {}

    pub trait Fill {
        /// Writes the attributes and gives their mask.
        fn fill(&self, attr: &mut ibv_qp_attr) -> ibv_qp_attr_mask;
    }
}
