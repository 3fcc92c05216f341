//! Invariant CRC (clause 7.8.1, annex A17.3.4): CRC-32 over what no router changes.
//!
//! It covers eight bytes of ones (the place of the local route header), the IP header with traffic class,
//! flow label, hop limit and checksum as ones, the UDP header with its checksum as ones, and the transport
//! packet with the byte after the P_Key as ones. On the wire it stands low byte first.

use super::bth::BthRepr;
use super::ipv4::Ipv4Repr;
use super::ipv6::Ipv6Repr;
use super::udp::UdpRepr;

/// Length of an ICRC in bytes.
pub const ICRC_LEN: usize = 4;

/// Place of FECN, BECN and the six reserved bits in BTH.
const BTH_RESERVED: usize = 4;

/// An invariant CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Icrc(u32);

/// The ICRC of the headers before BTH. The same for all packets of one length between two sockets, so worth keeping.
#[derive(Debug, Clone)]
pub struct IcrcPrefix(crc32fast::Hasher);

impl IcrcPrefix {
    /// Headers over IPv4. Traffic class, hop limit and UDP checksum do not matter, the lengths, the
    /// identification and the don't-fragment bit do.
    #[must_use]
    pub fn ipv4(ip: &Ipv4Repr, udp: &UdpRepr) -> Self {
        let mut head = [0xff; 8 + Ipv4Repr::LEN + UdpRepr::LEN];
        let masked = Ipv4Repr { traffic_class: 0xff, hop_limit: 0xff, ..*ip };
        if let Some(out) = head[8..].first_chunk_mut() {
            masked.emit_without_checksum(out);
        }
        head[8 + 10] = 0xff;
        head[8 + 11] = 0xff;
        Self::of(&mut head, udp)
    }

    /// Headers over IPv6. Traffic class, flow label, hop limit and UDP checksum do not matter.
    #[must_use]
    pub fn ipv6(ip: &Ipv6Repr, udp: &UdpRepr) -> Self {
        let mut head = [0xff; 8 + Ipv6Repr::LEN + UdpRepr::LEN];
        let masked = Ipv6Repr { traffic_class: 0xff, flow_label: 0xf_ffff, hop_limit: 0xff, ..*ip };
        if let Some(out) = head[8..].first_chunk_mut() {
            masked.emit(out);
        }
        Self::of(&mut head, udp)
    }

    fn of(head: &mut [u8], udp: &UdpRepr) -> Self {
        if let Some(out) = head.last_chunk_mut() {
            UdpRepr { checksum: 0xffff, ..*udp }.emit(out);
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(head);
        Self(hasher)
    }

    /// The ICRC of a packet with these headers. `transport` is BTH to padding.
    #[must_use]
    pub fn icrc(&self, transport: &[u8]) -> Icrc {
        let mut hasher = self.0.clone();
        let (front, rest) = transport.split_at(transport.len().min(BthRepr::LEN));
        let mut masked = [0xff; BthRepr::LEN];
        masked[..front.len()].copy_from_slice(front);
        masked[BTH_RESERVED] = 0xff;
        hasher.update(&masked[..front.len()]);
        hasher.update(rest);
        Icrc(hasher.finalize())
    }

    /// What masking does to the ICRC of packets as long as this one in which the masked bits are clear; `None`
    /// if they are not clear in this one.
    #[must_use]
    pub fn masking(&self, transport: &[u8]) -> Option<IcrcMasking> {
        (transport.get(BTH_RESERVED) == Some(&0))
            .then(|| IcrcMasking(self.icrc(transport).0 ^ self.plain(transport)))
    }

    /// The same as [`icrc`](Self::icrc), without a copy of the header where its masked bits are clear.
    /// `masking` is that of packets of this length.
    #[inline]
    #[must_use]
    pub fn icrc_with(&self, transport: &[u8], masking: IcrcMasking) -> Icrc {
        if transport.get(BTH_RESERVED) == Some(&0) {
            Icrc(self.plain(transport) ^ masking.0)
        } else {
            self.icrc(transport)
        }
    }

    fn plain(&self, transport: &[u8]) -> u32 {
        let mut hasher = self.0.clone();
        hasher.update(transport);
        hasher.finalize()
    }
}

/// The difference that one masked byte makes: a CRC is affine, so it depends on the byte's value and on the number of
/// bytes that follow it, and on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcrcMasking(u32);

impl Icrc {
    /// The ICRC of a packet over IPv4, see [`IcrcPrefix::ipv4`]. `transport` is BTH to padding.
    #[must_use]
    pub fn ipv4(ip: &Ipv4Repr, udp: &UdpRepr, transport: &[u8]) -> Self {
        IcrcPrefix::ipv4(ip, udp).icrc(transport)
    }

    /// The ICRC of a packet over IPv6, see [`IcrcPrefix::ipv6`]. `transport` is BTH to padding.
    #[must_use]
    pub fn ipv6(ip: &Ipv6Repr, udp: &UdpRepr, transport: &[u8]) -> Self {
        IcrcPrefix::ipv6(ip, udp).icrc(transport)
    }

    /// The last four bytes of a packet.
    #[must_use]
    pub fn from_bytes(bytes: [u8; ICRC_LEN]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }

    /// The four bytes that end a packet.
    #[must_use]
    pub fn to_bytes(self) -> [u8; ICRC_LEN] {
        self.0.to_le_bytes()
    }
}

/// Acceptance of an IPv4 packet whose identification field is not known.
///
/// A UDP socket does not show the identification, which the ICRC covers. But a CRC is affine: the CRC with
/// identification `i` differs from the one with 0 by a linear function of `i` that depends only on the
/// number of bytes that follow. That function is `i` times a power of x in the field of the CRC, so one
/// multiplication by the inverse power tells which `i` explains a difference, or that none of 16 bits
/// does. What remains of the check is 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownIdentification;

impl UnknownIdentification {
    /// The longest transport packet that is considered, BTH to padding.
    pub const MAX_LEN: usize = 4 * (POWERS - 1) - AFTER;

    /// The identification with which a packet has the ICRC `received`, given the ICRC that it has with
    /// identification 0 and the length from BTH to padding. `None` if there is none: the packet is corrupt.
    #[must_use]
    pub fn explain(with_zero: Icrc, received: Icrc, transport_len: usize) -> Option<u16> {
        let difference = with_zero.0 ^ received.0;
        if difference == 0 {
            return Some(0);
        }
        let distance = transport_len + AFTER;
        if !distance.is_multiple_of(4) {
            return None;
        }
        let power = *INVERSE_POWERS.get(distance / 4)?;
        // The first byte on the wire is the low one here: the CRC is bit-reflected.
        u16::try_from(multiply(difference, power)).ok().map(u16::swap_bytes)
    }
}

/// Bytes from the identification field to BTH.
const AFTER: usize = Ipv4Repr::LEN - 4 + UdpRepr::LEN;
/// Enough for a path MTU of 4096 and all headers.
const POWERS: usize = 1056;

/// CRC-32 polynomial, bit-reflected: the highest bit is the coefficient of x^0.
const POLYNOMIAL: u32 = 0xedb8_8320;

/// x^(-32 n) for each n: undoes n words of zeros.
static INVERSE_POWERS: [u32; POWERS] = {
    let mut table = [0; POWERS];
    let mut power = 1 << 31;
    let mut n = 0;
    while n < POWERS {
        table[n] = power;
        let mut bit = 0;
        while bit < 32 {
            power = divide_by_x(power);
            bit += 1;
        }
        n += 1;
    }
    table
};

const fn divide_by_x(a: u32) -> u32 {
    // Multiplication shifts right and adds the polynomial when a bit fell out; its top bit tells.
    if a >> 31 == 1 { (a ^ POLYNOMIAL) << 1 | 1 } else { a << 1 }
}

/// Product of two polynomials modulo that of the CRC, without branches that depend on the data.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        let mask = 0u32.wrapping_sub(a << bit >> 31);
        product ^= b & mask;
        let carry = 0u32.wrapping_sub(b & 1);
        b = b >> 1 ^ POLYNOMIAL & carry;
        bit += 1;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(identification: u16, transport: &[u8]) -> Icrc {
        let len = u16::try_from(transport.len() + ICRC_LEN + UdpRepr::LEN).expect("short");
        let ip = Ipv4Repr {
            traffic_class: 0,
            total_len: len + 20,
            identification,
            dont_fragment: true,
            hop_limit: 64,
            src: [127, 0, 0, 1],
            dst: [127, 0, 0, 2],
        };
        let udp = UdpRepr { src_port: 0xc000, dst_port: crate::wire::ROCE_V2_PORT, len, checksum: 0 };
        Icrc::ipv4(&ip, &udp, transport)
    }

    #[test]
    fn every_identification_explains_itself() {
        let transport = [0x5a; 12 + 64];
        let zero = packet(0, &transport);
        for identification in 0..=u16::MAX {
            let icrc = packet(identification, &transport);
            assert_eq!(UnknownIdentification::explain(zero, icrc, transport.len()), Some(identification));
        }
    }

    #[test]
    fn all_lengths_are_covered() {
        for len in (12..=4096 + 40).step_by(4) {
            let transport = vec![0x11; len];
            let (zero, icrc) = (packet(0, &transport), packet(0x1234, &transport));
            assert_eq!(UnknownIdentification::explain(zero, icrc, len), Some(0x1234), "length {len}");
        }
        let long = vec![0; UnknownIdentification::MAX_LEN + 4];
        assert_eq!(UnknownIdentification::explain(packet(0, &long), packet(1, &long), long.len()), None);
    }

    /// One flipped bit is never explained; noise is explained once in 65,536 times.
    #[test]
    fn corruption_is_not_explained() {
        let transport = [7; 12 + 256];
        let good = packet(3, &transport);
        for bit in 0..transport.len() * 8 {
            let mut corrupt = transport;
            corrupt[bit / 8] ^= 1 << (bit % 8);
            if bit / 8 == BTH_RESERVED {
                continue;
            }
            let zero = packet(0, &corrupt);
            assert_eq!(UnknownIdentification::explain(zero, good, transport.len()), None, "bit {bit}");
        }
    }

    #[test]
    fn fields_that_routers_change_do_not_matter() {
        let ip = Ipv6Repr {
            traffic_class: 0,
            flow_label: 0,
            payload_len: 28,
            next_header: Ipv6Repr::UDP,
            hop_limit: 64,
            src: [1; 16],
            dst: [2; 16],
        };
        let udp = UdpRepr { src_port: 1, dst_port: 4791, len: 28, checksum: 0 };
        let icrc = Icrc::ipv6(&ip, &udp, &[0; 16]);
        let hopped = Ipv6Repr { traffic_class: 3, flow_label: 7, hop_limit: 63, ..ip };
        let mut marked = [0; 16];
        marked[BTH_RESERVED] = 0x80;
        assert_eq!(Icrc::ipv6(&hopped, &UdpRepr { checksum: 9, ..udp }, &marked), icrc);
        assert_ne!(Icrc::ipv6(&Ipv6Repr { dst: [3; 16], ..ip }, &udp, &[0; 16]), icrc);
    }
}
