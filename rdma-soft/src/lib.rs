//! An RDMA device in user space: RoCEv2 over UDP behind the libibverbs ABI.
//!
//! [`verbs`] is a provider's table of functions as `libibverbs.so.1` exports them, for one device named
//! [`DEVICE_NAME`]. It needs no kernel module, no RDMA hardware and no privileges. Every process has a device
//! of its own, bound to one local address; devices talk to each other, to the kernel's Soft-RoCE and to
//! hardware in real RoCEv2 packets over UDP port 4791.
//!
//! # Environment
//!
//! Read when the device is opened, with the first context; a value that makes no sense fails that, and
//! [`last_error`] says why.
//!
//! | variable | meaning |
//! |---|---|
//! | `RDMA_SOFT_ADDR` | local address or interface to stand on; default: the first free of 127.0.0.1, 127.0.0.2, ... |
//! | `RDMA_SOFT_GSO=off` | send every datagram by a call of its own, so that captures on the wire show packets |
//! | `RDMA_SOFT_LOCAL=wire` | send packets between queue pairs of this process through the socket as well |
//! | `RDMA_SOFT_PCAP=FILE` | write every packet sent and received to a capture file; `%p` is the process id |
//! | `RDMA_SOFT_FAULT=loss=0.05,dup=0.01,reorder=0.02,corrupt=0.001,seed=7` | lose, double, reorder and corrupt packets that are sent |
//!
//! # Layers
//!
//! `abi` (C structures) over `device` (objects, threads) over `proto` (transports as state machines without
//! I/O) over `wire` (packet formats), with `net` (the socket) beside `device`.

mod abi;
mod device;
mod net;
pub mod proto;
mod sys;
pub mod wire;

use std::sync::{Mutex, PoisonError};

pub use net::OpenError;
use verbs_sys::Verbs;

/// The name of the device.
pub const DEVICE_NAME: &str = abi::NAME;

/// The functions of the soft device, as `libibverbs.so.1` exports them.
///
/// The data path goes through the tables of the objects, see [`verbs_sys::inline`].
#[must_use]
pub fn verbs() -> &'static Verbs {
    &abi::VERBS
}

static OPEN_ERROR: Mutex<Option<OpenError>> = Mutex::new(None);

fn set_open_error(error: Option<&OpenError>) {
    *OPEN_ERROR.lock().unwrap_or_else(PoisonError::into_inner) = error.cloned();
}

/// Why the latest `ibv_open_device` failed, in words; `None` if it did not.
///
/// C has only `errno`, which cannot name an address or a variable.
#[must_use]
pub fn last_error() -> Option<OpenError> {
    OPEN_ERROR.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Counters of the device of this process by name, as the kernel's `hw_counters`, or `None` if it is not
/// open. They count from when it was opened.
#[must_use]
pub fn counters() -> Option<Vec<(&'static str, u64)>> {
    device::current().map(|device| device.counters())
}
