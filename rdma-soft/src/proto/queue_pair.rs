//! The queue pair: what the device holds and calls.

use super::*;
use crate::wire::{Packet, Psn};

/// What the network layer knows of a packet beyond its transport headers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PacketMeta<'a> {
    /// Global route header to place in front of a datagram: the IPv6 header, or 20 undefined bytes and the
    /// IPv4 header (annex A17.4.5.1). Needed for UD only; zeros are placed if it is missing.
    pub grh: Option<&'a [u8; 40]>,
}

/// A transition that the state machine of queue pairs does not have (clause 10.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no transition from {from:?} to {to:?}")]
pub struct ModifyError {
    /// State of the queue pair.
    pub from: State,
    /// State that was asked for.
    pub to: State,
}

/// The requester and responder of one queue pair, see the [module](super).
#[derive(Debug)]
pub struct QueuePair {
    state: State,
    attributes: Attributes,
}

#[expect(unused_variables, reason = "bodies follow")]
impl QueuePair {
    /// A queue pair in RESET. All memory it will ever need but for READ and atomic resources is allocated here.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { state: State::Reset, attributes: Attributes::default() }
    }

    /// Queues a send request. In SQE and ERR it completes at once, flushed.
    pub fn post_send<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        request: &SendRequest<'_>,
    ) -> Result<(), PostError> {
        Err(PostError::InvalidState(self.state))
    }

    /// Takes a packet that is addressed to this queue pair. Its ICRC was verified, and for RC and UC its
    /// source address is that of the connected peer.
    pub fn handle_packet<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        packet: &Packet<'_>,
        meta: &PacketMeta<'_>,
    ) {
    }

    /// Writes the next packet to send into `out`, which has room for [`MAX_PACKET_LEN`], or returns `None`
    /// if there is nothing to send now. Call again until then; one call is one packet.
    pub fn poll_transmit<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        acks: Acks,
        out: &mut [u8],
    ) -> Option<Transmit> {
        None
    }

    /// Whether an acknowledgement waits for [`Acks::Flush`].
    #[must_use]
    pub fn ack_pending(&self) -> bool {
        false
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called. Changes with any other call.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }

    /// Handles what is due at `now`; harmless if nothing is.
    pub fn handle_timeout<H: Host>(&mut self, now: Time, host: &mut H) {}

    /// Moves to another state, or changes attributes in the same (INIT, RTS, SQD). Which attributes are read is
    /// said at [`Attributes`]. RESET forgets all work without completions; ERR flushes it.
    pub fn modify<H: Host>(
        &mut self,
        now: Time,
        host: &mut H,
        to: State,
        attributes: &Attributes,
    ) -> Result<(), ModifyError> {
        Err(ModifyError { from: self.state, to })
    }

    /// Moves to ERR and flushes, as if by [`modify`](Self::modify); harmless in RESET and ERR.
    pub fn to_error<H: Host>(&mut self, host: &mut H) {}

    /// Current state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Attributes as last read.
    #[must_use]
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// The next PSN that the requester will use (`sq_psn`).
    #[must_use]
    pub fn send_psn(&self) -> Psn {
        self.attributes.send_psn
    }

    /// The PSN that the responder expects (`rq_psn`).
    #[must_use]
    pub fn receive_psn(&self) -> Psn {
        self.attributes.receive_psn
    }

    /// Whether the state is SQD and requests that were begun are not complete yet (`sq_draining`).
    #[must_use]
    pub fn sq_draining(&self) -> bool {
        false
    }

    /// Send requests that are posted and not complete.
    #[must_use]
    pub fn send_queue_len(&self) -> u32 {
        0
    }
}
