//! The socket: segmented sends, coalesced receives.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, MaybeUninitSlice, MsgHdr, MsgHdrMut, Protocol, SockAddr, Type};

use crate::sys;

/// The most bytes one segmented send may carry: the payload of the largest IPv4 datagram.
pub(crate) const MAX_BATCH_LEN: usize = 65507;
/// The most segments of one send (`UDP_MAX_SEGMENTS` of every kernel that has GSO).
pub(crate) const MAX_SEGMENTS: usize = 64;
/// What one receive call may yield.
const RECEIVE_LEN: usize = 65536;
/// Where it is put: behind headers of 12 or 28 bytes, payload is then aligned as memory is.
const RECEIVE_START: usize = 4;
/// The receive buffer asked for, in bytes. The kernel counts its own overhead against it, about as
/// much again for full packets and ten times that for short ones.
const SOCKET_BUFFER: usize = 8 << 20;
/// Room for the control messages that are turned on: segment size and type of service.
const CONTROL_LEN: usize = 128;
/// A control message's header: `cmsghdr`.
const CMSG_HEADER: usize = size_of::<usize>() + 2 * size_of::<i32>();

/// Why datagrams did not leave.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The socket's or the device's queue is full; the same call may succeed later.
    Full,
    /// This kernel or interface cannot segment; the caller sends one by one from now on.
    NoSegmentation,
    /// The kernel refused the destination or the size.
    Refused(io::Error),
}

/// An unconnected UDP socket that never fragments.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: socket2::Socket,
    /// Whether IPv6 type-of-service messages are to be used.
    is_ipv6: bool,
    segmentation: AtomicBool,
}

impl Socket {
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Socket> {
        let is_ipv6 = address.is_ipv6();
        let inner = socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        inner.set_nonblocking(true)?;
        let fd = inner.as_fd();
        if is_ipv6 {
            inner.set_only_v6(true)?;
        }
        never_fragment(&inner, is_ipv6)?;
        // Older kernels have no GRO: then each datagram comes alone, which is only slower.
        let _ = sys::set_option(fd, libc::SOL_UDP, sys::UDP_GRO, 1);
        let buffer = i32::try_from(SOCKET_BUFFER).unwrap_or(i32::MAX);
        // The privileged option first; the plain one is capped by net.core.rmem_max.
        if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, buffer).is_err() {
            inner.set_recv_buffer_size(SOCKET_BUFFER)?;
        }
        enlarge_send_buffer(&inner)?;
        inner.bind(&address.into())?;
        Ok(Socket { inner, is_ipv6, segmentation: AtomicBool::new(true) })
    }

    /// Asks for the traffic class of each datagram. Without, none is reported, and receiving is cheaper.
    pub(crate) fn report_traffic_class(&self) -> io::Result<()> {
        let (level, option) = if self.is_ipv6 {
            (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_RECVTOS)
        };
        sys::set_option(self.inner.as_fd(), level, option, 1)
    }

    /// Whether several segments may be given to [`send`](Self::send).
    pub(crate) fn segmentation(&self) -> bool {
        self.segmentation.load(Ordering::Relaxed)
    }

    /// Sends every datagram alone from now on.
    pub(crate) fn disable_segmentation(&self) {
        self.segmentation.store(false, Ordering::Relaxed);
    }

    /// Sends `bytes` as datagrams of `segment` bytes each, the last one as long as what is left.
    /// `traffic_class` goes into the IP header, ECN bits included.
    pub(crate) fn send(
        &self,
        to: &SockAddr,
        bytes: &[u8],
        segment: usize,
        traffic_class: u8,
    ) -> Result<(), SendError> {
        let segmented = bytes.len() > segment;
        if !segmented && traffic_class == 0 {
            // The common short message: the cheapest call there is.
            return outcome(self.inner.send_to(bytes, to), false);
        }
        let size = segmented.then(|| u16::try_from(segment).unwrap_or(u16::MAX));
        let class = (traffic_class != 0).then(|| (traffic_class_option(self.is_ipv6), traffic_class));
        outcome(send_message(&self.inner, Some(to), bytes, size, class), segmented)
    }

    /// Receives what one call yields: one datagram, or several of one sender and one size.
    /// `None` when nothing is there.
    pub(crate) fn receive<'b>(&self, buffer: &'b mut ReceiveBuffer) -> io::Result<Option<Datagrams<'b>>> {
        let ReceiveBuffer { bytes, control, source } = buffer;
        let bytes = &mut bytes[RECEIVE_START..];
        let mut slices = [MaybeUninitSlice::new(sys::receive_view(bytes))];
        let mut message = MsgHdrMut::new()
            .with_addr(source)
            .with_buffers(&mut slices)
            .with_control(sys::receive_view(control));
        let length = match self.inner.recvmsg(&mut message, 0) {
            Ok(length) => length,
            Err(e) => {
                return match e.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                    // An ICMP error of an earlier send, delivered here; nothing was received.
                    Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH) => Ok(None),
                    _ => Err(e),
                };
            }
        };
        let (control_len, truncated) = (message.control_len(), message.flags().is_truncated());
        let (mut segment, mut traffic_class) = (length, 0);
        for (level, kind, data) in ControlMessages(&control[..control_len.min(CONTROL_LEN)]) {
            match (level, kind) {
                (libc::SOL_UDP, sys::UDP_GRO) => segment = read_int(data).unwrap_or(length),
                (libc::IPPROTO_IP, libc::IP_TOS) => traffic_class = data.first().copied().unwrap_or(0),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    traffic_class = read_int(data).and_then(|v| u8::try_from(v).ok()).unwrap_or(0);
                }
                _ => {}
            }
        }
        let Some(source) = source.as_socket() else { return Ok(None) };
        Ok(Some(Datagrams {
            source,
            bytes: if truncated { &[] } else { &bytes[..length] },
            segment: segment.max(1),
            traffic_class,
        }))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// Where one receive call puts what it gets; reused from call to call.
#[derive(Debug)]
pub(crate) struct ReceiveBuffer {
    bytes: Box<[u8]>,
    control: [u8; CONTROL_LEN],
    source: SockAddr,
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        ReceiveBuffer {
            bytes: vec![0; RECEIVE_START + RECEIVE_LEN].into_boxed_slice(),
            control: [0; CONTROL_LEN],
            // An IPv6 address has room for an IPv4 one.
            source: SocketAddr::from(([0u16; 8], 0)).into(),
        }
    }
}

/// Datagrams of one sender.
#[derive(Debug)]
pub(crate) struct Datagrams<'b> {
    pub(crate) source: SocketAddr,
    pub(crate) traffic_class: u8,
    bytes: &'b [u8],
    segment: usize,
}

impl<'b> Datagrams<'b> {
    /// Bytes of all datagrams.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Each datagram.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'b [u8]> + use<'b> {
        self.bytes.chunks(self.segment)
    }
}

/// With the don't-fragment bit the kernel puts 0 into the IPv4 identification, which the ICRC covers; PROBE
/// because the path MTU is the queue pair's business.
pub(super) fn never_fragment(socket: &socket2::Socket, is_ipv6: bool) -> io::Result<()> {
    let (level, name, value) = if is_ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    };
    sys::set_option(socket.as_fd(), level, name, value)
}

/// Room for as much as the receiver's: the privileged option first, the plain one is capped by
/// net.core.wmem_max.
pub(super) fn enlarge_send_buffer(socket: &socket2::Socket) -> io::Result<()> {
    let buffer = i32::try_from(SOCKET_BUFFER).unwrap_or(i32::MAX);
    if sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, buffer).is_err() {
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
    }
    Ok(())
}

/// Level and name of the traffic class, as a socket option and as a control message.
pub(super) fn traffic_class_option(is_ipv6: bool) -> (i32, i32) {
    if is_ipv6 { (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) } else { (libc::IPPROTO_IP, libc::IP_TOS) }
}

/// Sends with control messages: the segment size, where 0 is none whatever the socket's own is, and the
/// traffic class.
pub(super) fn send_message(
    socket: &socket2::Socket,
    to: Option<&SockAddr>,
    bytes: &[u8],
    segment: Option<u16>,
    traffic_class: Option<((i32, i32), u8)>,
) -> io::Result<usize> {
    let mut control = Control::new();
    if let Some(size) = segment {
        control.push(libc::SOL_UDP, sys::UDP_SEGMENT, &size.to_ne_bytes());
    }
    if let Some(((level, kind), class)) = traffic_class {
        control.push(level, kind, &i32::from(class).to_ne_bytes());
    }
    let buffers = [IoSlice::new(bytes)];
    let mut message = MsgHdr::new().with_buffers(&buffers).with_control(control.as_bytes());
    if let Some(to) = to {
        message = message.with_addr(to);
    }
    socket.sendmsg(&message, 0)
}

/// What the result of sending means.
pub(super) fn outcome(result: io::Result<usize>, segmented: bool) -> Result<(), SendError> {
    let Err(e) = result else { return Ok(()) };
    Err(match e.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => SendError::Full,
        // What kernels and drivers answer that cannot segment or checksum.
        Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::EMSGSIZE) if segmented => {
            SendError::NoSegmentation
        }
        _ => SendError::Refused(e),
    })
}

fn read_int(data: &[u8]) -> Option<usize> {
    let value = i32::from_ne_bytes(*data.first_chunk()?);
    usize::try_from(value).ok()
}

/// Control messages to send, as `cmsg(3)` lays them out.
struct Control {
    bytes: [u8; 64],
    len: usize,
}

impl Control {
    fn new() -> Self {
        Control { bytes: [0; 64], len: 0 }
    }

    fn push(&mut self, level: i32, kind: i32, data: &[u8]) {
        let message = &mut self.bytes[self.len..];
        let length = CMSG_HEADER + data.len();
        let word = size_of::<usize>();
        message[..word].copy_from_slice(&length.to_ne_bytes());
        message[word..word + 4].copy_from_slice(&level.to_ne_bytes());
        message[word + 4..CMSG_HEADER].copy_from_slice(&kind.to_ne_bytes());
        message[CMSG_HEADER..length].copy_from_slice(data);
        self.len += length.next_multiple_of(word);
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Control messages that were received: level, type, data.
struct ControlMessages<'c>(&'c [u8]);

impl<'c> Iterator for ControlMessages<'c> {
    type Item = (i32, i32, &'c [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let word = size_of::<usize>();
        let length = usize::from_ne_bytes(*self.0.first_chunk()?);
        let level = i32::from_ne_bytes(*self.0.get(word..)?.first_chunk()?);
        let kind = i32::from_ne_bytes(*self.0.get(word + 4..)?.first_chunk()?);
        let data = self.0.get(CMSG_HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(word)..).unwrap_or(&[]);
        Some((level, kind, data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Socket, Socket, SockAddr) {
        let a = Socket::bind("127.78.0.1:0".parse().unwrap()).unwrap();
        let b = Socket::bind("127.78.0.2:0".parse().unwrap()).unwrap();
        let to = b.inner.local_addr().unwrap();
        (a, b, to)
    }

    fn receive_all(socket: &Socket, expected: usize) -> Vec<Vec<u8>> {
        let (mut buffer, mut got) = (ReceiveBuffer::default(), Vec::new());
        for _ in 0..1000 {
            if let Some(datagrams) = socket.receive(&mut buffer).unwrap() {
                got.extend(datagrams.iter().map(<[u8]>::to_vec));
            }
            if got.len() >= expected {
                break;
            }
        }
        got
    }

    #[test]
    fn segments_arrive_as_they_were_cut() {
        let (a, b, to) = pair();
        let bytes: Vec<u8> = (0..250).collect();
        a.send(&to, &bytes, 100, 0).unwrap();
        assert_eq!(receive_all(&b, 3), [&bytes[..100], &bytes[100..200], &bytes[200..]]);
        a.send(&to, &bytes, bytes.len(), 0).unwrap();
        assert_eq!(receive_all(&b, 1), [&bytes[..]]);
    }

    #[test]
    fn the_traffic_class_travels() {
        let (a, b, to) = pair();
        b.report_traffic_class().unwrap();
        a.send(&to, &[1, 2, 3], 3, 0x03).unwrap();
        let mut buffer = ReceiveBuffer::default();
        let datagrams = b.receive(&mut buffer).unwrap().unwrap();
        assert_eq!(datagrams.traffic_class, 3);
        assert_eq!(datagrams.source, a.inner.local_addr().unwrap().as_socket().unwrap());
    }

    #[test]
    fn the_largest_batch_leaves_in_one_call() {
        let (a, b, to) = pair();
        let bytes = vec![7; 15 * 4128];
        assert!(bytes.len() < MAX_BATCH_LEN);
        a.send(&to, &bytes, 4128, 0).unwrap();
        assert_eq!(receive_all(&b, 15).len(), 15);
    }

    #[test]
    fn nothing_there_is_not_an_error() {
        let (_, b, _) = pair();
        assert!(b.receive(&mut ReceiveBuffer::default()).unwrap().is_none());
    }
}
