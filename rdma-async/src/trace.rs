//! What happens where no caller can be told goes to the log; without the feature `tracing`, nowhere.

use std::{fmt::Display, future::Future};

/// A completion queue could not be armed or read.
pub(crate) fn queue_failed(error: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::error!(%error, "completion queue failed");
    let _ = error;
}

/// The events of a completion channel could not be taken.
pub(crate) fn channel_failed(error: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::error!(%error, "completion channel failed");
    let _ = error;
}

/// A listener ended an exchange that was not done, because too many others had begun since.
pub(crate) fn crowded_out(peer: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::warn!(%peer, "exchange ended to make room for others");
    let _ = peer;
}

/// A connection or an endpoint ended.
pub(crate) fn ended(qp_num: u32, reason: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::debug!(qp_num, %reason, "ended");
    let _ = (qp_num, reason);
}

/// A queue pair could not be moved to ERR.
pub(crate) fn abort_failed(qp_num: u32, error: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::error!(qp_num, %error, "queue pair could not be aborted");
    let _ = (qp_num, error);
}

/// The send queue of a UD queue pair could not be brought back after a failed send.
pub(crate) fn recovery_failed(qp_num: u32, error: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::error!(qp_num, %error, "send queue could not be brought back after a failed send");
    let _ = (qp_num, error);
}

/// The asynchronous events of a device could not be read: nobody is told of any.
pub(crate) fn events_failed(error: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::warn!(%error, "asynchronous events could not be read");
    let _ = error;
}

/// The device reported something.
pub(crate) fn event(event: &dyn std::fmt::Debug) {
    #[cfg(feature = "tracing")]
    tracing::debug!(?event, "asynchronous event");
    let _ = event;
}

/// Runs `future` in the span of a connection's exchange.
pub(crate) fn establishing<F: Future>(transport: &'static str, future: F) -> impl Future<Output = F::Output> {
    #[cfg(feature = "tracing")]
    let future = tracing::Instrument::instrument(future, tracing::debug_span!("connect", transport));
    let _ = transport;
    future
}

/// Runs `future` in the span of a connection's life.
pub(crate) fn watching<F: Future>(qp_num: u32, future: F) -> impl Future<Output = F::Output> {
    #[cfg(feature = "tracing")]
    let future = tracing::Instrument::instrument(future, tracing::debug_span!("connection", qp_num));
    let _ = qp_num;
    future
}
