//! Atomic acknowledge extended transport header (clause 9.3.5.3).

use super::field::{put, u64_at};

/// View of an atomic acknowledge extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct AtomicAckEth<'a>(&'a [u8; AtomicAckEthRepr::LEN]);

impl<'a> AtomicAckEth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// What stood at the address before the operation.
    #[must_use]
    pub fn original(self) -> u64 {
        u64_at(self.0, 0)
    }
}

/// An atomic acknowledge extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtomicAckEthRepr {
    /// What stood at the address before the operation.
    pub original: u64,
}

impl AtomicAckEthRepr {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// Reads all fields.
    #[must_use]
    pub fn parse(ack: AtomicAckEth<'_>) -> Self {
        Self { original: ack.original() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.original.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; AtomicAckEthRepr::LEN] = [0, 0, 0, 0, 0, 0, 1, 2];
    const REPR: AtomicAckEthRepr = AtomicAckEthRepr { original: 258 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(AtomicAckEthRepr::parse(AtomicAckEth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(AtomicAckEth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; AtomicAckEthRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
