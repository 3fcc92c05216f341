//! The two halves of a connected pair, for two tasks.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::QueuePair;
use super::state::{Rtr, Rts};
use super::transport::Transport;

/// The sending half of a pair in RTS: everything a pair can do but receive and change its state.
///
/// The pair is destroyed when both halves are gone.
pub struct SendHalf<T: Transport> {
    pair: QueuePair<T, Rts>,
}

/// The receiving half of a pair in RTS.
pub struct RecvHalf<T: Transport> {
    /// As a pair that cannot send.
    pair: QueuePair<T, Rtr>,
}

impl<T: Transport> QueuePair<T, Rts> {
    /// Splits into halves that two tasks own. (Posting takes `&self`, so sharing the pair works too; halves
    /// say who does what.)
    #[must_use]
    pub fn split(self) -> (SendHalf<T>, RecvHalf<T>) {
        let receiving = QueuePair::new(Arc::clone(&self.inner));
        (SendHalf { pair: self }, RecvHalf { pair: receiving })
    }
}

impl<T: Transport> SendHalf<T> {
    /// Joins the halves.
    ///
    /// # Errors
    ///
    /// Both, when they are of different pairs.
    pub fn reunite(self, other: RecvHalf<T>) -> Result<QueuePair<T, Rts>, (SendHalf<T>, RecvHalf<T>)> {
        if Arc::ptr_eq(&self.pair.inner, &other.pair.inner) { Ok(self.pair) } else { Err((self, other)) }
    }
}

impl<T: Transport> Deref for SendHalf<T> {
    type Target = QueuePair<T, Rts>;

    fn deref(&self) -> &QueuePair<T, Rts> {
        &self.pair
    }
}

impl<T: Transport> Deref for RecvHalf<T> {
    type Target = QueuePair<T, Rtr>;

    fn deref(&self) -> &QueuePair<T, Rtr> {
        &self.pair
    }
}

impl<T: Transport> fmt::Debug for SendHalf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendHalf").field("num", &self.pair.num()).finish_non_exhaustive()
    }
}

impl<T: Transport> fmt::Debug for RecvHalf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvHalf").field("num", &self.pair.num()).finish_non_exhaustive()
    }
}
