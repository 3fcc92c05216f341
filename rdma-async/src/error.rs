//! Why an operation, or a connection, failed.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rdma_core::{CompletionError, PostErrorKind};

use crate::exchange::ExchangeError;

/// Why an operation failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperationError {
    /// The device completed it with an error; on a connection this ends the connection.
    #[error(transparent)]
    Completion(#[from] CompletionError),
    /// The connection had ended, or ended while the operation was in flight.
    #[error("the connection ended: {0}")]
    Ended(#[from] Ended),
    /// The message is longer than the peer's receive buffers. Nothing was sent, the connection goes on.
    #[error(
        "a message of {length} bytes does not fit into the peer's receive buffers of {limit} bytes; it was not sent, because a device would have completed it with IBV_WC_REM_INV_REQ_ERR at the sender and IBV_WC_LOC_LEN_ERR at the receiver; raise the receiver's Config::message_size (in the examples: --size at the server)"
    )]
    TooLong {
        /// Bytes of the message.
        length: usize,
        /// Bytes of each of the peer's receive buffers.
        limit: usize,
    },
    /// The datagram does not fit into a packet, and datagrams have one each. Nothing was sent, the endpoint goes on.
    #[error(
        "a datagram of {length} bytes does not fit into a packet of at most {limit} bytes, the port's MTU; it was not sent; send it in parts, or \
         over a connection, or raise the MTU (on RoCE that of the network interface) on all sides"
    )]
    DatagramTooLong {
        /// Bytes of the datagram.
        length: usize,
        /// The most bytes of a datagram: [`UdEndpoint::max_message`](crate::UdEndpoint::max_message).
        limit: usize,
    },
    /// The work request was not accepted. The connection goes on.
    #[error("the work request could not be posted: {0}")]
    Post(#[from] PostErrorKind),
    /// A verb failed. The connection goes on.
    #[error(transparent)]
    Verb(Arc<rdma_core::Error>),
}

/// Why a connection ended. The first reason counts.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// This side closed or aborted it.
    #[error("closed by this side")]
    Closed,
    /// The peer closed or dropped it.
    #[error("closed by the peer")]
    ClosedByPeer,
    /// The peer's side of the connection failed, as it said itself. Operations of this side that were in flight had a moment to end with what
    /// the peer's device answered.
    #[error("the peer's side failed: {reason}")]
    PeerFailed {
        /// What the peer said, at most 1000 bytes of it.
        reason: String,
    },
    /// The peer went away without a word: it died, or the network between the peers did.
    #[error("lost the peer: {reason}")]
    PeerLost {
        /// How that showed.
        reason: String,
    },
    /// The runtime that the connection was made on is gone, and with it the task that watches over the connection.
    #[error(
        "the runtime that it was made on is gone, so nobody hears of the peer's end any more; make the connection on a runtime that lives \
         as long"
    )]
    RuntimeGone,
    /// An operation outlived its deadline.
    #[error("an operation did not end within its deadline of {limit:?}")]
    Deadline {
        /// The time it had.
        limit: Duration,
    },
    /// An operation failed, which fails a connection.
    #[error("an operation failed: {0}")]
    Failed(CompletionError),
    /// The device reported that the queue pair failed.
    #[error("the device reported: {event}")]
    Event {
        /// The asynchronous event.
        event: String,
    },
    /// The device takes no more work.
    #[error("the device takes no more work: {reason}")]
    Device {
        /// What the verb said.
        reason: String,
    },
    /// The completion queue cannot be read any more.
    #[error("the completion queue failed: {reason}")]
    Queue {
        /// What the verb said.
        reason: String,
    },
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No stream to the peer, or none could be accepted.
    #[error("cannot {verb} the stream to the peer: {source}")]
    Stream {
        /// What was tried.
        verb: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The port cannot be listened on, or a stream not be accepted.
    #[error("cannot listen: {source}")]
    Listen {
        /// What the system said.
        source: io::Error,
    },
    /// The exchange with the peer failed.
    #[error("exchange{}: {source}", with(.peer))]
    Exchange {
        /// The peer, where the stream has an address.
        peer: Option<SocketAddr>,
        /// How.
        source: ExchangeError,
    },
    /// The peers do not fit together.
    #[error("peer{}: {reason}", at(.peer))]
    Mismatch {
        /// The peer, where the stream has an address.
        peer: Option<SocketAddr>,
        /// What does not fit.
        reason: String,
    },
    /// The peer could not set up its side.
    #[error("peer{} could not set up its side: {reason}", at(.peer))]
    Refused {
        /// The peer, where the stream has an address.
        peer: Option<SocketAddr>,
        /// What the peer said.
        reason: String,
    },
    /// The peer waited for as long as an exchange may take, because connections that were made before were not accepted.
    #[error(
        "{made} connections that were made were not accepted for {timeout:?}, so the one{} was not made; call Listener::accept sooner, or \
         allow more time (Config::handshake_timeout, of both sides)", with(.peer)
    )]
    NotAccepted {
        /// The peer.
        peer: Option<SocketAddr>,
        /// Connections that are made ahead.
        made: usize,
        /// The time that an exchange may take.
        timeout: Duration,
    },
    /// A verb failed on this side.
    #[error(transparent)]
    Verb(#[from] rdma_core::Error),
}

/// The most bytes of a reason that peers give each other: a frame of the exchange has room for it.
pub(crate) const MAX_REASON: usize = 1000;

/// A reason that peers give each other, cut to [`MAX_REASON`], without characters that would do more to a terminal, or to the text around,
/// than be read.
pub(crate) fn fit_to_print(text: &str) -> String {
    let is_harmful = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut fit = String::new();
    for c in text.chars() {
        let c = if is_harmful(c) { ' ' } else { c };
        if fit.len() + c.len_utf8() > MAX_REASON {
            break;
        }
        fit.push(c);
    }
    fit
}

fn with(peer: &Option<SocketAddr>) -> String {
    peer.map(|peer| format!(" with {peer}")).unwrap_or_default()
}

fn at(peer: &Option<SocketAddr>) -> String {
    peer.map(|peer| format!(" {peer}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_is_fit_to_print() {
        assert_eq!(fit_to_print("plain, with umlauts: \u{e4}"), "plain, with umlauts: \u{e4}");
        assert_eq!(fit_to_print("a\x1b[2J\u{202e}b\u{2028}\n"), "a [2J b  ");
        for fill in ["x", "\u{e4}", "\u{fffd}"] {
            let long = format!("-{}", fill.repeat(MAX_REASON));
            let fit = fit_to_print(&long);
            assert!(
                long.starts_with(&fit) && (MAX_REASON - 2..=MAX_REASON).contains(&fit.len()),
                "{}",
                fit.len()
            );
        }
    }
}
