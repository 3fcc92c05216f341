//! Futures over RDMA completion queues for tokio: safe to cancel, free of allocation.
//!
//! ```
//! use rdma_async::{Config, Domain, Listener, connect};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> { ping_pong() }
//! # #[tokio::main(flavor = "current_thread")]
//! async fn ping_pong() -> Result<(), Box<dyn std::error::Error>> {
//!     let domain = Domain::open(None)?; // hardware, the kernel's Soft-RoCE, or the built-in device
//!     let config = Config::rc();
//!     let listener = Listener::bind("127.0.0.1:0", &domain, &config).await?;
//!     let address = listener.local_addr();
//!
//!     tokio::spawn(async move {
//!         let peer = listener.accept().await.expect("a client");
//!         while let Ok(message) = peer.recv().await {
//!             let _ = peer.send(message).await; // sent from where it was received
//!         }
//!     });
//!
//!     let peer = connect(address, &domain, &config).await?;
//!     let mut buffer = peer.pool().acquire().await;
//!     buffer.set_len(4);
//!     buffer.copy_from_slice(b"ping");
//!     let (result, _buffer) = peer.send(buffer).await;
//!     result?;
//!     assert_eq!(&peer.recv().await?[..], b"ping");
//!     peer.close().await?;
//!     Ok(())
//! }
//! ```
//!
//! # Map
//!
//! | to | see |
//! |---|---|
//! | open a device | [`Domain`] |
//! | connect two processes | [`Listener`], [`connect`], [`connect_over`], [`Config`] |
//! | send, receive, write, read | [`Connection`], [`Message`], [`Source`] |
//! | do many at a time | [`Connection::batch`], [`Connection::recv_many`], [`UdEndpoint::recv_many_from`] |
//! | get registered memory | [`BufferPool`], [`BufferPools`], [`Connection::pool`] |
//! | choose between latency and processor time | [`WaitMode`], [`CompletionQueue`] |
//! | hear what the device reports | [`Domain::events`] |
//! | know why something failed | [`OperationError`], [`Ended`], [`ConnectError`] |
//! | exchange other data between peers | [`exchange`] |
//!
//! # Features
//!
//! * `tracing`: spans of the exchange and of a connection's life, and a word on what no caller can be told.
//! * `metrics`: counters of every connection, published each second: `rdma_async_posted`, `_completed`, `_failed`, `_receives_posted`,
//!   `_received`, `_keep_alives`, `_spins`, `_sleeps`, `_arms`, `_events` by `qp`, and `_errors` by `qp` and `status`.
//!
//! Both cost an operation nothing.
//!
//! # Cancelling
//!
//! Every future can be dropped at any point. Memory that the device may touch belongs to the library until the device is done with
//! it; then it goes back to its pool, or is freed. Forgetting anything is sound.
//!
//! # Threads
//!
//! Futures are `Send` and work on current-thread and multi-thread runtimes. A future looks at its completion queue itself, and
//! spins as its [`WaitMode`] says, unless others wait on the queue too: then one task reads for all, on the runtime that the queue was made
//! on. Only a future that sleeps needs the runtime's I/O driver, and the domain's task.
//!
//! Most throughput comes from a queue per core, made on that core's runtime and shared by its connections; and of small messages from
//! handling many with one wait: a [`Batch`] is posted with one doorbell and awaited once, [`Connection::recv_many`] takes all that arrived.
#![deny(unsafe_code)]

mod connection;
mod counters;
mod datagram;
mod domain;
mod driver;
mod duty;
mod error;
mod events;
pub mod exchange;
mod fd;
mod lane;
mod line;
mod message;
mod operate;
mod poller;
mod pool;
mod pools;
mod publish;
mod queue;
mod reader;
mod receive;
mod source;
mod trace;
mod wait;
mod waiter;

pub use connection::{
    Batch, Config, Connected, Connection, Listener, RcConnection, Recv, UcConnection, connect, connect_over,
};
pub use counters::{ConnectionCounters, QueueCounters, UdCounters};
pub use datagram::{Datagram, UdAddress, UdConfig, UdEndpoint};
pub use domain::Domain;
pub use error::{ConnectError, Ended, OperationError};
pub use events::Events;
pub use message::Message;
pub use pool::BufferPool;
pub use pools::BufferPools;
pub use queue::CompletionQueue;
pub use source::{Source, Target};
pub use wait::{BUSY_TURN, MAX_SPIN, WaitMode};
