//! What a queue pair needs of its device.

use super::{Completion, Counter, Event, ReceiveRequest, Sge};

/// A local key, range or right is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalError;

/// A remote key, range or right is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteError;

/// Right that a remote access needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemoteAccess {
    /// RDMA READ.
    Read,
    /// RDMA WRITE.
    Write,
    /// Atomic operation.
    Atomic,
}

/// An atomic operation on eight bytes. Values are in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtomicOp {
    /// Stores `swap` if `compare` is found.
    CompareSwap {
        /// What must be found.
        compare: u64,
        /// What is stored then.
        swap: u64,
    },
    /// Adds, with wrap-around.
    FetchAdd {
        /// What is added.
        add: u64,
    },
    /// Stores, as ATOMIC WRITE does.
    Store {
        /// What is stored.
        value: u64,
    },
}

impl AtomicOp {
    /// The right that the operation needs. ATOMIC WRITE is a write (annex A19).
    #[must_use]
    pub const fn access(&self) -> RemoteAccess {
        match self {
            Self::CompareSwap { .. } | Self::FetchAdd { .. } => RemoteAccess::Atomic,
            Self::Store { .. } => RemoteAccess::Write,
        }
    }
}

/// A bind of a memory window as the send queue carries it; only the host reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindRequest {
    /// A value of the host's choice that identifies the window.
    pub window: u32,
    /// Key that the window gets.
    pub rkey: u32,
    /// Local key of the memory region.
    pub lkey: u32,
    /// Access flags, as the host encodes them.
    pub access: u32,
    /// First address.
    pub addr: u64,
    /// Length in bytes; zero unbinds.
    pub length: u64,
}

/// The device as one queue pair sees it: memory, receive queue, completion queues, events and counters.
///
/// One value stands for one queue pair for the duration of a call, so every check that concerns the
/// protection domain or the queue pair is the implementation's. Calls are generic, never `dyn`.
pub trait Host {
    /// Copies the bytes of a local gather list from `offset` on into `out`, all of `out` or nothing.
    fn gather(&mut self, sges: &[Sge], offset: u32, out: &mut [u8]) -> Result<(), LocalError>;

    /// Copies `data` into a local scatter list from `offset` on (READ and atomic responses; needs local write).
    fn scatter(&mut self, sges: &[Sge], offset: u32, data: &[u8]) -> Result<(), LocalError>;

    /// Takes the next receive from the receive queue or the shared receive queue and keeps it as the current
    /// one of this queue pair until [`complete`](Self::complete) is called for it or the queue pair is brought to
    /// RESET, which forgets it. `None` if none is posted.
    fn next_receive(&mut self) -> Option<ReceiveRequest>;

    /// Copies `data` into the current receive from `offset` on. The caller has checked the length.
    fn scatter_receive(&mut self, offset: u32, data: &[u8]) -> Result<(), LocalError>;

    /// Completes every receive that is still posted with [`WrFlush`](super::Status::WrFlush); with a shared receive
    /// queue raises the last-WQE-reached event instead. Called once when the queue pair enters ERR, after the
    /// current receive was completed.
    fn flush_receives(&mut self);

    /// Whether the peer may access `length` bytes from `va` on. Never called with a length of zero.
    fn check_remote(
        &mut self,
        rkey: u32,
        va: u64,
        length: u32,
        access: RemoteAccess,
    ) -> Result<(), RemoteError>;

    /// Writes memory that the peer named. Checks again, for the key may be gone since the message began.
    fn write_remote(&mut self, rkey: u32, va: u64, data: &[u8]) -> Result<(), RemoteError>;

    /// Reads memory that the peer named. Checks again.
    fn read_remote(&mut self, rkey: u32, va: u64, out: &mut [u8]) -> Result<(), RemoteError>;

    /// Executes an atomic operation and returns what was there before. `va` is a multiple of eight. Checks all.
    fn atomic(&mut self, rkey: u32, va: u64, op: AtomicOp) -> Result<u64, RemoteError>;

    /// Invalidates a key because the peer asked for it (SEND with invalidate).
    fn invalidate_remote(&mut self, rkey: u32) -> Result<(), RemoteError>;

    /// Invalidates a key because the send queue asks for it.
    fn invalidate_local(&mut self, key: u32) -> Result<(), LocalError>;

    /// Binds a memory window because the send queue asks for it.
    fn bind_window(&mut self, request: &BindRequest) -> Result<(), LocalError>;

    /// Puts a completion on a completion queue.
    fn complete(&mut self, completion: Completion);

    /// How many completions of sends wait to be polled: a request keeps its place in the send queue until then.
    fn unpolled_sends(&self) -> u32 {
        0
    }

    /// Raises an asynchronous event.
    fn event(&mut self, event: Event);

    /// Counts.
    fn count(&mut self, counter: Counter) {
        self.add(counter, 1);
    }

    /// Counts `n` at once.
    fn add(&mut self, counter: Counter, n: u64);
}
