//! An RDMA device in user space: RoCEv2 over UDP behind the libibverbs ABI

mod net;
pub mod proto;
pub mod wire;
