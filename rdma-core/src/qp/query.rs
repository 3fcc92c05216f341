//! What the hardware says of a pair's attributes.

use verbs_sys::ibv_qp_attr_mask as M;

use super::QueuePair;
use super::state::State;
use super::transport::{Datagram, Transport};
use crate::Error;
use crate::ah::AddressVector;
use crate::mr::RemoteAccess;
use crate::port::{Gid, Mtu};

/// A queue pair's attributes (`man ibv_query_qp`). Those that its transport or state does not have
/// are whatever the provider says, mostly 0.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct QueuePairAttributes {
    /// Port, counted from 1.
    pub port: u8,
    /// Index of the partition key.
    pub pkey_index: u16,
    /// What the peer may do.
    pub access: RemoteAccess,
    /// Q_Key (UD).
    pub qkey: u32,
    /// Path to the peer (RC, UC).
    pub path: AddressVector,
    /// Path MTU.
    pub path_mtu: Mtu,
    /// The peer's queue pair number.
    pub dest_qp_num: u32,
    /// Next PSN expected.
    pub rq_psn: u32,
    /// Next PSN sent.
    pub sq_psn: u32,
    /// RDMA reads and atomics in flight from the pair.
    pub max_rd_atomic: u8,
    /// RDMA reads and atomics in flight towards the pair.
    pub max_dest_rd_atomic: u8,
    /// RNR timer code.
    pub min_rnr_timer: u8,
    /// Acknowledgement timeout code.
    pub timeout: u8,
    /// Retries without an answer.
    pub retry_count: u8,
    /// Retries without a receive.
    pub rnr_retry: u8,
    /// Whether the send queue is draining (SQD).
    pub is_draining: bool,
}

impl<T: Transport, S: State> QueuePair<T, S> {
    /// Asks the hardware for the pair's attributes.
    ///
    /// # Errors
    ///
    /// What `ibv_query_qp` says.
    pub fn attributes(&self) -> Result<QueuePairAttributes, Error> {
        let everything = M(M::IBV_QP_STATE.0
            | M::IBV_QP_PORT.0
            | M::IBV_QP_PKEY_INDEX.0
            | M::IBV_QP_ACCESS_FLAGS.0
            | M::IBV_QP_QKEY.0
            | M::IBV_QP_AV.0
            | M::IBV_QP_PATH_MTU.0
            | M::IBV_QP_DEST_QPN.0
            | M::IBV_QP_RQ_PSN.0
            | M::IBV_QP_SQ_PSN.0
            | M::IBV_QP_MAX_QP_RD_ATOMIC.0
            | M::IBV_QP_MAX_DEST_RD_ATOMIC.0
            | M::IBV_QP_MIN_RNR_TIMER.0
            | M::IBV_QP_TIMEOUT.0
            | M::IBV_QP_RETRY_CNT.0
            | M::IBV_QP_RNR_RETRY.0);
        let raw = self.inner.query(everything)?;
        Ok(QueuePairAttributes {
            port: raw.port_num,
            pkey_index: raw.pkey_index,
            access: RemoteAccess::from_bits_truncate(raw.qp_access_flags),
            qkey: raw.qkey,
            path: AddressVector::from_raw(&raw.ah_attr),
            path_mtu: Mtu::from_raw(raw.path_mtu),
            dest_qp_num: raw.dest_qp_num,
            rq_psn: raw.rq_psn,
            sq_psn: raw.sq_psn,
            max_rd_atomic: raw.max_rd_atomic,
            max_dest_rd_atomic: raw.max_dest_rd_atomic,
            min_rnr_timer: raw.min_rnr_timer,
            timeout: raw.timeout,
            retry_count: raw.retry_cnt,
            rnr_retry: raw.rnr_retry,
            is_draining: raw.sq_draining != 0,
        })
    }
}

impl<T: Transport, S: State> QueuePair<T, S> {
    /// Joins a multicast group (`man ibv_attach_mcast`): datagrams to `gid` (and on InfiniBand `lid`) come to
    /// this pair too. It leaves its groups when it is dropped.
    ///
    /// # Errors
    ///
    /// What `ibv_attach_mcast` says.
    pub fn attach_multicast(&self, gid: Gid, lid: u16) -> Result<(), Error>
    where
        T: Datagram,
    {
        self.inner.attach(gid, lid)
    }

    /// Leaves a multicast group (`man ibv_detach_mcast`).
    ///
    /// # Errors
    ///
    /// What `ibv_detach_mcast` says.
    pub fn detach_multicast(&self, gid: Gid, lid: u16) -> Result<(), Error>
    where
        T: Datagram,
    {
        self.inner.detach(gid, lid)
    }
}
