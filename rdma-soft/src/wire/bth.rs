//! Base transport header (clause 9.2).

use super::field::{array_at, byte_and_u24, put, u16_at, u32_at};
use super::{Opcode, Psn};

/// A queue pair number, 24 bits.
pub type Qpn = u32;

/// The partition that every RoCE port is a full member of.
pub const DEFAULT_PKEY: u16 = 0xffff;

const SOLICITED: u8 = 0x80;
const MIGRATION: u8 = 0x40;
const PAD_SHIFT: u8 = 4;
const ACK_REQUEST: u8 = 0x80;
const FECN: u8 = 0x80;
const BECN: u8 = 0x40;

/// View of a base transport header.
#[derive(Debug, Clone, Copy)]
pub struct Bth<'a>(&'a [u8; BthRepr::LEN]);

impl<'a> Bth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// Operation code.
    #[must_use]
    pub fn opcode(self) -> Opcode {
        Opcode::new(self.0[0])
    }

    /// Solicited event.
    #[must_use]
    pub fn solicited(self) -> bool {
        self.0[1] & SOLICITED != 0
    }

    /// Path migration state.
    #[must_use]
    pub fn migration(self) -> bool {
        self.0[1] & MIGRATION != 0
    }

    /// Bytes that fill the payload up to a multiple of four, 0 to 3.
    #[must_use]
    pub fn pad(self) -> u8 {
        (self.0[1] >> PAD_SHIFT) & 3
    }

    /// Transport header version.
    #[must_use]
    pub fn version(self) -> u8 {
        self.0[1] & 0xf
    }

    /// Partition key.
    #[must_use]
    pub fn pkey(self) -> u16 {
        u16_at(self.0, 2)
    }

    /// Forward explicit congestion notification.
    #[must_use]
    pub fn fecn(self) -> bool {
        self.0[4] & FECN != 0
    }

    /// Backward explicit congestion notification.
    #[must_use]
    pub fn becn(self) -> bool {
        self.0[4] & BECN != 0
    }

    /// Destination queue pair.
    #[must_use]
    pub fn dest_qp(self) -> Qpn {
        // One load of four bytes is cheaper than three of one.
        u32_at(self.0, 4) & 0xff_ffff
    }

    /// Whether the requester wants an acknowledgement.
    #[must_use]
    pub fn ack_request(self) -> bool {
        self.0[8] & ACK_REQUEST != 0
    }

    /// Packet sequence number.
    #[must_use]
    pub fn psn(self) -> Psn {
        Psn::new(u32_at(self.0, 8))
    }

    /// Six bits after BECN and seven after the acknowledge request: no meaning, but kept.
    #[must_use]
    pub fn reserved(self) -> [u8; 2] {
        let [first, second]: [u8; 2] = [self.0[4], array_at::<12, 1>(self.0, 8)[0]];
        [first & !(FECN | BECN), second & !ACK_REQUEST]
    }
}

/// A base transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BthRepr {
    /// Operation code.
    pub opcode: Opcode,
    /// Solicited event.
    pub solicited: bool,
    /// Path migration state.
    pub migration: bool,
    /// Bytes of padding, 0 to 3.
    pub pad: u8,
    /// Transport header version, 0 to 15.
    pub version: u8,
    /// Partition key.
    pub pkey: u16,
    /// Forward explicit congestion notification.
    pub fecn: bool,
    /// Backward explicit congestion notification.
    pub becn: bool,
    /// Destination queue pair.
    pub dest_qp: Qpn,
    /// Whether an acknowledgement is wanted.
    pub ack_request: bool,
    /// Packet sequence number.
    pub psn: Psn,
    /// Reserved bits, see [`Bth::reserved`].
    pub reserved: [u8; 2],
}

impl BthRepr {
    /// Length in bytes.
    pub const LEN: usize = 12;

    /// A header with all optional bits zero, in the default partition.
    #[must_use]
    pub fn new(opcode: Opcode, dest_qp: Qpn, psn: Psn) -> Self {
        Self {
            opcode,
            solicited: false,
            migration: false,
            pad: 0,
            version: super::TRANSPORT_VERSION,
            pkey: DEFAULT_PKEY,
            fecn: false,
            becn: false,
            dest_qp,
            ack_request: false,
            psn,
            reserved: [0; 2],
        }
    }

    /// Reads all fields.
    #[must_use]
    pub fn parse(bth: Bth<'_>) -> Self {
        Self {
            opcode: bth.opcode(),
            solicited: bth.solicited(),
            migration: bth.migration(),
            pad: bth.pad(),
            version: bth.version(),
            pkey: bth.pkey(),
            fecn: bth.fecn(),
            becn: bth.becn(),
            dest_qp: bth.dest_qp(),
            ack_request: bth.ack_request(),
            psn: bth.psn(),
            reserved: bth.reserved(),
        }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        let bit = |set: bool, mask: u8| if set { mask } else { 0 };
        let flags = bit(self.solicited, SOLICITED)
            | bit(self.migration, MIGRATION)
            | (self.pad & 3) << PAD_SHIFT
            | self.version & 0xf;
        let notification = bit(self.fecn, FECN) | bit(self.becn, BECN) | self.reserved[0] & !(FECN | BECN);
        let request = bit(self.ack_request, ACK_REQUEST) | self.reserved[1] & !ACK_REQUEST;
        let [pkey_high, pkey_low] = self.pkey.to_be_bytes();
        // Whole words: every packet goes through here.
        put(out, 0, [self.opcode.value(), flags, pkey_high, pkey_low]);
        put(out, 4, byte_and_u24(notification, self.dest_qp));
        put(out, 8, byte_and_u24(request, self.psn.value()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; 12] = [0x04, 0xb0, 0xff, 0xff, 0xc1, 0x00, 0x00, 0x11, 0x82, 0xff, 0xff, 0xfe];

    fn repr() -> BthRepr {
        BthRepr {
            solicited: true,
            pad: 3,
            fecn: true,
            becn: true,
            ack_request: true,
            reserved: [1, 2],
            ..BthRepr::new(Opcode::RC_SEND_ONLY, 0x11, Psn::new(0xff_fffe))
        }
    }

    #[test]
    fn parses_golden_bytes() {
        let bth = Bth::new(&GOLDEN).expect("long enough");
        assert_eq!(BthRepr::parse(bth), repr());
        assert!(Bth::new(&GOLDEN[..11]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; 12];
        repr().emit(&mut out);
        assert_eq!(out, GOLDEN);
    }
}
