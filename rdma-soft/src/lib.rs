//! An RDMA device in user space: RoCEv2 over UDP behind the libibverbs ABI

mod device;
mod net;
mod proto;
mod sys;
mod wire;
