//! Futures over RDMA completion queues for tokio: safe to cancel, free of allocation
#![forbid(unsafe_code)]

pub mod exchange;
