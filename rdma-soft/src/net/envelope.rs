//! The headers below RoCE that a UDP socket neither takes nor shows, as the kernel makes them.

use std::net::{IpAddr, SocketAddr};

use crate::wire::{ICRC_LEN, Icrc, IcrcMasking, IcrcPrefix, Ipv4Repr, Ipv6Repr, UdpRepr};

/// What IP and UDP header of a packet say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// Differentiated services and ECN.
    pub(crate) traffic_class: u8,
    /// IPv4 identification: 0, or the segment's number in a segmented send.
    pub(crate) identification: u16,
}

/// An IP header of either version.
#[derive(Debug)]
pub(crate) enum Ip {
    V4(Ipv4Repr),
    V6(Ipv6Repr),
}

impl Envelope {
    /// The headers around `len` bytes from BTH to ICRC.
    pub(crate) fn headers(&self, len: usize) -> (Ip, UdpRepr) {
        /// Routers change it, so that no check covers it.
        const HOP_LIMIT: u8 = 64;
        const IPV4_LEN: u16 = 20;
        // What is longer than a datagram can be is cut before it comes here.
        let udp_len = u16::try_from(len + UdpRepr::LEN).unwrap_or(u16::MAX - IPV4_LEN);
        let udp = UdpRepr { src_port: self.from.port(), dst_port: self.to.port(), len: udp_len, checksum: 0 };
        let ip = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => Ip::V4(Ipv4Repr {
                traffic_class: self.traffic_class,
                total_len: udp_len.saturating_add(IPV4_LEN),
                identification: self.identification,
                dont_fragment: true,
                hop_limit: HOP_LIMIT,
                src: from.octets(),
                dst: to.octets(),
            }),
            (from, to) => Ip::V6(Ipv6Repr {
                traffic_class: self.traffic_class,
                flow_label: 0,
                payload_len: udp_len,
                next_header: Ipv6Repr::UDP,
                hop_limit: HOP_LIMIT,
                src: super::to_gid(from).octets(),
                dst: super::to_gid(to).octets(),
            }),
        };
        (ip, udp)
    }

    /// The ICRC of `transport`, BTH to padding.
    pub(crate) fn icrc(&self, transport: &[u8]) -> Icrc {
        self.icrc_prefix(transport.len()).icrc(transport)
    }

    fn icrc_prefix(&self, transport_len: usize) -> IcrcPrefix {
        match self.headers(transport_len + ICRC_LEN) {
            (Ip::V4(ip), udp) => IcrcPrefix::ipv4(&ip, &udp),
            (Ip::V6(ip), udp) => IcrcPrefix::ipv6(&ip, &udp),
        }
    }

    /// What a datagram's receiver gets in front of its data: the IPv6 header, or 20 bytes and the IPv4
    /// header (annex A17.4.5.1). `len` is that from BTH to ICRC.
    pub(crate) fn global_route_header(&self, len: usize) -> [u8; 40] {
        let mut grh = [0; 40];
        match self.headers(len).0 {
            Ip::V4(ip) => {
                if let Some(out) = grh.last_chunk_mut() {
                    ip.emit(out);
                }
            }
            Ip::V6(ip) => ip.emit(&mut grh),
        }
        grh
    }
}

/// Addresses and ports of packets over IPv4, to look up by. (Those of IPv6 are too long, and its packets have no
/// identification to tell apart.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PathKey(u128);

impl PathKey {
    pub(crate) fn new(from: SocketAddr, to: SocketAddr) -> Option<Self> {
        let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { return None };
        let ports = u128::from(from.port()) << 16 | u128::from(to.port());
        let addresses = u128::from(from.ip().to_bits()) << 32 | u128::from(to.ip().to_bits());
        Some(Self(addresses << 64 | ports << 32))
    }

    /// With all else that the ICRC's prefix depends on.
    fn with(self, identification: u16, transport_len: u16) -> u128 {
        self.0 | u128::from(identification) << 16 | u128::from(transport_len)
    }
}

/// What the ICRC has in common for packets of the same length between the same addresses, kept: for a short
/// packet it is most of the work.
#[derive(Debug, Default)]
pub(crate) struct IcrcCache([Option<Known>; IcrcCache::PLACES]);

#[derive(Debug)]
struct Known {
    key: u128,
    prefix: IcrcPrefix,
    masking: IcrcMasking,
}

impl IcrcCache {
    /// More than the segments of one send.
    const PLACES: usize = 32;

    /// The ICRC of `transport`, BTH to padding, on a path. The envelope is asked for if nothing is known.
    pub(crate) fn icrc_on(
        &mut self,
        path: Option<PathKey>,
        identification: u16,
        transport: &[u8],
        envelope: impl FnOnce() -> Envelope,
    ) -> Icrc {
        let (Some(path), Ok(len)) = (path, u16::try_from(transport.len())) else {
            return envelope().icrc(transport);
        };
        let key = path.with(identification, len);
        // Lengths are multiples of four, and segments of one length are numbered: they lie side by side, and
        // other lengths elsewhere.
        let place = transport.len() / 4 * 7 + usize::from(identification);
        let place = &mut self.0[place % Self::PLACES];
        if let Some(known) = place
            && known.key == key
        {
            return known.prefix.icrc_with(transport, known.masking);
        }
        Known::learn(place, key, &envelope(), transport)
    }
}

impl Known {
    /// The ICRC of a packet of which nothing was known, and the place for what is known now.
    #[cold]
    fn learn(place: &mut Option<Known>, key: u128, envelope: &Envelope, transport: &[u8]) -> Icrc {
        let prefix = envelope.icrc_prefix(transport.len());
        let icrc = prefix.icrc(transport);
        if let Some(masking) = prefix.masking(transport) {
            *place = Some(Known { key, prefix, masking });
        }
        icrc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_what_is_computed() {
        let mut cache = IcrcCache::default();
        let address = |last: u8, port| SocketAddr::from(([127, 0, 0, last], port));
        for round in 0..3 {
            for (from, to) in [(1, 2), (2, 1), (1, 3)] {
                for len in (12..200).step_by(4) {
                    for identification in [0, 1, 7, 8] {
                        let envelope = Envelope {
                            from: address(from, 4791 + round),
                            to: address(to, 4791),
                            traffic_class: 0,
                            identification,
                        };
                        // With the masked bits clear, as nearly always, and set.
                        for masked in [0, 0, 0x40, 0] {
                            let mut transport: Vec<u8> = (0..=255).cycle().take(len).collect();
                            transport[4] = masked;
                            let path = PathKey::new(envelope.from, envelope.to);
                            let known = cache.icrc_on(path, identification, &transport, || envelope);
                            assert_eq!(known, envelope.icrc(&transport));
                        }
                    }
                }
            }
        }
    }
}
