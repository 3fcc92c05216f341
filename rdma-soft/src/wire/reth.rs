//! RDMA extended transport header (clause 9.3.3).

use super::field::{put, u32_at, u64_at};

/// View of a RDMA extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct Reth<'a>(&'a [u8; RethRepr::LEN]);

impl<'a> Reth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Virtual address on the responder.
    #[must_use]
    pub fn va(self) -> u64 {
        u64_at(self.0, 0)
    }

    /// Remote key.
    #[must_use]
    pub fn rkey(self) -> u32 {
        u32_at(self.0, 8)
    }

    /// Length of the whole message in bytes.
    #[must_use]
    pub fn dma_len(self) -> u32 {
        u32_at(self.0, 12)
    }
}

/// A RDMA extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RethRepr {
    /// Virtual address on the responder.
    pub va: u64,
    /// Remote key.
    pub rkey: u32,
    /// Length of the whole message in bytes.
    pub dma_len: u32,
}

impl RethRepr {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// Reads all fields.
    #[must_use]
    pub fn parse(reth: Reth<'_>) -> Self {
        Self { va: reth.va(), rkey: reth.rkey(), dma_len: reth.dma_len() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.va.to_be_bytes());
        put(out, 8, self.rkey.to_be_bytes());
        put(out, 12, self.dma_len.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; RethRepr::LEN] =
        [0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x11, 0x12, 0x13, 0x14, 0x00, 0x00, 0x10, 0x01];
    const REPR: RethRepr = RethRepr { va: 0x0102_0304_0506_0708, rkey: 0x1112_1314, dma_len: 4097 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(RethRepr::parse(Reth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(Reth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; RethRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
