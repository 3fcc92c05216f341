//! Which local address the device stands on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use super::{ADDRESS_VARIABLE, Socket};

/// The UDP port of RoCEv2 (IANA; InfiniBand annex A17).
const PORT: u16 = 4791;
/// How many loopback addresses are tried without configuration, from 127.0.0.1 on.
const LOOPBACK_TRIES: u32 = 1000;

/// Why the device could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process, or the kernel's Soft-RoCE, holds the address.
    #[error(
        "the soft RDMA device cannot use {address}: UDP port 4791 of it is taken by another process or by the \
         kernel's Soft-RoCE; set RDMA_SOFT_ADDR to another local address or interface, or unset it to take a free one"
    )]
    AddressInUse {
        /// The address that was asked for.
        address: IpAddr,
    },
    /// Every loopback address that was tried is taken.
    #[error(
        "the soft RDMA device found no free address: UDP port 4791 is taken on 127.0.0.1 and the {tries} \
         addresses after it; set RDMA_SOFT_ADDR to a local address or interface"
    )]
    NoFreeAddress {
        /// How many addresses were tried.
        tries: u32,
    },
    /// The variable names neither an address nor an interface that has one.
    #[error(
        "RDMA_SOFT_ADDR={value}: neither an IPv4 or IPv6 address nor an interface with one; interfaces here: {interfaces}"
    )]
    NoSuchAddress {
        /// What the variable says.
        value: String,
        /// The names of the interfaces that have addresses.
        interfaces: String,
    },
    /// A variable that configures the device has a value it cannot have.
    #[error("{variable}={value}: {reason}")]
    BadSetting {
        /// The variable's name.
        variable: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused a socket, a descriptor or a thread.
    #[error("the soft RDMA device cannot {action}: {reason}")]
    System {
        /// What was tried.
        action: String,
        /// The system's answer.
        reason: String,
        /// Its errno.
        errno: i32,
    },
}

impl OpenError {
    pub(crate) fn system(action: impl Into<String>, error: &io::Error) -> Self {
        OpenError::System {
            action: action.into(),
            reason: error.to_string(),
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// The errno that the C interface reports for it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            OpenError::AddressInUse { .. } | OpenError::NoFreeAddress { .. } => libc::EADDRINUSE,
            OpenError::NoSuchAddress { .. } => libc::EADDRNOTAVAIL,
            OpenError::BadSetting { .. } => libc::EINVAL,
            OpenError::System { errno, .. } => *errno,
        }
    }
}

/// A bound socket and what is known of the interface below it.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) address: IpAddr,
    /// Needed to reach link-local IPv6 peers, and reported with each GID; 0 when unknown.
    pub(crate) interface_index: u32,
    /// Of the interface, in bytes, IP header included.
    pub(crate) interface_mtu: u32,
    pub(crate) socket: Socket,
}

/// Binds the address that `setting` (the variable's value) asks for, or the first free loopback one.
pub(crate) fn choose(setting: Option<&str>) -> Result<Local, OpenError> {
    let Some(value) = setting.map(str::trim).filter(|v| !v.is_empty()) else {
        return first_free_loopback();
    };
    let address = resolve(value)?;
    bind(address).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => OpenError::AddressInUse { address },
        io::ErrorKind::AddrNotAvailable => no_such_address(value),
        _ => OpenError::system(format!("bind UDP port {PORT} of {address} ({ADDRESS_VARIABLE}={value})"), &e),
    })
}

fn first_free_loopback() -> Result<Local, OpenError> {
    for offset in 0..LOOPBACK_TRIES {
        let address = IpAddr::V4(Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + offset));
        match bind(address) {
            Ok(local) => return Ok(local),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            Err(e) => return Err(OpenError::system(format!("bind UDP port {PORT} of {address}"), &e)),
        }
    }
    Err(OpenError::NoFreeAddress { tries: LOOPBACK_TRIES - 1 })
}

fn bind(address: IpAddr) -> io::Result<Local> {
    let interface = interface_of(address);
    let interface_index = interface.as_ref().and_then(|i| i.index).unwrap_or(0);
    let target = match address {
        IpAddr::V6(a) if a.is_unicast_link_local() => {
            SocketAddr::V6(SocketAddrV6::new(a, PORT, 0, interface_index))
        }
        _ => SocketAddr::new(address, PORT),
    };
    let socket = Socket::bind(target)?;
    let interface_mtu = interface.as_ref().and_then(|i| mtu_of(&i.name)).unwrap_or(1500);
    Ok(Local { address, interface_index, interface_mtu, socket })
}

/// An address as written, without its zone, or the first address of the interface of that name.
fn resolve(value: &str) -> Result<IpAddr, OpenError> {
    let (without_zone, _) = value.split_once('%').unwrap_or((value, ""));
    if let Ok(address) = without_zone.parse() {
        return Ok(address);
    }
    let mut of_interface: Vec<IpAddr> = if_addrs::get_if_addrs()
        .unwrap_or_default()
        .into_iter()
        .filter(|i| i.name == value)
        .map(|i| i.ip())
        .collect();
    // IPv4 first, as most peers use it; a link-local address last, as it needs a zone to be reached.
    of_interface.sort_by_key(|a| match a {
        IpAddr::V4(_) => 0,
        IpAddr::V6(a) if !a.is_unicast_link_local() => 1,
        IpAddr::V6(_) => 2,
    });
    of_interface.first().copied().ok_or_else(|| no_such_address(value))
}

fn no_such_address(value: &str) -> OpenError {
    let mut names: Vec<String> = if_addrs::get_if_addrs()
        .unwrap_or_default()
        .into_iter()
        .map(|i| format!("{} ({})", i.name, i.ip()))
        .collect();
    names.dedup();
    OpenError::NoSuchAddress { value: value.to_owned(), interfaces: names.join(", ") }
}

fn interface_of(address: IpAddr) -> Option<if_addrs::Interface> {
    let all = if_addrs::get_if_addrs().ok()?;
    let exact = all.iter().find(|i| i.ip() == address);
    // Every address of 127.0.0.0/8 is local, though only 127.0.0.1 is listed.
    exact.or_else(|| all.iter().find(|i| address.is_loopback() && i.is_loopback())).cloned()
}

fn mtu_of(interface: &str) -> Option<u32> {
    std::fs::read_to_string(format!("/sys/class/net/{interface}/mtu")).ok()?.trim().parse().ok()
}

/// The IPv6 form of an address, as a GID carries it (IPv4 mapped, RFC 4291 clause 2.5.5.2).
pub(crate) fn to_gid(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_named_with_what_exists() {
        let error = choose(Some("no-such-if0")).unwrap_err();
        assert_eq!(error.errno(), libc::EADDRNOTAVAIL);
        let text = error.to_string();
        assert!(text.contains("RDMA_SOFT_ADDR=no-such-if0") && text.contains("lo (127.0.0.1)"), "{text}");
    }

    #[test]
    fn an_address_that_is_taken_is_named() {
        let first = choose(Some("127.77.0.1")).unwrap();
        assert_eq!(first.address, IpAddr::V4(Ipv4Addr::new(127, 77, 0, 1)));
        assert_eq!(first.interface_mtu, 65536);
        let error = choose(Some("127.77.0.1")).unwrap_err();
        assert_eq!(error.errno(), libc::EADDRINUSE);
        let text = error.to_string();
        assert!(
            text.contains("127.77.0.1") && text.contains("4791") && text.contains("RDMA_SOFT_ADDR"),
            "{text}"
        );
    }

    #[test]
    fn without_a_setting_each_takes_its_own() {
        let (a, b) = (choose(None).unwrap(), choose(Some(" ")).unwrap());
        assert!(a.address.is_loopback() && b.address.is_loopback());
        assert_ne!(a.address, b.address);
    }

    #[test]
    fn an_interface_by_name() {
        // Taken or free, the name was understood.
        match choose(Some("lo")) {
            Ok(local) => assert!(local.address.is_loopback()),
            Err(e) => assert_eq!(e.errno(), libc::EADDRINUSE),
        }
    }
}
