//! Immediate extended transport header (clause 9.3.6).

use super::field::{array_at, put};

/// View of an immediate extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct ImmDt<'a>(&'a [u8; ImmDtRepr::LEN]);

impl<'a> ImmDt<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Immediate data in the byte order of the wire, which is that of a completion.
    #[must_use]
    pub fn data(self) -> [u8; 4] {
        array_at(self.0, 0)
    }
}

/// An immediate extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImmDtRepr {
    /// Immediate data in the byte order of the wire, which is that of a completion.
    pub data: [u8; 4],
}

impl ImmDtRepr {
    /// Length in bytes.
    pub const LEN: usize = 4;

    /// Reads all fields.
    #[must_use]
    pub fn parse(immdt: ImmDt<'_>) -> Self {
        Self { data: immdt.data() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; ImmDtRepr::LEN] = [1, 2, 3, 4];
    const REPR: ImmDtRepr = ImmDtRepr { data: [1, 2, 3, 4] };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(ImmDtRepr::parse(ImmDt::new(&GOLDEN).expect("long enough")), REPR);
        assert!(ImmDt::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; ImmDtRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
