//! The crate's error: which verb, what it said, what to look at.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Everything that can go wrong outside of posting and of completions, which have errors of their
/// own ([`PostError`](crate::PostError), [`CompletionError`](crate::CompletionError),
/// [`TransitionError`](crate::TransitionError)).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system has no usable libibverbs.
    #[error(transparent)]
    LibraryNotFound(#[from] verbs_sys::LoadError),
    /// No device has this name.
    #[error("there is no RDMA device named {name:?}; {}", list(.available))]
    UnknownDevice {
        /// The name asked for.
        name: String,
        /// The names that exist.
        available: Vec<String>,
    },
    /// There is no device at all, or none that would do.
    #[error("no usable RDMA device: {reason}")]
    NoDevice {
        /// What was looked at and why it would not do.
        reason: String,
    },
    /// A verb failed.
    #[error("{verb} failed: {source}{advice}")]
    Verb {
        /// The verb's name, as in its manual page.
        verb: &'static str,
        /// The errno it gave.
        source: io::Error,
        /// What it probably means and what to look at; starts with "; " unless it is empty.
        advice: String,
    },
    /// The provider has no such verb, or the library is too old for it.
    #[error("the provider does not support {verb}")]
    Unsupported {
        /// The verb or feature.
        verb: &'static str,
    },
    /// Something still uses the object.
    #[error("still in use: {what}")]
    InUse {
        /// Who uses it.
        what: &'static str,
    },
    /// A range outside of the memory.
    #[error("{len} bytes at offset {offset} are outside of the {of} bytes there are")]
    OutOfBounds {
        /// Where the range starts.
        offset: usize,
        /// Its length.
        len: usize,
        /// The size of what it should lie in.
        of: usize,
    },
    /// An address that must be a multiple of 8.
    #[error("{address:#x} is not a multiple of 8, as atomic operations need (IBTA vol. 1, 9.4.5)")]
    Misaligned {
        /// The address or offset.
        address: u64,
    },
    /// An argument that no device accepts.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it, and what would be right.
        what: String,
    },
    /// Nothing happened in the time given.
    #[error("{what} did not happen within {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: std::time::Duration,
    },
    /// A poll of a completion queue failed: no completion was read.
    #[error(transparent)]
    Poll(#[from] crate::PollError),
    /// A work request could not be posted.
    #[error("{0}")]
    Post(crate::PostErrorKind),
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "there are no devices".to_owned()
    } else {
        format!("there are: {}", names.join(", "))
    }
}

impl Error {
    /// A verb's failure, with advice that depends on verb and errno.
    pub(crate) fn verb(verb: &'static str, source: io::Error) -> Error {
        let code = source.raw_os_error().unwrap_or(0);
        if code == libc::EOPNOTSUPP || code == libc::ENOSYS {
            return Error::Unsupported { verb };
        }
        let mut advice = advice(verb, code);
        if !advice.is_empty() {
            advice.insert_str(0, "; ");
        }
        Error::Verb { verb, source, advice }
    }

    /// The last OS error as this verb's.
    pub(crate) fn last(verb: &'static str) -> Error {
        Error::verb(verb, io::Error::last_os_error())
    }

    /// A verb's return value as a result.
    pub(crate) fn check(verb: &'static str, code: i32) -> Result<(), Error> {
        if code == 0 { Ok(()) } else { Err(Error::verb(verb, from_return(code))) }
    }

    /// The errno behind the error, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Verb { source, .. } => source.raw_os_error(),
            Error::Unsupported { .. } => Some(libc::EOPNOTSUPP),
            _ => None,
        }
    }
}

/// The error behind a verb's return value: an errno, or -1 with `errno` set, or -errno.
pub(crate) fn from_return(code: i32) -> io::Error {
    match code {
        -1 => io::Error::last_os_error(),
        code => io::Error::from_raw_os_error(code.saturating_abs()),
    }
}

/// What a verb's errno probably means, and what to look at.
fn advice(verb: &str, code: i32) -> String {
    match (verb, code) {
        ("ibv_reg_mr" | "ibv_rereg_mr" | "ibv_reg_mr_iova2", libc::ENOMEM | libc::EAGAIN) => memlock(),
        ("ibv_create_qp" | "ibv_create_cq" | "ibv_create_srq" | "ibv_open_device", libc::ENOMEM) => {
            format!("the queues ask for more entries than the device has, or {}", memlock())
        }
        ("ibv_reg_mr", libc::EINVAL) => {
            "the length is 0, or the access flags contradict each other (remote write and atomics need local write)"
                .to_owned()
        }
        ("ibv_reg_mr", libc::EFAULT) => "part of the address range is not mapped".to_owned(),
        ("ibv_create_qp", libc::EINVAL) => {
            "a capability is above the device's limit: compare the queue depths and SGE counts with max_qp_wr and max_sge"
                .to_owned()
        }
        ("ibv_create_cq", libc::EINVAL) => {
            "the depth is 0 or above max_cqe, or the completion vector does not exist".to_owned()
        }
        ("ibv_open_device", libc::EACCES | libc::EPERM) => {
            "no permission to open /dev/infiniband/uverbs*".to_owned()
        }
        ("ibv_create_srq", libc::EINVAL) => {
            "the depth is 0 or above max_srq_wr, or there are more scatter/gather entries than max_srq_sge".to_owned()
        }
        ("ibv_modify_srq", libc::EINVAL) => "the limit is above the queue's depth".to_owned(),
        ("ibv_query_port", libc::EINVAL) => {
            "there is no such port: they are counted from 1 to DeviceAttributes::ports".to_owned()
        }
        ("ibv_query_gid" | "ibv_query_pkey", libc::EINVAL) => {
            "there is no such port, or its table is shorter than the index: compare with PortAttributes::gid_table_len and pkey_table_len"
                .to_owned()
        }
        (_, libc::EBUSY) => "something still uses the object".to_owned(),
        _ => String::new(),
    }
}

/// The limit on pinned memory in words.
fn memlock() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return "the limit on pinned memory (RLIMIT_MEMLOCK) may be too low".to_owned();
    }
    let mut text = String::from("the memory may exceed the limit on pinned memory: RLIMIT_MEMLOCK is ");
    if limit.rlim_cur == libc::RLIM_INFINITY {
        text.push_str("unlimited, so look at free memory and at the device's max_mr_size");
    } else {
        let _ = write!(
            text,
            "{} KiB; raise it with `ulimit -l`, in /etc/security/limits.conf or with LimitMEMLOCK= of systemd",
            limit.rlim_cur / 1024
        );
    }
    text
}

static LEAKS: AtomicU64 = AtomicU64::new(0);

/// Objects leaked in this process because the provider refused to destroy or deregister them: what
/// the device may still touch is never freed.
#[must_use]
pub fn leaks() -> u64 {
    LEAKS.load(Ordering::Relaxed)
}

/// Says that something is leaked.
pub(crate) fn leak(error: &Error) {
    LEAKS.fetch_add(1, Ordering::Relaxed);
    tracing::error!(%error, "leaked, because the device may still use it");
}
