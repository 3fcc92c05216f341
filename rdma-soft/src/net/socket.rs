//! The socket: segmented sends, coalesced receives.

use std::io::{self, IoSlice};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};

use socket2::{Domain, MsgHdr, Protocol, SockAddr, Type};

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

impl SendError {
    /// `segmented`: of a call with several segments.
    #[cold]
    fn new(e: io::Error, segmented: bool) -> Self {
        match e.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => SendError::Full,
            // What kernels and drivers answer that cannot segment or checksum.
            Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::EMSGSIZE) if segmented => {
                SendError::NoSegmentation
            }
            _ => SendError::Refused(e),
        }
    }
}

/// An unconnected UDP socket that never fragments.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: socket2::Socket,
    /// Whether IPv6 type-of-service messages are to be used.
    is_ipv6: bool,
    segmentation: AtomicBool,
    segment: Mutex<Segment>,
}

/// The segment size that the socket itself has, and the one that was asked for last; zero is none.
#[derive(Debug, Default)]
struct Segment {
    set: u16,
    asked: u16,
}

impl Socket {
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Socket> {
        let is_ipv6 = address.is_ipv6();
        let inner = socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        inner.set_nonblocking(true)?;
        let fd = inner.as_fd();
        // With the don't-fragment bit the kernel puts 0 into the IPv4 identification, which the ICRC
        // covers; PROBE because the path MTU is the queue pair's business.
        if is_ipv6 {
            inner.set_only_v6(true)?;
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        } else {
            sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        }
        // Older kernels have no GRO: then each datagram comes alone, which is only slower.
        let _ = sys::set_option(fd, libc::SOL_UDP, sys::UDP_GRO, 1);
        let buffer = i32::try_from(SOCKET_BUFFER).unwrap_or(i32::MAX);
        // The privileged option first; the plain one is capped by net.core.rmem_max.
        if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, buffer).is_err() {
            inner.set_recv_buffer_size(SOCKET_BUFFER)?;
        }
        if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, buffer).is_err() {
            inner.set_send_buffer_size(SOCKET_BUFFER)?;
        }
        inner.bind(&address.into())?;
        Ok(Socket { inner, is_ipv6, segmentation: AtomicBool::new(true), segment: Mutex::default() })
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

    /// What the receive buffer holds, in bytes as the kernel counts them.
    pub(crate) fn receive_buffer(&self) -> usize {
        self.inner.recv_buffer_size().unwrap_or(SOCKET_BUFFER)
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
    ///
    /// The socket stays unconnected though a connected one is cheaper: with an unconnected one the IPv4
    /// identification, which the ICRC covers, is 0, and the number of the segment in a segmented send. A
    /// connected one counts up from a secret.
    #[inline(always)]
    pub(crate) fn send(
        &self,
        to: &SockAddr,
        bytes: &[u8],
        segment: usize,
        traffic_class: u8,
    ) -> Result<(), SendError> {
        // Zero is none.
        let size = if bytes.len() > segment { u16::try_from(segment).unwrap_or(u16::MAX) } else { 0 };
        let result = match self.send_plain(to, bytes, size, traffic_class) {
            Some(result) => result,
            None => self.send_message(to, bytes, size, traffic_class),
        };
        match result {
            Ok(_) => Ok(()),
            Err(e) => Err(SendError::new(e, size != 0)),
        }
    }

    /// The cheapest call there is, if the socket's own segment size fits; a size that is asked for twice in a
    /// row becomes the socket's.
    ///
    /// Who sends at the same moment says the size with the call and disturbs nobody. The lock is held through
    /// the call, for what the socket has must not change meanwhile; uncontended it costs a tenth of what it
    /// saves.
    #[inline(always)]
    fn send_plain(
        &self,
        to: &SockAddr,
        bytes: &[u8],
        size: u16,
        traffic_class: u8,
    ) -> Option<io::Result<usize>> {
        if traffic_class != 0 {
            return None;
        }
        let mut own = match self.segment.try_lock() {
            Ok(own) => own,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let asked = std::mem::replace(&mut own.asked, size);
        if size != 0 && size != own.set && size == asked {
            self.set_segment(&mut own, size);
        }
        let fits = match size {
            0 => own.set == 0 || bytes.len() <= usize::from(own.set),
            size => size == own.set,
        };
        fits.then(|| sys::send_to(self.inner.as_fd(), bytes, to))
    }

    /// Where it fails, so does the message that says the size itself.
    #[cold]
    fn set_segment(&self, own: &mut Segment, size: u16) {
        if sys::set_option(self.inner.as_fd(), libc::SOL_UDP, sys::UDP_SEGMENT, i32::from(size)).is_ok() {
            own.set = size;
        }
    }

    /// Says segment size and traffic class with the call. A size of none is said too, for the socket may have one of its own;
    /// not where segmentation is off, so that kernels without it are not asked for what they do not know.
    #[inline(never)]
    fn send_message(&self, to: &SockAddr, bytes: &[u8], size: u16, traffic_class: u8) -> io::Result<usize> {
        let mut control = Control::new();
        if size != 0 || self.segmentation() {
            control.push(libc::SOL_UDP, sys::UDP_SEGMENT, &size.to_ne_bytes());
        }
        if traffic_class != 0 {
            let (level, kind) = if self.is_ipv6 {
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
            } else {
                (libc::IPPROTO_IP, libc::IP_TOS)
            };
            control.push(level, kind, &i32::from(traffic_class).to_ne_bytes());
        }
        let buffers = [IoSlice::new(bytes)];
        let message = MsgHdr::new().with_addr(to).with_buffers(&buffers).with_control(control.as_bytes());
        let sent = self.inner.sendmsg(&message, 0);
        if size == 0
            && self.segmentation()
            && matches!(&sent, Err(e) if e.raw_os_error() == Some(libc::EINVAL))
        {
            self.disable_segmentation();
            return self.send_message(to, bytes, size, traffic_class);
        }
        sent
    }

    /// Receives what one call yields: one datagram, or several of one sender and one size.
    /// `None` when nothing is there.
    #[inline]
    pub(crate) fn receive<'b>(&self, buffer: &'b mut ReceiveBuffer) -> io::Result<Option<Datagrams<'b>>> {
        let ReceiveBuffer { bytes, control, source } = buffer;
        let bytes = &mut bytes[RECEIVE_START..];
        let sys::Received { len: length, control_len, truncated } =
            match sys::receive_message(self.inner.as_fd(), bytes, source, control) {
                Ok(received) => received,
                Err(e) => {
                    return match e.raw_os_error() {
                        Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                        // An ICMP error of an earlier send, delivered here; nothing was received.
                        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH) => Ok(None),
                        _ => Err(e),
                    };
                }
            };
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
        let Some(source) = address_of(source) else { return Ok(None) };
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
    source: Source,
}

/// Room for an address of either family.
pub(super) type Source = [u8; size_of::<libc::sockaddr_in6>()];

impl Default for ReceiveBuffer {
    fn default() -> Self {
        ReceiveBuffer {
            bytes: vec![0; RECEIVE_START + RECEIVE_LEN].into_boxed_slice(),
            control: [0; CONTROL_LEN],
            source: Source::default(),
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

    /// The datagram at a place.
    pub(crate) fn get(&self, place: usize) -> Option<&'b [u8]> {
        let rest = self.bytes.get(place * self.segment..)?;
        (!rest.is_empty()).then(|| &rest[..rest.len().min(self.segment)])
    }
}

/// The address that the kernel wrote: `sockaddr_in` or `sockaddr_in6`, numbers in network order but for family and scope. (Of the
/// flow nobody makes use.)
pub(super) fn address_of(source: &Source) -> Option<SocketAddr> {
    let part = |at: usize| source.get(at..).and_then(<[u8]>::first_chunk);
    let port = u16::from_be_bytes(*source.get(2..)?.first_chunk()?);
    match i32::from(u16::from_ne_bytes(*source.first_chunk()?)) {
        libc::AF_INET => Some(SocketAddr::from((*part(4)?, port))),
        libc::AF_INET6 => {
            let (flow, scope) = (u32::from_ne_bytes(*part(4)?), u32::from_ne_bytes(*part(24)?));
            let address = Ipv6Addr::from(*source.get(8..)?.first_chunk::<16>()?);
            Some(SocketAddrV6::new(address, port, flow, scope).into())
        }
        _ => None,
    }
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
                got.extend((0..).map_while(|place| datagrams.get(place)).map(<[u8]>::to_vec));
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
    fn every_size_arrives_as_it_was_asked_for() {
        let (a, b, to) = pair();
        let bytes: Vec<u8> = (0..=255).collect();
        // Twice the same makes it the socket's own size; what follows must not be cut by it.
        for (len, segment) in
            [(256, 256), (250, 100), (250, 100), (250, 100), (100, 100), (80, 80), (256, 256), (240, 120)]
        {
            for traffic_class in [0, 0x68] {
                a.send(&to, &bytes[..len], segment, traffic_class).unwrap();
                let expected: Vec<&[u8]> = bytes[..len].chunks(segment).collect();
                assert_eq!(receive_all(&b, expected.len()), expected, "{len} in {segment}");
            }
        }
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
