//! The `rdma-soft` device as a shared library for programs that already use libibverbs.
//!
//! Two forms come from this crate:
//!
//! * the *preload* form, `librdma_preload.so` from a plain `cargo build --release -p rdma-preload`: it exports the verbs
//!   under their own names, so that `LD_PRELOAD` puts them before the system's. Real devices stay visible beside `soft0`:
//!   each call goes to the provider that made the object it is given.
//! * the *drop-in* form, a `libibverbs.so.1` with version nodes, from `ci/build-libibverbs.sh` (feature `drop-in`): for
//!   programs that open the library by name, and for machines without rdma-core.
//!
//! The binary `rdma-soft run -- PROGRAM ARGS` sets the environment up and runs a program on the soft device.
//!
//! Every function here has the contract of the C function of the same name (manual pages of rdma-core).

#![allow(clippy::missing_safety_doc, reason = "the contract of each function is its manual page")]
#![allow(unreachable_pub, reason = "exported by symbol, not by path")]
#![allow(missing_docs, reason = "each export is the C function of that name")]

mod devices;
mod dispatch;
mod exports;
#[cfg(feature = "drop-in")]
mod private;
#[cfg(feature = "drop-in")]
mod strings;
