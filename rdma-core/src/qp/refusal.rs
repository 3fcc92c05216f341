//! Why a work request is not posted.

use std::fmt;

use super::request::Payload;
use crate::mr::{Buffer, RawBuffer};

/// Why a work request was not posted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostErrorKind {
    /// Back-pressure: the work queue is full, or the completion queue could overflow. Poll, then try
    /// again.
    #[error("the work queue or its completion queue is full: poll completions, then try again")]
    QueueFull,
    /// More scatter/gather entries than the queue pair was created for.
    #[error("{asked} scatter/gather entries, but the queue pair was created for {limit}")]
    TooManySegments {
        /// Entries of the request.
        asked: usize,
        /// Entries the queue takes.
        limit: u32,
    },
    /// More inline bytes than the queue pair was created for.
    #[error("{asked} bytes inline, but the queue pair was created for {limit}")]
    InlineTooLong {
        /// Bytes of the request.
        asked: usize,
        /// Bytes the queue takes.
        limit: u32,
    },
    /// The request reaches beyond the remote slice.
    #[error("{asked} bytes, but the remote slice has {limit}")]
    OutOfBounds {
        /// Bytes of the request.
        asked: u64,
        /// Bytes of the slice.
        limit: u64,
    },
    /// An atomic operation needs 8 bytes at a multiple of 8 there, and 8 bytes here.
    #[error(
        "atomic operations need a remote address that is a multiple of 8, 8 bytes there and 8 bytes here (IBTA vol. 1, 9.4.5)"
    )]
    BadAtomic,
    /// Bytes that are inline or immutable cannot be received into.
    #[error("this memory cannot be written to: receives, reads and atomics need buffers")]
    NotWritable,
    /// An object of another device or protection domain.
    #[error("{what} belongs to another protection domain than the queue pair")]
    WrongDomain {
        /// The object.
        what: &'static str,
    },
    /// The memory window went with the queue pair that it was bound on.
    #[error("the memory window went with the queue pair that it was bound on: allocate another")]
    WindowGone,
    /// The provider refused.
    #[error("{verb} failed with errno {errno}: {}", std::io::Error::from_raw_os_error(*.errno))]
    Verb {
        /// The verb.
        verb: &'static str,
        /// What it said.
        errno: i32,
    },
    /// The provider refused a chain, and did not say from which work request on. All of it counts as posted, because the device may have it,
    /// and what it has not never completes.
    #[error(
        "{verb} failed with errno {errno} ({}) and did not say at which work request: some of those it was given may never complete, until \
         the queue pair is flushed (QueuePair::abort) or goes",
        std::io::Error::from_raw_os_error(*.errno)
    )]
    Unclear {
        /// The verb.
        verb: &'static str,
        /// What it said.
        errno: i32,
    },
}

/// A work request was not posted; here it is again.
pub struct PostError<W> {
    /// Why not.
    pub kind: PostErrorKind,
    /// The request.
    pub request: W,
}

impl<W> fmt::Debug for PostError<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PostError").field(&self.kind).finish()
    }
}

impl<W> fmt::Display for PostError<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

impl<W> std::error::Error for PostError<W> {}

impl<W> From<PostError<W>> for crate::Error {
    fn from(error: PostError<W>) -> crate::Error {
        crate::Error::Post(error.kind)
    }
}

/// Why a request of one buffer was not posted: small, because the answer is returned on the fast path.
#[derive(Clone, Copy)]
pub(super) enum Refusal {
    Full,
    /// Not a case for the fast path; nothing was done.
    Busy,
    Errno(i32),
    /// An errno, but a completion came all the same and took the buffer.
    Lost(i32),
}

impl Refusal {
    /// A verb's refusal: a full queue is back-pressure, whatever errno the provider has for it.
    #[cold]
    pub(super) fn from_code(code: i32) -> Refusal {
        match crate::error::from_return(code).raw_os_error().unwrap_or(0) {
            libc::ENOMEM => Refusal::Full,
            errno => Refusal::Errno(errno),
        }
    }

    /// What the refused request held.
    ///
    /// # Safety
    ///
    /// `buffer` is what was refused with this, and is not used again.
    #[cold]
    pub(super) unsafe fn payload<'d>(&self, buffer: RawBuffer) -> Payload<'d> {
        match self {
            Refusal::Lost(_) => Payload::empty(),
            // SAFETY: the caller's promise.
            _ => Payload::from(unsafe { Buffer::from_raw(buffer) }),
        }
    }

    #[cold]
    pub(super) fn kind(self, verb: &'static str) -> PostErrorKind {
        match self {
            Refusal::Full | Refusal::Busy => PostErrorKind::QueueFull,
            Refusal::Errno(errno) | Refusal::Lost(errno) => PostErrorKind::Verb { verb, errno },
        }
    }
}

pub(super) fn refused(verb: &'static str, code: i32) -> PostErrorKind {
    Refusal::from_code(code).kind(verb)
}

/// Of a chain of `count`: how many the verb posted before the one that it refused, which is at `place` unless it did not say; and what that
/// means.
#[cold]
pub(super) fn refused_chain(
    verb: &'static str,
    code: i32,
    place: Option<usize>,
    count: usize,
) -> (usize, PostErrorKind) {
    match place {
        Some(place) => (place, refused(verb, code)),
        // Which one else?
        None if count == 1 => (0, refused(verb, code)),
        None => {
            let errno = crate::error::from_return(code).raw_os_error().unwrap_or(0);
            (count, PostErrorKind::Unclear { verb, errno })
        }
    }
}
