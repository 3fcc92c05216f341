//! Access rights of memory.

use verbs_sys::ibv_access_flags as A;

bitflags::bitflags! {
    /// What a *peer* may do with memory: the remote rights of a [`SharedRegion`](crate::SharedRegion),
    /// a memory window, or a queue pair's responder (`man ibv_reg_mr`; IBTA vol. 1, 10.6.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct RemoteAccess: u32 {
        /// RDMA WRITE.
        const WRITE = A::IBV_ACCESS_REMOTE_WRITE.0;
        /// RDMA READ.
        const READ = A::IBV_ACCESS_REMOTE_READ.0;
        /// Compare-and-swap, fetch-and-add.
        const ATOMIC = A::IBV_ACCESS_REMOTE_ATOMIC.0;
    }
}

bitflags::bitflags! {
    /// Options of a registration.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RegionFlags: u32 {
        /// Memory windows may be bound to the region. Implied for a
        /// [`SharedRegion`](crate::SharedRegion) only when asked for.
        const WINDOWS = A::IBV_ACCESS_MW_BIND.0;
        /// On-demand paging: pages are not pinned; the device faults them in (hardware that has it).
        const ON_DEMAND = A::IBV_ACCESS_ON_DEMAND.0;
        /// The memory is of huge pages; needed with on-demand paging only.
        const HUGE_PAGES = A::IBV_ACCESS_HUGETLB.0;
        /// The device may reorder its writes on the bus; ignored where it cannot.
        const RELAXED_ORDERING = A::IBV_ACCESS_RELAXED_ORDERING.0;
    }
}
