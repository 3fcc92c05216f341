//! Datagram extended transport header (clause 9.3.2).

use super::Qpn;
use super::field::{byte_and_u24, put, u24_at, u32_at};

/// View of a datagram extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct Deth<'a>(&'a [u8; DethRepr::LEN]);

impl<'a> Deth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Queue key, which must be the receiver's.
    #[must_use]
    pub fn qkey(self) -> u32 {
        u32_at(self.0, 0)
    }

    /// Queue pair that sent the datagram.
    #[must_use]
    pub fn src_qp(self) -> Qpn {
        u24_at(self.0, 5)
    }
}

/// A datagram extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DethRepr {
    /// Queue key.
    pub qkey: u32,
    /// Source queue pair.
    pub src_qp: Qpn,
}

impl DethRepr {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// Reads all fields.
    #[must_use]
    pub fn parse(deth: Deth<'_>) -> Self {
        Self { qkey: deth.qkey(), src_qp: deth.src_qp() }
    }

    /// Writes the header; the reserved byte is zero.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.qkey.to_be_bytes());
        put(out, 4, byte_and_u24(0, self.src_qp));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; DethRepr::LEN] = [0x11, 0x11, 0x11, 0x12, 0, 1, 2, 3];
    const REPR: DethRepr = DethRepr { qkey: 0x1111_1112, src_qp: 0x01_0203 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(DethRepr::parse(Deth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(Deth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; DethRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
