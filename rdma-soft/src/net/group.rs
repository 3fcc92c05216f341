//! Sockets that hear a multicast group.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockRef, Type};

use super::socket::{Source, address_of};
use crate::sys;
use crate::wire::ROCE_V2_PORT;

/// A socket that gets what is sent to one group on one interface. Any number of processes may have one.
#[derive(Debug)]
pub(crate) struct GroupSocket(socket2::Socket);

impl GroupSocket {
    /// Joins `group` on the interface of `local`, whose index is 0 if it is not known.
    pub(crate) fn join(group: IpAddr, local: IpAddr, interface: u32) -> io::Result<Self> {
        let socket =
            socket2::Socket::new(Domain::for_address((group, 0).into()), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        // With it every process of the machine gets a copy.
        socket.set_reuse_address(true)?;
        match (group, local) {
            (IpAddr::V4(group), IpAddr::V4(local)) => {
                // Otherwise it hears what others joined on other interfaces.
                socket.set_multicast_all_v4(false)?;
                socket.bind(&SocketAddr::from((group, ROCE_V2_PORT)).into())?;
                let on = match interface {
                    0 => InterfaceIndexOrAddress::Address(local),
                    index => InterfaceIndexOrAddress::Index(index),
                };
                socket.join_multicast_v4_n(&group, &on)?;
            }
            (IpAddr::V6(group), IpAddr::V6(_)) => {
                socket.set_only_v6(true)?;
                socket.set_multicast_all_v6(false)?;
                socket
                    .bind(&SocketAddr::from(SocketAddrV6::new(group, ROCE_V2_PORT, 0, interface)).into())?;
                socket.join_multicast_v6(&group, interface)?;
            }
            _ => return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        }
        Ok(GroupSocket(socket))
    }

    /// The next datagram and its sender; `None` when nothing is there.
    pub(crate) fn receive<'b>(&self, buffer: &'b mut [u8]) -> Option<(SocketAddr, &'b [u8])> {
        // Errors are those of other packets; this one's sender will not repeat it anyway.
        let mut source = Source::default();
        let received = sys::receive_message(self.0.as_fd(), buffer, &mut source, &mut []).ok()?;
        Some((address_of(&source)?, buffer.get(..received.len)?))
    }
}

impl AsFd for GroupSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Has a socket send to groups through the interface of `local`, whatever the routes say. Without that, datagrams to
/// a group are refused where no route leads to it.
pub(crate) fn send_groups_from(socket: BorrowedFd<'_>, local: IpAddr, interface: u32) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    match local {
        IpAddr::V4(local) => socket.set_multicast_if_v4(&local),
        IpAddr::V6(_) => socket.set_multicast_if_v6(interface),
    }
}
