//! Invalidate extended transport header (clause 9.3.7).

use super::field::{put, u32_at};

/// View of an invalidate extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct Ieth<'a>(&'a [u8; IethRepr::LEN]);

impl<'a> Ieth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// The remote key to invalidate.
    #[must_use]
    pub fn rkey(self) -> u32 {
        u32_at(self.0, 0)
    }
}

/// An invalidate extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IethRepr {
    /// The remote key to invalidate.
    pub rkey: u32,
}

impl IethRepr {
    /// Length in bytes.
    pub const LEN: usize = 4;

    /// Reads all fields.
    #[must_use]
    pub fn parse(ieth: Ieth<'_>) -> Self {
        Self { rkey: ieth.rkey() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.rkey.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; IethRepr::LEN] = [1, 2, 3, 4];
    const REPR: IethRepr = IethRepr { rkey: 0x0102_0304 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(IethRepr::parse(Ieth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(Ieth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; IethRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
