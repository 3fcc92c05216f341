//! Where packets go: GIDs, IP addresses and the ICRC's view of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::OnceLock;

use socket2::SockAddr;

use super::inbox::Route;
use crate::net::PathKey;
use crate::wire::ROCE_V2_PORT;

/// A destination of packets.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(super) address: SocketAddr,
    /// The same for the system.
    pub(super) to: SockAddr,
    /// What the ICRC of its packets is known by.
    pub(super) path: Option<PathKey>,
    /// Goes into the IP header.
    pub(super) traffic_class: u8,
    /// In this process, not to be reached through the socket.
    pub(super) is_local: bool,
    /// Where its packets are put then, for a connection; found with the first.
    pub(super) route: OnceLock<Route>,
}

/// The first bytes of the MAC address that stands for a device on an IPv4 address: locally
/// administered, and marked so that the address is found again in a link-local GID.
const MAC_PREFIX: [u8; 2] = [0x02, 0x91];

/// The MAC address that the device claims: made up, stable for its address.
pub(crate) fn mac_of(address: IpAddr) -> [u8; 6] {
    let [a, b, c, d] = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let o = v6.octets();
            [o[12] ^ o[0], o[13] ^ o[1], o[14], o[15]]
        }
    };
    let [x, y] = MAC_PREFIX;
    [x, y, a, b, c, d]
}

/// EUI-64 of a MAC address (RFC 4291, appendix A).
pub(crate) fn eui64(mac: [u8; 6]) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac;
    [a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

/// The link-local GID of a device.
pub(crate) fn link_local(address: IpAddr) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[0] = 0xfe;
    octets[1] = 0x80;
    octets[8..].copy_from_slice(&eui64(mac_of(address)));
    Ipv6Addr::from(octets)
}

/// The IP address behind a GID: mapped IPv4, the link-local GID of such a device (so that GID index 0
/// works between devices of this kind), or IPv6 as it stands.
pub(crate) fn address_of_gid(gid: [u8; 16]) -> IpAddr {
    let v6 = Ipv6Addr::from(gid);
    if let Some(v4) = v6.to_ipv4_mapped() {
        return IpAddr::V4(v4);
    }
    // A multicast group of IPv4, as in ff0e::ffff:239.1.2.3 (annex A17.4.3.2 leaves the form open; this
    // is what the kernel maps).
    if gid[0] == 0xff && gid[10] == 0xff && gid[11] == 0xff {
        return IpAddr::V4(Ipv4Addr::new(gid[12], gid[13], gid[14], gid[15]));
    }
    let candidate = Ipv4Addr::new(gid[10], gid[13], gid[14], gid[15]);
    if link_local(IpAddr::V4(candidate)) == v6 { IpAddr::V4(candidate) } else { IpAddr::V6(v6) }
}

/// Where the device at an address receives; `interface` is the scope of a link-local one.
pub(super) fn socket_address(address: IpAddr, interface: u32) -> SocketAddr {
    match address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            SocketAddr::V6(SocketAddrV6::new(v6, ROCE_V2_PORT, 0, interface))
        }
        _ => SocketAddr::new(address, ROCE_V2_PORT),
    }
}

impl Peer {
    /// `from` is the device's own address.
    pub(super) fn new(from: SocketAddr, address: SocketAddr, traffic_class: u8, is_local: bool) -> Self {
        let path = PathKey::new(from, address);
        Peer { address, to: address.into(), path, traffic_class, is_local, route: OnceLock::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gid_leads_back_to_its_address() {
        for address in ["127.0.0.1", "10.98.0.2", "fd00::7", "fe80::1234:56ff:fe78:9abc"] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(address_of_gid(crate::net::to_gid(address).octets()), address);
            if address.is_ipv4() {
                assert_eq!(address_of_gid(link_local(address).octets()), address);
            }
        }
        let group: Ipv6Addr = "ff0e::ffff:239.1.2.3".parse().unwrap();
        assert_eq!(address_of_gid(group.octets()), IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3)));
    }
}
