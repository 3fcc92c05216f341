//! Completion statuses in words.

use std::fmt;

use verbs_sys::ibv_wc_status as S;

use super::Opcode;

/// The status of a completion (`enum ibv_wc_status`; IBTA vol. 1, 11.6.2). Values that this library
/// does not know are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub(crate) S);

macro_rules! statuses {
    ($($name:ident = $value:ident: $meaning:literal, $causes:literal;)*) => {
        impl Status {
            $(#[doc = $meaning] #[doc = "\n\n"] #[doc = $causes] pub const $name: Status = Status(S::$value);)*

            /// What it means, and what to look at.
            fn words(self) -> (&'static str, &'static str) {
                match self {
                    $(Status::$name => ($meaning, $causes),)*
                    _ => ("a status that this library does not know", "look it up by its number in the provider's documentation"),
                }
            }
        }
    };
}

statuses! {
    SUCCESS = IBV_WC_SUCCESS: "success", "";
    LOCAL_LENGTH = IBV_WC_LOC_LEN_ERR: "local length error: a message and a local buffer do not fit",
        "on a receive: the message was longer than the posted buffers; on a UD send: longer than the path MTU; on a send: longer than the port's max_msg_sz";
    LOCAL_QP_OPERATION = IBV_WC_LOC_QP_OP_ERR: "local queue pair operation error: the queue pair could not execute the work request",
        "an internal inconsistency: compare SGE count, inline size and opcode with what the queue pair was created for";
    LOCAL_EEC_OPERATION = IBV_WC_LOC_EEC_OP_ERR: "local end-to-end context operation error", "only for reliable datagrams, which no device has";
    LOCAL_PROTECTION = IBV_WC_LOC_PROT_ERR: "local protection error: a local buffer is not registered for what the device was to do",
        "a buffer of another protection domain than the queue pair's, or memory that was deregistered or unmapped";
    FLUSHED = IBV_WC_WR_FLUSH_ERR: "flushed: the queue pair was in the error state, or was reset or destroyed, before the work request was executed",
        "look at the first error of this queue pair, or at who aborted it; on the kernel's rxe, where there is neither, at the request's own buffers";
    WINDOW_BIND = IBV_WC_MW_BIND_ERR: "memory window bind error", "the region lacks the window right, the range lies outside of it, or the access asked for exceeds it";
    BAD_RESPONSE = IBV_WC_BAD_RESP_ERR: "bad response: the responder sent an opcode that was not expected", "a fault of the peer's device, or PSNs of another connection";
    LOCAL_ACCESS = IBV_WC_LOC_ACCESS_ERR: "local access error: a peer's RDMA write with immediate could not be carried out here",
        "the remote key, range or access right that the peer used against this side";
    REMOTE_INVALID_REQUEST = IBV_WC_REM_INV_REQ_ERR: "remote invalid request: the responder did not accept the message",
        "the message is longer than the receive buffer posted there, the operation is not enabled on the peer's queue pair (access rights at INIT), or the read or atomic depth of the responder is 0";
    REMOTE_ACCESS = IBV_WC_REM_ACCESS_ERR: "remote access error: the responder's memory refused the operation",
        "remote key, address range and access rights of the peer's memory, its protection domain, and the access rights of the peer's queue pair";
    REMOTE_OPERATION = IBV_WC_REM_OP_ERR: "remote operation error: the responder failed to carry the operation out",
        "the peer's own completion has the cause (a receive buffer it may not write, for instance)";
    RETRY_EXCEEDED = IBV_WC_RETRY_EXC_ERR: "transport retries exceeded: the peer did not answer",
        "whether the peer is alive and its queue pair is in RTR or RTS; destination GID or LID, queue pair number and PSN; path MTU; the GID type (RoCE v1 or v2) on both sides; UDP port 4791 in firewalls; timeout and retry count";
    RNR_RETRY_EXCEEDED = IBV_WC_RNR_RETRY_EXC_ERR: "receiver-not-ready retries exceeded: the peer had no receive posted",
        "post receives before the peer sends; rnr_retry 7 retries for ever; the peer's min_rnr_timer";
    LOCAL_RDD_VIOLATION = IBV_WC_LOC_RDD_VIOL_ERR: "local reliable datagram domain violation", "only for reliable datagrams, which no device has";
    REMOTE_INVALID_RD_REQUEST = IBV_WC_REM_INV_RD_REQ_ERR: "remote invalid reliable datagram request", "only for reliable datagrams, which no device has";
    REMOTE_ABORTED = IBV_WC_REM_ABORT_ERR: "remote aborted", "the responder aborted the operation: look at the peer";
    INVALID_EEC_NUMBER = IBV_WC_INV_EECN_ERR: "invalid end-to-end context number", "only for reliable datagrams, which no device has";
    INVALID_EEC_STATE = IBV_WC_INV_EEC_STATE_ERR: "invalid end-to-end context state", "only for reliable datagrams, which no device has";
    FATAL = IBV_WC_FATAL_ERR: "fatal error of the device", "the kernel log, and the device's asynchronous events";
    RESPONSE_TIMEOUT = IBV_WC_RESP_TIMEOUT_ERR: "response timeout", "whether the peer is alive";
    GENERAL = IBV_WC_GENERAL_ERR: "general error", "the vendor error, in the provider's documentation";
    TAG_MATCHING = IBV_WC_TM_ERR: "tag matching error", "the tag matching list of the shared receive queue";
    TAG_MATCHING_INCOMPLETE = IBV_WC_TM_RNDV_INCOMPLETE: "tag matching rendezvous incomplete", "software has to finish the rendezvous";
}

impl Status {
    /// The number (`enum ibv_wc_status`).
    #[must_use]
    pub fn code(self) -> u32 {
        self.0.0
    }

    /// The constant's name in C, if known.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        self.0.name()
    }

    /// What it means.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        self.words().0
    }

    /// What to look at.
    #[must_use]
    pub fn advice(self) -> &'static str {
        self.words().1
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "ibv_wc_status({})", self.code()),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.meaning())
    }
}

/// A work request that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompletionError {
    pub(crate) status: Status,
    pub(crate) opcode: Opcode,
    pub(crate) vendor_error: u32,
    pub(crate) qp_num: u32,
    pub(crate) cause: Option<Status>,
}

impl CompletionError {
    /// The status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// What the work request asked for.
    #[must_use]
    pub fn opcode(&self) -> Opcode {
        self.opcode
    }

    /// The vendor's error code.
    #[must_use]
    pub fn vendor_error(&self) -> u32 {
        self.vendor_error
    }

    /// The queue pair it happened on.
    #[must_use]
    pub fn qp_num(&self) -> u32 {
        self.qp_num
    }

    /// Whether this is only a consequence: the work request was flushed because the queue pair had failed
    /// or was torn down.
    #[must_use]
    pub fn is_flush(&self) -> bool {
        self.status == Status::FLUSHED
    }

    /// The queue pair's first error, which this flush follows; `None` for an error that happened by
    /// itself, and for flushes of a pair that was aborted, reset or destroyed without one.
    #[must_use]
    pub fn cause(&self) -> Option<Status> {
        if self.is_flush() { self.cause } else { None }
    }
}

impl fmt::Display for CompletionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on queue pair {:#x}: {:?} ({})", self.opcode, self.qp_num, self.status, self.status)?;
        if let Some(cause) = self.cause() {
            return write!(
                f,
                "; the queue pair's first error was {cause:?} ({cause}); look at: {}",
                cause.advice()
            );
        }
        if !self.status.advice().is_empty() {
            write!(f, "; look at: {}", self.status.advice())?;
        }
        if self.vendor_error != 0 {
            write!(f, "; vendor error {:#x}", self.vendor_error)?;
        }
        Ok(())
    }
}

impl std::error::Error for CompletionError {}
