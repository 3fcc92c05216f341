//! File descriptors of the verbs with tokio: the one place of this crate that needs `unsafe`.
#![expect(unsafe_code, reason = "tokio cannot know that an object's file descriptor stays the same and open")]

use std::os::fd::AsRawFd;

use rdma_core::{AsyncEvents, CompletionChannel, Error};
use tokio::io::{Interest, unix::AsyncFd};

/// An object whose descriptor is open and the same for as long as it lives. Only this module says of what that holds.
pub(crate) trait Stable: AsRawFd {}

// `ibv_comp_channel.fd` is set at creation and closed with the channel, which the handle keeps alive.
impl Stable for CompletionChannel {}

// `ibv_context.async_fd` is opened and closed with the context, which the handle keeps alive.
impl Stable for AsyncEvents {}

/// Registers `object` with the current runtime.
///
/// # Errors
///
/// What the runtime says.
///
/// # Panics
///
/// Outside of a tokio runtime with I/O enabled.
pub(crate) fn register<T: Stable>(object: T) -> Result<AsyncFd<T>, Error> {
    // SAFETY: `Stable` is implemented in this module only, for objects that keep their descriptor open and the same.
    let fd = unsafe { AsyncFd::register_with_interest(object, Interest::READABLE) };
    fd.map_err(|error| {
        let (_, source) = error.into_parts();
        Error::Verb { verb: "epoll_ctl", source, advice: String::new() }
    })
}
