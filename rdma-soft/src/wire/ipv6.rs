//! IPv6 header, whose layout is also that of the global route header (clause 8.3).

use super::field::{array_at, put, u16_at, u32_at};

const VERSION: u32 = 6 << 28;
const FLOW_LABEL: u32 = 0xf_ffff;

/// View of an IPv6 header.
#[derive(Debug, Clone, Copy)]
pub struct Ipv6<'a>(&'a [u8; Ipv6Repr::LEN]);

impl<'a> Ipv6<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few or another version.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().filter(|header: &&[u8; Ipv6Repr::LEN]| header[0] >> 4 == 6).map(Self)
    }

    /// Differentiated services field and ECN bits.
    #[must_use]
    pub fn traffic_class(self) -> u8 {
        self.0[0] << 4 | self.0[1] >> 4
    }

    /// Flow label, 20 bits.
    #[must_use]
    pub fn flow_label(self) -> u32 {
        u32_at(self.0, 0) & FLOW_LABEL
    }

    /// Length of what follows the header.
    #[must_use]
    pub fn payload_len(self) -> u16 {
        u16_at(self.0, 4)
    }

    /// Protocol of what follows.
    #[must_use]
    pub fn next_header(self) -> u8 {
        self.0[6]
    }

    /// Hop limit.
    #[must_use]
    pub fn hop_limit(self) -> u8 {
        self.0[7]
    }

    /// Source address.
    #[must_use]
    pub fn src(self) -> [u8; 16] {
        array_at(self.0, 8)
    }

    /// Destination address.
    #[must_use]
    pub fn dst(self) -> [u8; 16] {
        array_at(self.0, 24)
    }
}

/// An IPv6 header, or a global route header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Repr {
    /// Differentiated services field and ECN bits.
    pub traffic_class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Length of what follows the header.
    pub payload_len: u16,
    /// Protocol of what follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
}

impl Ipv6Repr {
    /// Length in bytes.
    pub const LEN: usize = 40;
    /// Next header of UDP.
    pub const UDP: u8 = 17;

    /// Reads all fields.
    #[must_use]
    pub fn parse(ip: Ipv6<'_>) -> Self {
        Self {
            traffic_class: ip.traffic_class(),
            flow_label: ip.flow_label(),
            payload_len: ip.payload_len(),
            next_header: ip.next_header(),
            hop_limit: ip.hop_limit(),
            src: ip.src(),
            dst: ip.dst(),
        }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        let first = VERSION | u32::from(self.traffic_class) << 20 | self.flow_label & FLOW_LABEL;
        put(out, 0, first.to_be_bytes());
        put(out, 4, self.payload_len.to_be_bytes());
        put(out, 6, [self.next_header, self.hop_limit]);
        put(out, 8, self.src);
        put(out, 24, self.dst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; Ipv6Repr::LEN] = [
        0x60, 0x2a, 0xbc, 0xde, 0x00, 0x38, 0x11, 0x40, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
        0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    ];

    fn repr() -> Ipv6Repr {
        let address = |last| [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        Ipv6Repr {
            traffic_class: 2,
            flow_label: 0xa_bcde,
            payload_len: 56,
            next_header: Ipv6Repr::UDP,
            hop_limit: 64,
            src: address(1),
            dst: address(2),
        }
    }

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(Ipv6::new(&GOLDEN).map(Ipv6Repr::parse), Some(repr()));
        assert!(Ipv6::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; Ipv6Repr::LEN];
        repr().emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
