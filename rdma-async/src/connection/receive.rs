//! The future of a message.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use super::{link::Link, transport::Connected};
use crate::{error::OperationError, message::Message, receive::Receive};

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

    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx)
    }
}

impl<T: Connected> fmt::Debug for Recv<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recv").finish_non_exhaustive()
    }
}
