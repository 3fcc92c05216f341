//! UDP header.

use super::field::{put, u16_at};

/// UDP destination port of RoCEv2 (annex A17.3.2).
pub const ROCE_V2_PORT: u16 = 4791;

/// View of a UDP header.
#[derive(Debug, Clone, Copy)]
pub struct Udp<'a>(&'a [u8; UdpRepr::LEN]);

impl<'a> Udp<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Source port.
    #[must_use]
    pub fn src_port(self) -> u16 {
        u16_at(self.0, 0)
    }

    /// Destination port.
    #[must_use]
    pub fn dst_port(self) -> u16 {
        u16_at(self.0, 2)
    }

    /// Length of header and data.
    #[must_use]
    pub fn len(self) -> u16 {
        u16_at(self.0, 4)
    }

    /// Whether the length field says that nothing follows the header.
    #[must_use]
    pub fn is_empty(self) -> bool {
        usize::from(self.len()) <= UdpRepr::LEN
    }

    /// Checksum, zero if there is none.
    #[must_use]
    pub fn checksum(self) -> u16 {
        u16_at(self.0, 6)
    }
}

/// A UDP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpRepr {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Length of header and data.
    pub len: u16,
    /// Checksum, zero if there is none.
    pub checksum: u16,
}

impl UdpRepr {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// Reads all fields.
    #[must_use]
    pub fn parse(udp: Udp<'_>) -> Self {
        Self { src_port: udp.src_port(), dst_port: udp.dst_port(), len: udp.len(), checksum: udp.checksum() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.src_port.to_be_bytes());
        put(out, 2, self.dst_port.to_be_bytes());
        put(out, 4, self.len.to_be_bytes());
        put(out, 6, self.checksum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; UdpRepr::LEN] = [0xc0, 0x01, 0x12, 0xb7, 0x00, 0x38, 0, 0];
    const REPR: UdpRepr = UdpRepr { src_port: 0xc001, dst_port: ROCE_V2_PORT, len: 56, checksum: 0 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(UdpRepr::parse(Udp::new(&GOLDEN).expect("long enough")), REPR);
        assert!(Udp::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; UdpRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
