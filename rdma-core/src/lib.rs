//! Safe RDMA verbs, with the queue-pair state machine in the type system.
//!
//! # Map
//!
//! | to | see |
//! |---|---|
//! | find a device and open it | [`Device`], [`Context`] |
//! | look at ports, GIDs and keys | [`PortAttributes`], [`GidEntry`], [`Context::choose_gid`] |
//! | register memory | [`ProtectionDomain`], [`MemoryRegion`], [`Buffer`]; for peers [`SharedRegion`], [`RemoteSlice`] |
//! | make a queue pair and connect it | [`ProtectionDomain::queue_pair`], [`qp`], [`Endpoint`] |
//! | send, write, read | [`WorkRequest`], [`QueuePair::post_send`], [`QueuePair::post_recv`] |
//! | learn what completed | [`CompletionQueue::poll`], [`Completions`], [`Completion`] |
//! | sleep until something completes | [`CompletionChannel`], [`CompletionQueue::arm`] |
//! | build something asynchronous on it | [`inflight`] |
//!
//! # The rule
//!
//! Memory that the device may touch is owned by the library until the completion arrives or the queue
//! pair is destroyed. A [`Buffer`] is moved into a post and comes back with the completion; there is
//! no borrow to outlive, nothing that `Drop` must do in time, and forgetting anything is sound.
//!
//! # Errors
//!
//! [`Error`] names the verb, what it said and what to look at. A post that fails gives the request back
//! ([`PostError`]), a transition the queue pair ([`TransitionError`]). A completion that failed explains
//! itself ([`CompletionError`]), and a flush names the error that it follows.

mod ah;
mod context;
mod cq;
mod device;
mod error;
mod event;
mod fd;
pub mod inflight;
mod mr;
mod mw;
mod ops;
mod pd;
mod port;
pub mod qp;
mod srq;
mod sync;

pub use ah::{AddressHandle, AddressVector, GlobalRoute};
pub use context::Context;
#[doc(hidden)]
pub use cq::Offer;
pub use cq::{
    Completion, CompletionChannel, CompletionClock, CompletionError, CompletionQueue, CompletionQueueBuilder,
    Completions, KeptPlaces, Lent, Notify, Opcode, PollError, Status, Success, WorkCompletion,
};
pub use device::{AtomicCapability, Choice, Device, DeviceAttributes, OdpCapabilities, Provider};
pub(crate) use error::leak;
pub use error::{Error, leaks};
pub use event::{AsyncEvents, Event, EventKind};
pub use mr::{
    Buffer, BufferHome, HUGE_PAGE, IdleBuffer, Memory, MemoryRegion, RegionFlags, RegionRef, RemoteAccess,
    RemoteSlice, SharedRegion, SharedSlice,
};
pub use mw::{MemoryWindow, WindowType};
pub use pd::ProtectionDomain;
pub use port::{Gid, GidChoice, GidEntry, GidType, LinkLayer, Mtu, PhysicalState, PortAttributes, PortState};
pub use qp::{
    AnyQueuePair, ConnectOptions, Endpoint, EndpointOptions, Observed, Payload, PostError, PostErrorKind,
    QueuePair, QueuePairAttributes, QueuePairBuilder, QueuePairCapacity, QueuePairHandle, RecvHalf,
    RecvRequest, SendHalf, TransitionError, WorkRequest,
};
pub use srq::SharedReceiveQueue;
