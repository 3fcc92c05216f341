//! The UDP socket on port 4791 and the local address it stands on.
//!
//! Nothing here knows RoCE beyond its port: datagrams go out, one or several equal ones per call
//! (GSO), and come in, one or several equal ones per call (GRO).

mod address;
mod diag;
mod envelope;
mod fault;
mod group;
mod pcap;
mod socket;

pub use address::OpenError;
pub(crate) use address::{Local, choose, to_gid};
pub(crate) use diag::{Occupancy, SocketDiag};
pub(crate) use envelope::{Envelope, IcrcCache, PathKey};
pub(crate) use fault::{FAULT_VARIABLE, Fault, FaultRates, Faults, corrupt};
pub(crate) use group::{GroupSocket, send_groups_from};
pub(crate) use pcap::{Capture, PCAP_VARIABLE};
pub(crate) use socket::{Datagrams, MAX_BATCH_LEN, MAX_SEGMENTS, ReceiveBuffer, SendError, Socket};

/// The name of the variable that binds the device to an address or an interface.
pub(crate) const ADDRESS_VARIABLE: &str = "RDMA_SOFT_ADDR";
