//! Work requests and completions.

use bitflags::bitflags;

use crate::wire::Qpn;

/// A scatter/gather element: a piece of local memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sge {
    /// Address.
    pub addr: u64,
    /// Length in bytes.
    pub length: u32,
    /// Local key.
    pub lkey: u32,
}

/// What a send request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOperation {
    /// SEND.
    Send,
    /// SEND with immediate data, in the byte order of the wire.
    SendWithImmediate([u8; 4]),
    /// SEND that invalidates a key of the peer (RC).
    SendWithInvalidate(u32),
    /// RDMA WRITE (RC, UC).
    Write {
        /// Address at the peer.
        va: u64,
        /// Key of the peer.
        rkey: u32,
    },
    /// RDMA WRITE with immediate data, in the byte order of the wire (RC, UC).
    WriteWithImmediate {
        /// Address at the peer.
        va: u64,
        /// Key of the peer.
        rkey: u32,
        /// Immediate data.
        immediate: [u8; 4],
    },
    /// RDMA READ (RC).
    Read {
        /// Address at the peer.
        va: u64,
        /// Key of the peer.
        rkey: u32,
    },
    /// Atomic compare and swap of eight bytes (RC).
    CompareSwap {
        /// Address at the peer.
        va: u64,
        /// Key of the peer.
        rkey: u32,
        /// What must be found.
        compare: u64,
        /// What is stored then.
        swap: u64,
    },
    /// Atomic fetch and add of eight bytes (RC).
    FetchAdd {
        /// Address at the peer.
        va: u64,
        /// Key of the peer.
        rkey: u32,
        /// What is added.
        add: u64,
    },
    /// ATOMIC WRITE: exactly eight bytes, stored as one (RC, annex A19).
    AtomicWrite {
        /// Address at the peer, a multiple of eight.
        va: u64,
        /// Key of the peer.
        rkey: u32,
    },
    /// Invalidates a key of this side; nothing is sent.
    LocalInvalidate(u32),
    /// Binds a memory window (see [`Host::bind_window`](super::Host::bind_window)); nothing is sent.
    BindWindow(super::BindRequest),
}

impl SendOperation {
    /// How the operation is called in a completion.
    #[must_use]
    pub const fn completion_opcode(&self) -> CompletionOpcode {
        match self {
            Self::Send | Self::SendWithImmediate(_) | Self::SendWithInvalidate(_) => CompletionOpcode::Send,
            Self::Write { .. } | Self::WriteWithImmediate { .. } => CompletionOpcode::Write,
            Self::Read { .. } => CompletionOpcode::Read,
            Self::CompareSwap { .. } => CompletionOpcode::CompareSwap,
            Self::FetchAdd { .. } => CompletionOpcode::FetchAdd,
            Self::AtomicWrite { .. } => CompletionOpcode::AtomicWrite,
            Self::LocalInvalidate(_) => CompletionOpcode::LocalInvalidate,
            Self::BindWindow(_) => CompletionOpcode::BindWindow,
        }
    }

    /// Whether its elements say where bytes of the response go, not what is sent.
    pub(super) const fn fetches(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::CompareSwap { .. } | Self::FetchAdd { .. })
    }

    /// Whether nothing of it goes on the wire.
    pub(super) const fn is_local(&self) -> bool {
        matches!(self, Self::LocalInvalidate(_) | Self::BindWindow(_))
    }
}

bitflags! {
    /// Flags of a send request.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct SendFlags: u8 {
        /// Completes visibly also when successful.
        const SIGNALED = 1;
        /// Starts only when all earlier READs and atomics are complete (clause 10.8.3.3).
        const FENCE = 2;
        /// Raises a solicited event at the peer.
        const SOLICITED = 4;
    }
}

/// Where the bytes of a send request come from, or go to for READ and atomics.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// Registered memory, read when the packets are sent.
    Gather(&'a [Sge]),
    /// Bytes copied during the post, one piece after the other.
    Inline(&'a [&'a [u8]]),
}

/// Where a datagram goes: all that an address handle says, copied at the post.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Destination {
    /// GID of the peer, for the host alone.
    pub gid: [u8; 16],
    /// A value of the host's choice, for instance a resolved address or an index.
    pub tag: u64,
    /// Flow label, for the host alone.
    pub flow_label: u32,
    /// Traffic class, for the host alone.
    pub traffic_class: u8,
    /// Hop limit, for the host alone.
    pub hop_limit: u8,
    /// Service level, for the host alone.
    pub service_level: u8,
    /// Index of the source GID, for the host alone.
    pub sgid_index: u8,
    /// The address is of another protection domain than the queue pair: the request fails.
    pub is_foreign: bool,
    /// Queue pair of the peer.
    pub qp_num: Qpn,
    /// Queue key; if its highest bit is set the queue pair's own is sent instead (clause 10.2.5).
    pub qkey: u32,
}

/// A send request.
#[derive(Debug, Clone, Copy)]
pub struct SendRequest<'a> {
    /// Returned in the completion.
    pub wr_id: u64,
    /// What to do.
    pub operation: SendOperation,
    /// How to do it.
    pub flags: SendFlags,
    /// Local memory.
    pub data: Data<'a>,
    /// Where to (UD); ignored by the others.
    pub destination: Option<&'a Destination>,
}

/// Why a send request was not taken; nothing of it happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The queue pair is not in RTS, SQD, SQE or ERR.
    #[error("the queue pair does not take send requests in state {0:?}")]
    InvalidState(super::State),
    /// As many requests as the depth of the queue are outstanding.
    #[error("the send queue is full")]
    QueueFull,
    /// More elements than the queue was created for.
    #[error("too many scatter/gather elements")]
    TooManySges,
    /// More inline bytes than the queue was created for.
    #[error("too much inline data")]
    InlineTooLong,
    /// The transport has no such operation, or the operation no inline data.
    #[error("operation not supported by the transport")]
    InvalidOperation,
    /// UD without a destination.
    #[error("datagram without a destination")]
    NoDestination,
}

/// A receive that the host took from its receive queue and made the queue pair's current one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiveRequest {
    /// Returned in the completion.
    pub wr_id: u64,
    /// Sum of the lengths of its elements.
    pub length: u64,
}

/// Completion status (clause 11.6.2); the discriminants are those of `enum ibv_wc_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Success.
    Success = 0,
    /// Message too long for the port, or for the posted receive.
    LocalLength = 1,
    /// Inconsistency inside of the queue pair.
    LocalQpOperation = 2,
    /// A local key, range or right is wrong.
    LocalProtection = 4,
    /// Flushed because the queue pair failed before.
    WrFlush = 5,
    /// A memory window could not be bound, or a key not invalidated.
    MwBind = 6,
    /// The peer answered with a packet that does not fit the request.
    BadResponse = 7,
    /// The peer found the request malformed or unsupported, or too long for its receive.
    RemoteInvalidRequest = 9,
    /// The peer found a key, range or right wrong.
    RemoteAccess = 10,
    /// The peer failed on its own account.
    RemoteOperation = 11,
    /// The peer never answered.
    RetryExceeded = 12,
    /// The peer never had a receive posted.
    RnrRetryExceeded = 13,
}

/// What a completion reports; the discriminants are those of `enum ibv_wc_opcode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CompletionOpcode {
    /// SEND in any form.
    Send = 0,
    /// RDMA WRITE, with immediate data or not.
    Write = 1,
    /// RDMA READ.
    Read = 2,
    /// Compare and swap.
    CompareSwap = 3,
    /// Fetch and add.
    FetchAdd = 4,
    /// Bind of a memory window.
    BindWindow = 5,
    /// Invalidation of a local key.
    LocalInvalidate = 6,
    /// ATOMIC WRITE.
    AtomicWrite = 9,
    /// Receive of a SEND.
    Receive = 128,
    /// Receive consumed by an RDMA WRITE with immediate data.
    ReceiveWriteWithImmediate = 129,
}

/// Which completion queue a completion belongs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompletionKind {
    /// That of the send queue.
    Send,
    /// That of the receive queue.
    Receive,
}

/// What else came with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImmediateOrKey {
    /// Nothing.
    #[default]
    None,
    /// Immediate data, in the byte order of the wire.
    Immediate([u8; 4]),
    /// The key that was invalidated.
    InvalidatedKey(u32),
}

/// A completion. After an error only `kind`, `wr_id`, `status` and `opcode` mean anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Completion queue.
    pub kind: CompletionKind,
    /// Identifier of the work request.
    pub wr_id: u64,
    /// How it ended.
    pub status: Status,
    /// What it did.
    pub opcode: CompletionOpcode,
    /// Bytes received (UD: with the 40 of the global route header), read, or sent.
    pub byte_len: u32,
    /// What else came.
    pub immediate: ImmediateOrKey,
    /// Queue pair of the sender (UD).
    pub src_qp: Qpn,
    /// Whether a global route header stands in front of the data (UD).
    pub grh: bool,
    /// Whether the sender asked for a solicited event.
    pub solicited: bool,
}

/// The longest message that is sent, as on most adapters (`max_msg_sz` of the port).
pub const MAX_MESSAGE: u32 = 1 << 30;

/// The longest message that a peer may send: the longest there is.
pub(super) const MAX_WIRE_MESSAGE: u32 = 1 << 31;

/// A length that is known to be small, as the type in which messages are measured.
pub(super) fn len32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
