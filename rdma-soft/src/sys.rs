//! What other crates have no safe call for, or a slower one.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_long, c_void, socklen_t};
use socket2::SockAddr;

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

/// `sendto(2)`.
///
/// Not by the C library's function of that name, which is a point where threads can be cancelled: in a program of several
/// threads that costs two atomic operations, and a cancelled thread would leave locks behind.
pub(crate) fn send_to(socket: BorrowedFd<'_>, bytes: &[u8], to: &SockAddr) -> io::Result<usize> {
    let (fd, flags) = (c_long::from(socket.as_raw_fd()), c_long::from(0));
    // SAFETY: bytes and address are valid for reads of their lengths through the call, which writes nothing.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_sendto,
            fd,
            bytes.as_ptr(),
            bytes.len(),
            flags,
            to.as_ptr(),
            to.len() as usize,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// What [`receive_message`] got.
pub(crate) struct Received {
    pub(crate) len: usize,
    pub(crate) control_len: usize,
    pub(crate) truncated: bool,
}

/// `recvmsg(2)`, called as [`send_to`] is. The sender's address goes to `name`, as the kernel lays it out.
#[allow(clippy::unnecessary_cast, reason = "the type of the length differs between C libraries")]
pub(crate) fn receive_message(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    name: &mut [u8; size_of::<libc::sockaddr_in6>()],
    control: &mut [u8],
) -> io::Result<Received> {
    let mut buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let message = MaybeUninit::<libc::msghdr>::zeroed();
    // SAFETY: numbers and pointers, for which zeroes are values. (Some C libraries have padding between them.)
    let mut message = unsafe { message.assume_init() };
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = socklen_t::try_from(name.len()).unwrap_or(0);
    message.msg_iov = &raw mut buffer;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len() as _;
    let (fd, flags) = (c_long::from(socket.as_raw_fd()), c_long::from(0));
    // SAFETY: the message describes memory that is borrowed for writing through the call, with its lengths.
    let received = unsafe { libc::syscall(libc::SYS_recvmsg, fd, &raw mut message, flags) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let truncated = message.msg_flags & libc::MSG_TRUNC != 0;
    Ok(Received { len, control_len: message.msg_controllen as usize, truncated })
}

/// Has a function called when the process ends in an orderly way (`man 3 atexit`); where there is no memory to note it, it is not.
pub(crate) fn at_exit(function: extern "C" fn()) {
    // SAFETY: a function that lives as long as the program, or as long as this library, with which the C library forgets it.
    let _ = unsafe { libc::atexit(function) };
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

/// Asks for turns of so many nanoseconds on the processor, where the calling thread is scheduled as any other: shorter turns
/// come sooner. Kernels before 6.12 know no such wish.
pub(crate) fn short_turns(nanoseconds: u64) {
    /// `SCHED_ATTR_SIZE_VER0` of `linux/sched/types.h`: up to the period.
    const SIZE: u32 = 48;
    let mut attr = MaybeUninit::<libc::sched_attr>::zeroed();
    // SAFETY: the structure is valid for writes and at least of this size.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), SIZE, 0) };
    // SAFETY: plain numbers, for which zeroes are values as well.
    let mut attr = unsafe { attr.assume_init() };
    if rc == 0 && attr.sched_policy == libc::SCHED_OTHER.cast_unsigned() {
        attr.size = SIZE;
        attr.sched_runtime = nanoseconds;
        // A refusal leaves things as they were.
        // SAFETY: the structure is valid for reads, and says its size.
        let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    }
}

/// Whether `len` bytes from `address` on are mapped, and their ends readable, or writable if `write`. The
/// errno says why not: hardware finds the same when it pins the pages.
pub(crate) fn check_mapped(address: usize, len: usize, write: bool) -> Result<(), c_int> {
    /// Pages looked at by one call.
    const CHUNK: usize = 1 << 12;
    if len == 0 {
        return Ok(());
    }
    let page = rustix::param::page_size();
    let first = address & !(page - 1);
    let end = address.saturating_add(len);
    let mut residency = [0u8; CHUNK];
    let mut at = first;
    while at < end {
        let here = (end - at).min(CHUNK * page);
        // SAFETY: the call only looks at page tables; the vector has a byte for each page asked for.
        let rc = unsafe {
            libc::mincore(std::ptr::without_provenance_mut(at), here, residency.as_mut_ptr().cast())
        };
        if rc != 0 {
            return Err(libc::EFAULT);
        }
        at += here;
    }
    // The rights are those of a mapping, and a region rarely spans two: its ends tell.
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let populate = |place: usize, len: usize| {
        // SAFETY: faults the page in as an access would; contents and mappings stay as they are.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(place), len, advice) == 0 }
    };
    for place in [first, (end - 1) & !(page - 1)] {
        // Kernels before 5.14 refuse the advice for no bytes as well; then an access finds out.
        if !populate(place, page) && populate(place, 0) {
            return Err(libc::EFAULT);
        }
    }
    Ok(())
}

/// Copies from memory of this process that may not be there; false if some of it is not.
pub(crate) fn copy_from(address: usize, out: &mut [u8]) -> bool {
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: out.len() };
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let this = std::process::id().cast_signed();
    // SAFETY: writes to `out` only, within its length; the kernel checks the other range.
    let n = unsafe { libc::process_vm_readv(this, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(n) == Ok(out.len())
}

/// Copies to memory of this process that may not be there; false if some of it is not, or not writable.
pub(crate) fn copy_to(address: usize, bytes: &[u8]) -> bool {
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: bytes.len() };
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let this = std::process::id().cast_signed();
    // SAFETY: reads `bytes` only, and writes where the program registered memory for the device to write;
    // the kernel checks that range.
    let n = unsafe { libc::process_vm_writev(this, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(n) == Ok(bytes.len())
}
