//! Futures over RDMA completion queues for tokio: safe to cancel, free of allocation.
#![forbid(unsafe_code)]

mod connection;
mod counters;
mod domain;
mod driver;
mod error;
pub mod exchange;
mod message;
mod pool;
mod queue;
mod source;
mod trace;
mod wait;

pub use connection::{
    Config, Connected, Connection, Listener, RcConnection, UcConnection, connect, connect_over,
};
pub use counters::{ConnectionCounters, QueueCounters};
pub use domain::Domain;
pub use error::{ConnectError, Ended, OperationError};
pub use message::Message;
pub use pool::BufferPool;
pub use queue::CompletionQueue;
pub use source::{Source, Target};
pub use wait::{BUSY_TURN, MAX_SPIN, WaitMode};
