//! A pair whose state is a value.

use super::QueuePair;
use super::state::{Errored, Init, Reset, Rtr, Rts, Sqd, Sqe};
use super::transport::Transport;

/// A queue pair in any state: for tables of pairs, at the edge of a program.
#[derive(Debug)]
#[allow(missing_docs, reason = "each variant is the state of that name")]
pub enum AnyQueuePair<T: Transport> {
    Reset(QueuePair<T, Reset>),
    Init(QueuePair<T, Init>),
    Rtr(QueuePair<T, Rtr>),
    Rts(QueuePair<T, Rts>),
    Sqd(QueuePair<T, Sqd>),
    Sqe(QueuePair<T, Sqe>),
    Errored(QueuePair<T, Errored>),
}

macro_rules! states {
    ($($state:ident)*) => {
        $(impl<T: Transport> From<QueuePair<T, $state>> for AnyQueuePair<T> {
            fn from(pair: QueuePair<T, $state>) -> AnyQueuePair<T> {
                AnyQueuePair::$state(pair)
            }
        })*

        impl<T: Transport> AnyQueuePair<T> {
            /// The pair's number.
            #[must_use]
            pub fn num(&self) -> u32 {
                match self {
                    $(AnyQueuePair::$state(pair) => pair.num(),)*
                }
            }

            /// A handle that can abort and observe it.
            #[must_use]
            pub fn handle(&self) -> super::QueuePairHandle {
                match self {
                    $(AnyQueuePair::$state(pair) => pair.handle(),)*
                }
            }

            /// The name of the state last commanded.
            #[must_use]
            pub fn state(&self) -> &'static str {
                use super::state::State as _;
                match self {
                    $(AnyQueuePair::$state(_) => $state::NAME,)*
                }
            }
        }
    };
}

states!(Reset Init Rtr Rts Sqd Sqe Errored);
