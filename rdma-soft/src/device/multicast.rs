//! Multicast groups and the queue pairs attached to them, within this process.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use super::peer::address_of_gid;
use super::queue_pair::QueuePair;

/// Who is attached to what. A list: groups are few, and datagrams to them rare.
#[derive(Debug, Default)]
pub(crate) struct Multicast(RwLock<Vec<([u8; 16], Arc<QueuePair>)>>);

impl Multicast {
    /// False if it is attached already.
    pub(crate) fn attach(&self, group: [u8; 16], qp: &Arc<QueuePair>) -> bool {
        let mut members = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let known = members.iter().any(|(g, member)| *g == group && Arc::ptr_eq(member, qp));
        if !known {
            members.push((group, Arc::clone(qp)));
        }
        !known
    }

    /// False if it is not attached.
    pub(crate) fn detach(&self, group: [u8; 16], qp: &Arc<QueuePair>) -> bool {
        let mut members = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = members.len();
        members.retain(|(g, member)| *g != group || !Arc::ptr_eq(member, qp));
        members.len() < before
    }

    /// Whether the queue pair is attached to any group.
    pub(crate) fn has(&self, qp: &Arc<QueuePair>) -> bool {
        let members = self.0.read().unwrap_or_else(PoisonError::into_inner);
        members.iter().any(|(_, member)| Arc::ptr_eq(member, qp))
    }

    /// The members of a group, or of the one that an IP address stands for.
    pub(super) fn members(&self, group: Option<[u8; 16]>, address: IpAddr) -> Vec<Arc<QueuePair>> {
        let members = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_member = |g: &[u8; 16]| group.map_or(address_of_gid(*g) == address, |group| group == *g);
        members.iter().filter(|(g, _)| is_member(g)).map(|(_, qp)| Arc::clone(qp)).collect()
    }
}
