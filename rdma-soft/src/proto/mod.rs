//! The transports RC, UC and UD as state machines: no I/O, no clock, no randomness, no allocation per operation.
//!
//! A [`QueuePair`] owns its send queue and all protocol state. What it needs of the world comes in through
//! the call: the time as `now`, packets as [`Packet`](crate::wire::Packet), memory, receive queue and
//! completion queues through [`Host`]. Inputs are `handle_*`, outputs `poll_*`:
//!
//! * [`QueuePair::post_send`] queues work, [`QueuePair::handle_packet`] takes a packet whose ICRC was verified;
//! * [`QueuePair::poll_transmit`] writes one packet at a time until it returns `None`;
//! * [`QueuePair::poll_timeout`] says when [`QueuePair::handle_timeout`] wants to be called.
//!
//! After any input call `poll_transmit` until it is dry. An acknowledgement that is due stays pending under
//! [`Acks::Hold`], so that an answer which the application posts next leaves first and the acknowledgement
//! with it; [`Acks::Flush`] sends it, after any data. NAKs and responses to READ and atomics never wait.
//!
//! The rules are those of the InfiniBand Architecture Specification, volume 1, chapter 9, and annex A17.
//! Where that leaves a choice we do as the kernel's rxe does, and say so.

#![forbid(unsafe_code)]

mod assembly;
mod attributes;
mod completer;
mod config;
mod congestion;
mod event;
mod host;
mod queue_pair;
mod requester;
mod resources;
mod responder;
mod send_queue;
mod time;
mod transmit;
mod unreliable;
mod work;

pub use attributes::{Attributes, PathMtu, QpAccess, State};
pub use config::{Config, CongestionConfig};
pub use event::{Counter, Event};
pub use host::{AtomicOp, BindRequest, Host, LocalError, RemoteAccess, RemoteError};
pub use queue_pair::{ModifyError, PacketMeta, QueuePair};
pub use time::Time;
pub use transmit::{Acks, MAX_PACKET_LEN, Transmit, TransmitKind};
pub use work::{
    Completion, CompletionKind, CompletionOpcode, Data, Destination, ImmediateOrKey, MAX_MESSAGE, PostError,
    ReceiveRequest, SendFlags, SendOperation, SendRequest, Sge, Status,
};
