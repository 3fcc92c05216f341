//! IPv4 header, as far as RoCEv2 needs it: without options, never fragmented.

use super::field::{array_at, put, u16_at};

const VERSION_IHL: u8 = 0x45;
const DONT_FRAGMENT: u16 = 0x4000;

/// View of an IPv4 header.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a>(&'a [u8; Ipv4Repr::LEN]);

impl<'a> Ipv4<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few, or it is another version or has options.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().filter(|header: &&[u8; Ipv4Repr::LEN]| header[0] == VERSION_IHL).map(Self)
    }

    /// Differentiated services field and ECN bits.
    #[must_use]
    pub fn traffic_class(self) -> u8 {
        self.0[1]
    }

    /// Length of header and data.
    #[must_use]
    pub fn total_len(self) -> u16 {
        u16_at(self.0, 2)
    }

    /// Identification.
    #[must_use]
    pub fn identification(self) -> u16 {
        u16_at(self.0, 4)
    }

    /// Flags and fragment offset.
    #[must_use]
    pub fn fragment(self) -> u16 {
        u16_at(self.0, 6)
    }

    /// Time to live.
    #[must_use]
    pub fn hop_limit(self) -> u8 {
        self.0[8]
    }

    /// Protocol number.
    #[must_use]
    pub fn protocol(self) -> u8 {
        self.0[9]
    }

    /// Source address.
    #[must_use]
    pub fn src(self) -> [u8; 4] {
        array_at(self.0, 12)
    }

    /// Destination address.
    #[must_use]
    pub fn dst(self) -> [u8; 4] {
        array_at(self.0, 16)
    }
}

/// An IPv4 header of a UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Repr {
    /// Differentiated services field and ECN bits.
    pub traffic_class: u8,
    /// Length of header and data.
    pub total_len: u16,
    /// Identification.
    pub identification: u16,
    /// Whether routers may not fragment.
    pub dont_fragment: bool,
    /// Time to live.
    pub hop_limit: u8,
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
}

impl Ipv4Repr {
    /// Length in bytes.
    pub const LEN: usize = 20;
    /// Protocol number of UDP.
    pub const UDP: u8 = 17;

    /// Reads all fields; `None` unless it holds an unfragmented UDP datagram.
    #[must_use]
    pub fn parse(ip: Ipv4<'_>) -> Option<Self> {
        if ip.protocol() != Self::UDP || ip.fragment() & !DONT_FRAGMENT != 0 {
            return None;
        }
        Some(Self {
            traffic_class: ip.traffic_class(),
            total_len: ip.total_len(),
            identification: ip.identification(),
            dont_fragment: ip.fragment() == DONT_FRAGMENT,
            hop_limit: ip.hop_limit(),
            src: ip.src(),
            dst: ip.dst(),
        })
    }

    /// Writes the header with its checksum.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        self.emit_without_checksum(out);
        let sum: u32 =
            out.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let [_, _, b0, b1] = (!((folded & 0xffff) + (folded >> 16))).to_be_bytes();
        put(out, 10, [b0, b1]);
    }

    /// Writes the header with a checksum of zero.
    pub(super) fn emit_without_checksum(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, [VERSION_IHL, self.traffic_class]);
        put(out, 2, self.total_len.to_be_bytes());
        put(out, 4, self.identification.to_be_bytes());
        put(out, 6, (if self.dont_fragment { DONT_FRAGMENT } else { 0 }).to_be_bytes());
        put(out, 8, [self.hop_limit, Self::UDP, 0, 0]);
        put(out, 12, self.src);
        put(out, 16, self.dst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; Ipv4Repr::LEN] =
        [0x45, 0x02, 0x00, 0x4c, 0x12, 0x34, 0x40, 0x00, 0x40, 0x11, 0x13, 0xa5, 10, 98, 0, 1, 10, 98, 0, 2];
    const REPR: Ipv4Repr = Ipv4Repr {
        traffic_class: 2,
        total_len: 76,
        identification: 0x1234,
        dont_fragment: true,
        hop_limit: 64,
        src: [10, 98, 0, 1],
        dst: [10, 98, 0, 2],
    };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(Ipv4::new(&GOLDEN).and_then(Ipv4Repr::parse), Some(REPR));
        assert!(Ipv4::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; Ipv4Repr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
