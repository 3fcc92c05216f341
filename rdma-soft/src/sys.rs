//! What `socket2` has no safe call for: a handful of socket options and a view of bytes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_void, socklen_t};

/// `UDP_GRO` of `linux/udp.h`, as a socket option and as a control message.
pub(crate) const UDP_GRO: c_int = libc::UDP_GRO;
/// `UDP_SEGMENT` of `linux/udp.h`, as a control message.
pub(crate) const UDP_SEGMENT: c_int = libc::UDP_SEGMENT;

/// Sets an option whose value is an `int`.
pub(crate) fn set_option(socket: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let length = socklen_t::try_from(size_of::<c_int>()).unwrap_or(4);
    // SAFETY: the descriptor is borrowed, hence open; the pointer and the length describe `value`,
    // which lives through the call.
    let rc = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast::<c_void>(), length)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Initialised bytes as the kind of buffer that `socket2` receives into.
///
/// Only for buffers that are passed to a receive call: `socket2` promises to write initialised
/// bytes only, so that the bytes stay initialised.
pub(crate) fn receive_view(bytes: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: the same memory, length and lifetime; the layouts are equal. Nobody writes
    // uninitialised bytes: the callers, in `net`, give the view to `socket2` only.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<MaybeUninit<u8>>(), bytes.len()) }
}

/// Keeps the application's signal handlers off the calling thread.
pub(crate) fn block_signals() {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is valid for writes.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: initialised by `sigfillset`, which has no way to fail on a valid pointer; the old mask is
    // not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut()) };
}
