//! What happens where no caller can be told goes to the log; without the feature `tracing`, nowhere.

use std::fmt::Display;

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

/// A connection ended.
pub(crate) fn connection_ended(qp_num: u32, reason: &dyn Display) {
    #[cfg(feature = "tracing")]
    tracing::debug!(qp_num, %reason, "connection ended");
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
