//! Work in flight: one table for the synchronous and the asynchronous API.
//!
//! Every work request has a *slot* in its [`WorkQueue`] from the post until its completion was seen
//! (and, where an [`Operation`] waits for it, until that took the result). The slot owns the buffers and
//! whatever else the device needs, so nothing a caller drops or forgets frees memory in use.
//!
//! A work request is posted in one of two ways:
//!
//! * `post_*`, with a number of the caller's: its completion, with the buffers, goes to whoever calls
//!   [`CompletionQueue::poll`](crate::CompletionQueue::poll) next;
//! * `start_*`: an [`Operation`] owns it, and only that gets the result, whoever polls. It carries
//!   the waker of a future, and this is all that `rdma-async` builds on:
//!   [`Operation::poll_finished`], [`WorkQueue::poll_ready`] for back-pressure, and
//!   [`CompletionQueue::dispatch`](crate::CompletionQueue::dispatch) for the driver.

mod health;
mod held;
mod operation;
mod payload;
mod queue;
mod scratch;
mod slot;
#[cfg(all(test, loom))]
mod slot_loom;
mod table;

pub(crate) use health::Health;
pub(crate) use held::{Held, HeldList, Keep, Kept};
pub use operation::{Finished, Operation, QueueRef};
pub(crate) use payload::{Meta, SlotPayload, Taken};
pub use queue::WorkQueue;
pub(crate) use queue::{Kind, PostState};
pub(crate) use slot::{Posted, SimpleSlot, WrId};
pub(crate) use table::{Entries, MAX_DEPTH, QueueIndex, QueueTable};
