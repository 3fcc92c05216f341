//! Atomic extended transport header (clause 9.3.4).

use super::field::{put, u32_at, u64_at};

/// View of an atomic extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct AtomicEth<'a>(&'a [u8; AtomicEthRepr::LEN]);

impl<'a> AtomicEth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Virtual address on the responder, a multiple of eight.
    #[must_use]
    pub fn va(self) -> u64 {
        u64_at(self.0, 0)
    }

    /// Remote key.
    #[must_use]
    pub fn rkey(self) -> u32 {
        u32_at(self.0, 8)
    }

    /// What to store (compare and swap) or to add (fetch and add).
    #[must_use]
    pub fn swap_add(self) -> u64 {
        u64_at(self.0, 12)
    }

    /// What must be found for the swap to happen.
    #[must_use]
    pub fn compare(self) -> u64 {
        u64_at(self.0, 20)
    }
}

/// An atomic extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtomicEthRepr {
    /// Virtual address on the responder, a multiple of eight.
    pub va: u64,
    /// Remote key.
    pub rkey: u32,
    /// What to store (compare and swap) or to add (fetch and add).
    pub swap_add: u64,
    /// What must be found for the swap to happen.
    pub compare: u64,
}

impl AtomicEthRepr {
    /// Length in bytes.
    pub const LEN: usize = 28;

    /// Reads all fields.
    #[must_use]
    pub fn parse(atomic: AtomicEth<'_>) -> Self {
        Self { va: atomic.va(), rkey: atomic.rkey(), swap_add: atomic.swap_add(), compare: atomic.compare() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.va.to_be_bytes());
        put(out, 8, self.rkey.to_be_bytes());
        put(out, 12, self.swap_add.to_be_bytes());
        put(out, 20, self.compare.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; AtomicEthRepr::LEN] =
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0];
    const REPR: AtomicEthRepr =
        AtomicEthRepr { va: 0x0102_0304_0506_0708, rkey: 0x090a_0b0c, swap_add: 2, compare: 256 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(AtomicEthRepr::parse(AtomicEth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(AtomicEth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; AtomicEthRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
