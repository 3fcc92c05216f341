//! How full the receive buffer of a socket on this machine is, as the kernel tells by `sock_diag(7)`.
//!
//! Unprivileged. Knows the sockets of this network namespace only: another host's, or another container's, is
//! not found.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Type};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
/// `INET_DIAG_SKMEMINFO` of `linux/inet_diag.h`: what the socket's buffers hold.
const MEMORY: u16 = 7;
/// `NLM_F_REQUEST`, `AF_INET`, `AF_INET6` and `IPPROTO_UDP`, each as wide as its field.
const IS_REQUEST: u16 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const UDP: u8 = 17;
/// `nlmsghdr`; then `inet_diag_req_v2` in a request, `inet_diag_msg` and attributes in an answer.
const HEADER: usize = 16;
const REQUEST_LEN: u32 = 72;
const REQUEST: usize = REQUEST_LEN as usize;
const ANSWER: usize = HEADER + 72;
/// Where the addresses stand, `inet_diag_sockid`, in request and answer.
const REQUEST_ID: usize = HEADER + 8;
const ANSWER_ID: usize = HEADER + 4;

/// A receive buffer, in bytes as the kernel counts them, its overhead included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Occupancy {
    pub(crate) queued: u32,
    pub(crate) capacity: u32,
}

/// A socket to ask by.
#[derive(Debug)]
pub(crate) struct SocketDiag {
    netlink: socket2::Socket,
    sequence: u32,
}

impl SocketDiag {
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = socket2::Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::DGRAM,
            Some(Protocol::from(libc::NETLINK_SOCK_DIAG)),
        )?;
        // The kernel puts the answer there before the request returns: nobody waits.
        netlink.set_nonblocking(true)?;
        Ok(SocketDiag { netlink, sequence: 0 })
    }

    /// The receive buffer of the unconnected UDP socket that is bound to `address`; `None` if there is none here.
    pub(crate) fn udp_receive_buffer(&mut self, address: SocketAddr) -> io::Result<Option<Occupancy>> {
        self.sequence = self.sequence.wrapping_add(1);
        rustix::io::write(&self.netlink, &request(address, self.sequence))?;
        // Ours is the last of a few: an answer may be left that an earlier call did not take.
        let mut answer = [0; 512];
        for _ in 0..4 {
            let length = rustix::io::read(&self.netlink, &mut answer)?;
            let answer = &answer[..length.min(answer.len())];
            if u32_at(answer, 8) == Some(self.sequence) {
                return parse(answer, address);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn request(address: SocketAddr, sequence: u32) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    let mut put = |at: usize, bytes: &[u8]| request[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &REQUEST_LEN.to_ne_bytes());
    put(4, &BY_FAMILY.to_ne_bytes());
    put(6, &IS_REQUEST.to_ne_bytes());
    put(8, &sequence.to_ne_bytes());
    put(HEADER, &[if address.is_ipv6() { IPV6 } else { IPV4 }, UDP, 1 << (MEMORY - 1)]);
    // All states.
    put(HEADER + 4, &u32::MAX.to_ne_bytes());
    // The kernel looks as for a packet that arrives: the socket that is looked for is its destination.
    put(REQUEST_ID + 2, &address.port().to_be_bytes());
    match address {
        SocketAddr::V4(v4) => put(REQUEST_ID + 20, &v4.ip().octets()),
        SocketAddr::V6(v6) => {
            put(REQUEST_ID + 20, &v6.ip().octets());
            put(REQUEST_ID + 36, &v6.scope_id().to_ne_bytes());
        }
    }
    // No cookie of a certain socket.
    put(REQUEST_ID + 40, &[0xff; 8]);
    request
}

fn parse(answer: &[u8], address: SocketAddr) -> io::Result<Option<Occupancy>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let kind = u16_at(answer, 4).ok_or_else(invalid)?;
    if i32::from(kind) == libc::NLMSG_ERROR {
        let errno = u32_at(answer, HEADER).ok_or_else(invalid)?.cast_signed().wrapping_neg();
        return if errno == libc::ENOENT { Ok(None) } else { Err(io::Error::from_raw_os_error(errno)) };
    }
    if kind != BY_FAMILY || answer.len() < ANSWER {
        return Err(invalid());
    }
    let bound: IpAddr = match address {
        SocketAddr::V4(_) => {
            Ipv4Addr::from(*array_at::<4>(answer, ANSWER_ID + 4).ok_or_else(invalid)?).into()
        }
        SocketAddr::V6(_) => {
            Ipv6Addr::from(*array_at::<16>(answer, ANSWER_ID + 4).ok_or_else(invalid)?).into()
        }
    };
    // A socket that is bound to no address would take packets for this one if it were local, which is not known.
    if bound != address.ip() {
        return Ok(None);
    }
    let mut attributes = &answer[ANSWER..];
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        let (Some(attribute), true) = (attributes.get(..length), length >= 4) else { break };
        if kind == MEMORY {
            // SK_MEMINFO_RMEM_ALLOC and SK_MEMINFO_RCVBUF.
            let queued = u32_at(attribute, 4).ok_or_else(invalid)?;
            let capacity = u32_at(attribute, 8).ok_or_else(invalid)?;
            return Ok(Some(Occupancy { queued, capacity }));
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Err(invalid())
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(|b| u16::from_ne_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(|b| u32::from_ne_bytes(*b))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn queued(diag: &mut SocketDiag, address: SocketAddr) -> u32 {
        diag.udp_receive_buffer(address).unwrap().unwrap().queued
    }

    #[test]
    fn a_buffer_fills_and_drains() {
        for address in ["127.77.0.1:0", "[::1]:0"] {
            let receiver = UdpSocket::bind(address).unwrap();
            let to = receiver.local_addr().unwrap();
            let sender = UdpSocket::bind(address).unwrap();
            let mut diag = SocketDiag::open().unwrap();
            assert_eq!(queued(&mut diag, to), 0);
            (0..8).for_each(|_| assert_eq!(sender.send_to(&[0; 1000], to).unwrap(), 1000));
            let full = queued(&mut diag, to);
            let capacity = diag.udp_receive_buffer(to).unwrap().unwrap().capacity;
            assert!(full >= 8000 && full <= capacity, "{full} of {capacity}");
            (0..8).for_each(|_| assert_eq!(receiver.recv(&mut [0; 1000]).unwrap(), 1000));
            assert_eq!(queued(&mut diag, to), 0);
        }
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        let mut diag = SocketDiag::open().unwrap();
        let at = |address: &str| address.parse::<SocketAddr>().unwrap();
        // From RFC 5737's block for documentation, and a port that nobody has.
        assert_eq!(diag.udp_receive_buffer(at("192.0.2.1:4791")).unwrap(), None);
        let anywhere = UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap();
        assert_eq!(diag.udp_receive_buffer(at(&format!("127.77.0.2:{}", anywhere.port()))).unwrap(), None);
    }

    #[test]
    fn a_socket_bound_to_no_address_is_not_the_peers() {
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        let port = any.local_addr().unwrap().port();
        let mut diag = SocketDiag::open().unwrap();
        let address = SocketAddr::from(([127, 77, 0, 3], port));
        assert_eq!(diag.udp_receive_buffer(address).unwrap(), None);
    }

    #[test]
    fn answers_that_are_cut_short_are_refused() {
        let address: SocketAddr = "127.0.0.1:4791".parse().unwrap();
        let mut answer = [0u8; ANSWER];
        answer[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer[ANSWER_ID + 4..][..4].copy_from_slice(&[127, 0, 0, 1]);
        for length in 0..=ANSWER {
            assert!(parse(&answer[..length], address).is_err(), "{length}");
        }
    }
}
