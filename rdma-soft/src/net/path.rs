//! A socket of its own for each peer that is written to.
//!
//! A connected socket keeps its route, and knows traffic class and segment size beforehand: a short message
//! costs a fifth less than through a socket that is told all that with each call. It only sends. Its source
//! port is one that the system chose, which is what that port is for in RoCEv2: it tells flows apart where
//! packets are spread over links and receive queues (annex A17.2). Answers go to port 4791 as everything does.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, TryLockError, Weak};

use socket2::{Domain, Protocol, Type};

use super::socket::{self, SendError};
use crate::sys;

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Path {
    socket: socket2::Socket,
    source_port: u16,
    segment: Mutex<Segment>,
}

/// The segment size that the socket itself has, and the one that was asked for last; zero is none.
#[derive(Debug, Default)]
struct Segment {
    set: u16,
    asked: u16,
}

impl Path {
    fn connect(from: SocketAddr, to: SocketAddr, traffic_class: u8) -> io::Result<Path> {
        let socket = socket2::Socket::new(Domain::for_address(from), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        socket::never_fragment(&socket, from.is_ipv6())?;
        socket::enlarge_send_buffer(&socket)?;
        // Nobody reads here; what strays in must not pile up.
        socket.set_recv_buffer_size(0)?;
        if traffic_class != 0 {
            let (level, name) = socket::traffic_class_option(from.is_ipv6());
            sys::set_option(socket.as_fd(), level, name, i32::from(traffic_class))?;
        }
        let mut local = from;
        local.set_port(0);
        socket.bind(&local.into())?;
        socket.connect(&to.into())?;
        let source_port = socket.local_addr()?.as_socket().map_or(0, |a| a.port());
        Ok(Path { socket, source_port, segment: Mutex::default() })
    }

    /// The UDP source port of what is sent here, which the ICRC covers.
    pub(crate) fn source_port(&self) -> u16 {
        self.source_port
    }

    /// Sends `bytes` as datagrams of `segment` bytes each, the last one as long as what is left.
    pub(crate) fn send(&self, bytes: &[u8], segment: usize) -> Result<(), SendError> {
        match self.try_send(bytes, segment) {
            // An ICMP error of an earlier datagram is reported in place of sending this one, once.
            Err(SendError::Refused(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {
                self.try_send(bytes, segment)
            }
            other => other,
        }
    }

    fn try_send(&self, bytes: &[u8], segment: usize) -> Result<(), SendError> {
        let wanted = if bytes.len() > segment { u16::try_from(segment).unwrap_or(u16::MAX) } else { 0 };
        // Who sends at the same moment says the size with the call and disturbs nobody. The lock is held
        // through a plain send, for what the socket has must not change meanwhile; an uncontended lock costs
        // a tenth of what it saves.
        let level = match self.segment.try_lock() {
            Ok(level) => Some(level),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(mut level) = level {
            let asked = std::mem::replace(&mut level.asked, wanted);
            if wanted != 0 && wanted != level.set && wanted == asked {
                let size = i32::from(wanted);
                // Where it fails, so does the message below that says the size itself.
                if sys::set_option(self.socket.as_fd(), libc::SOL_UDP, sys::UDP_SEGMENT, size).is_ok() {
                    level.set = wanted;
                }
            }
            let fits = if wanted == 0 {
                level.set == 0 || bytes.len() <= usize::from(level.set)
            } else {
                wanted == level.set
            };
            if fits {
                let sent = rustix::net::send(&self.socket, bytes, rustix::net::SendFlags::empty());
                return socket::outcome(sent.map_err(io::Error::from), wanted != 0);
            }
        }
        let sent = socket::send_message(&self.socket, None, bytes, Some(wanted), None);
        socket::outcome(sent, wanted != 0)
    }
}

/// The paths of a device, shared by the connections to one peer.
#[derive(Debug, Default)]
pub(crate) struct Paths(Mutex<HashMap<(SocketAddr, u8), Weak<Path>>>);

impl Paths {
    /// A descriptor each; connections to more peers share the device's socket.
    const MOST: usize = 64;

    /// The path from `from` to `to`, made if need be; `None` if there are too many or the system refuses one.
    pub(crate) fn get(&self, from: SocketAddr, to: SocketAddr, traffic_class: u8) -> Option<Arc<Path>> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = paths.get(&(to, traffic_class)).and_then(Weak::upgrade) {
            return Some(path);
        }
        if paths.len() >= Self::MOST {
            paths.retain(|_, path| path.strong_count() > 0);
            if paths.len() >= Self::MOST {
                return None;
            }
        }
        let path = Arc::new(Path::connect(from, to, traffic_class).ok()?);
        paths.insert((to, traffic_class), Arc::downgrade(&path));
        Some(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{ReceiveBuffer, Socket};

    fn receive(socket: &Socket, count: usize) -> Vec<Vec<u8>> {
        let (mut buffer, mut got) = (ReceiveBuffer::default(), Vec::new());
        for _ in 0..1000 {
            if let Some(datagrams) = socket.receive(&mut buffer).unwrap() {
                got.extend(datagrams.iter().map(<[u8]>::to_vec));
            }
            if got.len() >= count {
                break;
            }
        }
        got
    }

    #[test]
    fn every_size_arrives_as_it_was_asked_for() {
        let to: SocketAddr = "127.79.0.2:4791".parse().unwrap();
        let target = Socket::bind(to).unwrap();
        let path = Path::connect("127.79.0.1:4791".parse().unwrap(), to, 0).unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        // Twice the same makes it the socket's own size; what follows must not be cut by it.
        for (len, segment) in
            [(256, 256), (250, 100), (250, 100), (250, 100), (100, 100), (80, 80), (256, 256), (240, 120)]
        {
            path.send(&bytes[..len], segment).unwrap();
            let expected: Vec<&[u8]> = bytes[..len].chunks(segment).collect();
            assert_eq!(receive(&target, expected.len()), expected, "{len} in {segment}");
        }
    }

    #[test]
    fn the_source_port_and_the_traffic_class_travel() {
        let to: SocketAddr = "127.79.0.4:4791".parse().unwrap();
        let target = Socket::bind(to).unwrap();
        target.report_traffic_class().unwrap();
        let path = Path::connect("127.79.0.3:4791".parse().unwrap(), to, 0x68).unwrap();
        path.send(&[1; 20], 20).unwrap();
        let mut buffer = ReceiveBuffer::default();
        let datagrams = target.receive(&mut buffer).unwrap().unwrap();
        assert_eq!((datagrams.source.port(), datagrams.traffic_class), (path.source_port(), 0x68));
    }

    #[test]
    fn a_peer_that_was_away_gets_what_is_sent_once_it_is_there() {
        let to: SocketAddr = "127.79.0.6:4791".parse().unwrap();
        let path = Path::connect("127.79.0.5:4791".parse().unwrap(), to, 0).unwrap();
        path.send(&[1; 20], 20).unwrap();
        let target = Socket::bind(to).unwrap();
        path.send(&[2; 20], 20).unwrap();
        assert_eq!(receive(&target, 1), [[2; 20]]);
    }

    #[test]
    fn connections_to_one_peer_share_a_path_and_their_number_is_bounded() {
        let paths = Paths::default();
        let from: SocketAddr = "127.79.0.7:4791".parse().unwrap();
        let to = |n: usize| SocketAddr::from(([127, 79, 1, u8::try_from(n).unwrap()], 4791));
        let first = paths.get(from, to(0), 0).unwrap();
        assert!(Arc::ptr_eq(&first, &paths.get(from, to(0), 0).unwrap()));
        let mut kept: Vec<_> = (1..Paths::MOST).map(|n| paths.get(from, to(n), 0).unwrap()).collect();
        assert!(paths.get(from, to(Paths::MOST), 0).is_none());
        kept.pop();
        assert!(paths.get(from, to(Paths::MOST), 0).is_some());
    }
}
