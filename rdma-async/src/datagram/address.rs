//! Where datagrams go and come from, as plain data.

use std::{
    collections::{HashMap, VecDeque},
    net::Ipv4Addr,
};

use rdma_core::{AddressHandle, AddressVector, Error, Gid, GlobalRoute, ProtectionDomain, Success};
use serde::{Deserialize, Serialize};

/// Bytes that a UD receive keeps free for the Global Routing Header, in front of the message (IBTA vol. 1, 11.4.1.2).
pub(crate) const GRH: usize = 40;

/// The address of a [`UdEndpoint`](super::UdEndpoint): plain data, to be sent over any channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UdAddress {
    /// GID; on RoCE the only address, on InfiniBand `None` within a subnet.
    pub gid: Option<Gid>,
    /// LID; 0 on RoCE.
    pub lid: u16,
    /// Service level; on RoCE the priority.
    pub service_level: u8,
    /// Queue pair number.
    pub qp_num: u32,
}

impl UdAddress {
    /// The sender of a datagram; `None` when the header does not say, which a device does not do.
    pub(crate) fn of_sender(success: Success<'_>, header: &[u8], is_roce: bool) -> Option<UdAddress> {
        let gid = if success.has_grh() { source_gid(header.first_chunk()?, is_roce) } else { None };
        if is_roce && gid.is_none() {
            return None;
        }
        Some(UdAddress {
            gid,
            lid: if is_roce { 0 } else { success.slid() },
            service_level: success.service_level(),
            qp_num: success.src_qp(),
        })
    }
}

/// The source GID of a GRH. On RoCEv2 over IPv4 the last 20 bytes are the IPv4 header and the first 20 undefined (IBTA annex A17),
/// so that they may look like a header of IPv6; then the checksum of IPv4 decides.
fn source_gid(header: &[u8; GRH], roce: bool) -> Option<Gid> {
    let (is_v6, is_v4) = (header[0] >> 4 == 6, roce && header[20] == 0x45);
    if is_v4 && (!is_v6 || checksum(&header[20..]) == 0xffff) {
        let source: [u8; 4] = *header[32..].first_chunk()?;
        return Some(Gid::from(Ipv4Addr::from(source)));
    }
    is_v6.then(|| header[8..].first_chunk().copied().map(Gid)).flatten()
}

/// The sum of RFC 1071, 0xffff over a header with a valid checksum.
fn checksum(header: &[u8]) -> u32 {
    let (words, _) = header.as_chunks::<2>();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    (sum & 0xffff) + (sum >> 16)
}

/// What an address handle is made from.
type Path = (Option<Gid>, u16, u8);

/// Address handles in use lately. What is in flight keeps its handle alive by itself.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    made: HashMap<Path, AddressHandle>,
    /// The order in which they were made.
    order: VecDeque<Path>,
}

impl Handles {
    /// The most handles kept: peers that come and go, or forge their addresses, cost no more.
    pub(crate) const MOST: usize = 256;

    /// The handle for `address`, made now if there is none.
    pub(crate) fn get(
        &mut self,
        domain: &ProtectionDomain,
        port: u8,
        gid_index: u8,
        address: &UdAddress,
    ) -> Result<AddressHandle, Error> {
        if address.qp_num >> 24 != 0 || address.service_level >> 4 != 0 {
            // A device would take the lower bits, and with them another peer.
            return Err(Error::Invalid {
                what: format!(
                    "no endpoint has queue pair number {:#x} and service level {}: a number has 24 bits, a level 4",
                    address.qp_num, address.service_level
                ),
            });
        }
        let path = (address.gid, address.lid, address.service_level);
        if let Some(handle) = self.made.get(&path) {
            return Ok(handle.clone());
        }
        let mut vector = AddressVector::local(port, address.lid);
        vector.route = address.gid.map(|gid| GlobalRoute::new(gid, gid_index));
        vector.service_level = address.service_level;
        let handle = domain.address_handle(&vector)?;
        if self.order.len() >= Self::MOST
            && let Some(oldest) = self.order.pop_front()
        {
            self.made.remove(&oldest);
        }
        self.order.push_back(path);
        self.made.insert(path, handle.clone());
        Ok(handle)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.made.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    /// 192.0.2.1 to 192.0.2.2, as in RFC 791, with its checksum.
    fn ipv4() -> [u8; 20] {
        let mut header = [0; 20];
        header[0] = 0x45;
        header[8] = 64;
        header[9] = 17;
        header[12..16].copy_from_slice(&[192, 0, 2, 1]);
        header[16..20].copy_from_slice(&[192, 0, 2, 2]);
        let sum = u16::try_from(checksum(&header)).unwrap();
        header[10..12].copy_from_slice(&(!sum).to_be_bytes());
        header
    }

    #[test]
    fn an_ipv4_header_names_its_source_whatever_stands_before_it() {
        let source = Some(Gid::from(Ipv4Addr::new(192, 0, 2, 1)));
        for first in [0, 0x45, 0x60, 0xff] {
            let mut header = [first; GRH];
            header[20..].copy_from_slice(&ipv4());
            assert_eq!(source_gid(&header, true), source, "{first:#x}");
        }
    }

    #[test]
    fn a_header_of_ipv6_is_not_taken_for_one_of_ipv4() {
        let mut header = [0; GRH];
        header[0] = 0x60;
        let source = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 9];
        header[8..24].copy_from_slice(&source);
        assert_eq!(header[20], 0x45);
        assert_eq!(source_gid(&header, true), Some(Gid(source)));
        assert_eq!(source_gid(&[0; GRH], true), None);
    }

    #[tokio::test]
    async fn handles_are_made_once_and_not_kept_for_ever() {
        let domain = crate::Domain::open(None).unwrap();
        let pd = domain.protection_domain();
        let mut handles = Handles::default();
        let address = |i: u16| UdAddress {
            gid: Some(Gid::from(Ipv4Addr::new(127, 1, (i >> 8) as u8, (i & 0xff) as u8))),
            lid: 0,
            service_level: 0,
            qp_num: 7,
        };
        for i in 0..600 {
            for _ in 0..2 {
                handles.get(pd, 1, 0, &address(i)).unwrap();
            }
            assert_eq!(handles.len(), usize::from(i + 1).min(Handles::MOST));
        }
    }
}
