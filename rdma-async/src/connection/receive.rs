//! The future of a message.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use super::{link::Link, transport::Connected};
use crate::{error::OperationError, lane::Arrival, message::Message, receive::Receive};

/// The future of [`Connection::recv`](super::Connection::recv).
#[must_use = "futures do nothing unless polled"]
pub struct Recv<'c, T: Connected>(Receive<'c, Link<T>>);

impl<'c, T: Connected> Recv<'c, T> {
    #[inline]
    pub(super) fn new(link: &'c Link<T>) -> Self {
        Recv(Receive::new(link))
    }
}

impl<T: Connected> Future for Recv<'_, T> {
    type Output = Result<Message, OperationError>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map_ok(message)
    }
}

#[inline(always)]
fn message(arrival: Arrival) -> Message {
    let Arrival { mut buffer, completion } = arrival;
    let (mut imm, mut written) = (None, None);
    // Only successes arrive.
    if let Ok(success) = completion.result() {
        imm = success.imm();
        if success.is_write_with_imm() {
            written = Some(success.len());
            buffer.truncate(0);
        }
    }
    Message { buffer, imm, written }
}

impl<T: Connected> fmt::Debug for Recv<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recv").finish_non_exhaustive()
    }
}
