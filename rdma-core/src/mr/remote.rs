//! A peer's memory, as plain data.

use serde::{Deserialize, Serialize};

/// Names memory of a peer: the target of RDMA writes, reads and atomics.
///
/// A peer makes it with [`SharedRegion::remote`](crate::SharedRegion::remote) and sends it over; it is
/// plain data, checked by the device that owns the memory. Ranges taken of it are checked here, so a
/// mistake in arithmetic is found before it costs a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteSlice {
    /// Address in the peer's address space.
    pub addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Length in bytes.
    pub len: u64,
}

impl RemoteSlice {
    /// `len` bytes at `offset`, or `None` when that is not inside.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Option<RemoteSlice> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        Some(RemoteSlice { addr: self.addr.checked_add(offset)?, rkey: self.rkey, len })
    }
}
