//! Asynchronous events and counters that a queue pair reports to its host.

/// An asynchronous event that concerns the queue pair (clause 11.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The first packet in sequence arrived while in RTR; RC and UC (`IBV_EVENT_COMM_EST`).
    CommunicationEstablished,
    /// The send queue drained in SQD (`IBV_EVENT_SQ_DRAINED`).
    SendQueueDrained,
    /// The responder of RC refused an operation that is not allowed or out of order, and no receive could be
    /// completed to tell so (`IBV_EVENT_QP_REQ_ERR`).
    RequestError,
    /// The same for a key, right, range, length, alignment or depth that is wrong (`IBV_EVENT_QP_ACCESS_ERR`).
    AccessError,
    /// The queue pair failed for a reason of its own, not visible in a completion (`IBV_EVENT_QP_FATAL`).
    Fatal,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Something that happened, to be counted by the host.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Counter {
            $($(#[$doc])* $name,)*
        }

        impl Counter {
            /// All counters in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Name in reports, in the style of the kernel's `hw_counters`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Place in a table of [`ALL`](Self::ALL)'s length.
            #[must_use]
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

counters! {
    /// Packets written by `poll_transmit`.
    SentPackets = "sent_pkts",
    /// Packets that a queue pair took.
    ReceivedPackets = "rcvd_pkts",
    /// SEND messages completed by the requester.
    SendsCompleted = "sends_completed",
    /// Messages that completed a receive.
    ReceivesCompleted = "receives_completed",
    /// RDMA WRITE and READ and atomic requests completed by the requester.
    RdmaCompleted = "rdma_completed",
    /// Requests that had been seen before.
    DuplicateRequest = "duplicate_request",
    /// Requests that came before one that is missing.
    OutOfSequenceRequest = "out_of_seq_request",
    /// RNR NAKs received.
    RnrNakReceived = "rcvd_rnr_err",
    /// RNR NAKs sent.
    RnrNakSent = "send_rnr_err",
    /// PSN sequence NAKs received.
    SequenceNakReceived = "rcvd_seq_err",
    /// PSN sequence NAKs sent.
    SequenceNakSent = "send_seq_err",
    /// NAKs received that say a request is wrong.
    ErrorNakReceived = "rcvd_err_nak",
    /// NAKs sent that say a request is wrong.
    ErrorNakSent = "send_err_nak",
    /// Responses that show an earlier response to be lost.
    ImpliedNak = "implied_nak",
    /// Acknowledgements and responses that came again or too late.
    DuplicateResponse = "duplicate_response",
    /// Acknowledgements left to a later packet because more was on its way.
    AckDeferred = "ack_deferred",
    /// Local ack timeouts.
    Timeout = "local_ack_timeout_err",
    /// Flights sent again halfway to a local ack timeout.
    Probe = "tail_probe",
    /// Packets sent again.
    Retransmitted = "retransmitted_pkts",
    /// Queue pairs that failed because a packet was lost too often.
    RetryExceeded = "retry_exceeded_err",
    /// Queue pairs that failed because the receiver was never ready.
    RnrRetryExceeded = "retry_rnr_exceeded_err",
    /// Send requests that completed in error.
    SendError = "send_err",
    /// Packets of another transport service or without a queue pair's meaning.
    DropTransport = "drop_transport",
    /// Packets for a queue pair in the wrong state.
    DropState = "drop_state",
    /// Packets of a partition that the queue pair is not in.
    DropPkey = "drop_pkey",
    /// Datagrams with another queue key.
    DropQkey = "drop_qkey",
    /// Datagrams and UC messages for which no receive was posted, and RC requests that came again before the peer
    /// can have waited as it was told.
    DropNoReceive = "drop_no_receive",
    /// Datagrams and UC packets of wrong length, or too long for their receive.
    DropLength = "drop_length",
    /// UC packets of a message whose beginning is missing or broken.
    DropBrokenMessage = "drop_broken_message",
    /// UC requests that were refused.
    DropAccess = "drop_access",
    /// Requests so far ahead of the expected PSN that they can hardly be the peer's.
    DropPsn = "drop_psn_out_of_window",
    /// Duplicate READ and atomic requests that are no longer remembered, or whose memory is not accessible any more.
    DropForgotten = "drop_forgotten_request",
    /// Responses that acknowledge what was never sent.
    DropResponse = "drop_unexpected_response",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_is_the_place_in_the_list() {
        for (place, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(counter.index(), place);
        }
    }
}
