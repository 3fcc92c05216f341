//! Acknowledge extended transport header (clause 9.3.5).

use super::field::{byte_and_u24, put, u24_at};

/// View of an acknowledge extended transport header.
#[derive(Debug, Clone, Copy)]
pub struct Aeth<'a>(&'a [u8; AethRepr::LEN]);

impl<'a> Aeth<'a> {
    /// The header at the front of `bytes`, or `None` if they are too few.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.first_chunk().map(Self)
    }

    /// What is acknowledged, and how.
    #[must_use]
    pub fn syndrome(self) -> Syndrome {
        Syndrome(self.0[0])
    }

    /// Message sequence number: how many messages the responder has completed, 24 bits.
    #[must_use]
    pub fn msn(self) -> u32 {
        u24_at(self.0, 1)
    }
}

/// An acknowledge extended transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AethRepr {
    /// What is acknowledged, and how.
    pub syndrome: Syndrome,
    /// Message sequence number, 24 bits.
    pub msn: u32,
}

impl AethRepr {
    /// Length in bytes.
    pub const LEN: usize = 4;

    /// Reads all fields.
    #[must_use]
    pub fn parse(aeth: Aeth<'_>) -> Self {
        Self { syndrome: aeth.syndrome(), msn: aeth.msn() }
    }

    /// Writes the header.
    pub fn emit(&self, out: &mut [u8; Self::LEN]) {
        put(out, 0, byte_and_u24(self.syndrome.0, self.msn));
    }
}

/// The first byte of the header: its kind in bits 5 and 6, a value in bits 0 to 4 (table 45 of the specification).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syndrome(pub u8);

impl Syndrome {
    /// Acknowledgement without flow control: credits are unlimited (clause 9.7.7.2.4).
    pub const ACK: Self = Self(0x1f);
    const KIND: u8 = 0x60;
    const VALUE: u8 = 0x1f;
    const RNR: u8 = 0x20;
    const NAK: u8 = 0x60;

    /// A negative acknowledgement.
    #[must_use]
    pub const fn nak(code: NakCode) -> Self {
        Self(Self::NAK | code.0 & Self::VALUE)
    }

    /// Receiver not ready, with the least time to wait.
    #[must_use]
    pub const fn rnr_nak(timer: RnrTimer) -> Self {
        Self(Self::RNR | timer.value())
    }

    /// Whether this is a plain acknowledgement, whatever its credits.
    #[must_use]
    pub const fn is_ack(self) -> bool {
        self.0 & Self::KIND == 0
    }

    /// The timer of an RNR NAK.
    #[must_use]
    pub const fn as_rnr_nak(self) -> Option<RnrTimer> {
        if self.0 & Self::KIND == Self::RNR { Some(RnrTimer::new(self.0)) } else { None }
    }

    /// The code of a NAK, known or not.
    #[must_use]
    pub const fn as_nak(self) -> Option<NakCode> {
        if self.0 & Self::KIND == Self::NAK { Some(NakCode(self.0 & Self::VALUE)) } else { None }
    }
}

/// Why a request was refused (table 46 of the specification).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NakCode(pub u8);

impl NakCode {
    /// A packet is missing.
    pub const PSN_SEQUENCE: Self = Self(0);
    /// The request is malformed or not supported.
    pub const INVALID_REQUEST: Self = Self(1);
    /// Key, bounds or access rights are wrong.
    pub const REMOTE_ACCESS: Self = Self(2);
    /// The responder failed on its own account.
    pub const REMOTE_OPERATIONAL: Self = Self(3);
    /// Invalid RD request; no meaning for other transports.
    pub const INVALID_RD_REQUEST: Self = Self(4);
}

/// A receiver-not-ready timer field, five bits (table 47 of the specification).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RnrTimer(u8);

impl RnrTimer {
    /// The low five bits of `value`.
    #[must_use]
    pub const fn new(value: u8) -> Self {
        Self(value & 0x1f)
    }

    /// The field, 0 to 31.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.0
    }

    /// How long to wait, in nanoseconds: 10 us (field 1) to 491.52 ms (field 31), and 655.36 ms for field 0.
    #[must_use]
    pub const fn nanoseconds(self) -> u64 {
        // From 20 us (2) on the steps alternate: times 1.5, times 4/3.
        match self.0 {
            0 => 655_360_000,
            1 => 10_000,
            n if n % 2 == 0 => 20_000 << ((n - 2) / 2),
            n => 30_000 << ((n - 3) / 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; AethRepr::LEN] = [0x2c, 0, 0x10, 0x01];
    const REPR: AethRepr = AethRepr { syndrome: Syndrome::rnr_nak(RnrTimer::new(12)), msn: 0x1001 };

    #[test]
    fn parses_golden_bytes() {
        assert_eq!(AethRepr::parse(Aeth::new(&GOLDEN).expect("long enough")), REPR);
        assert!(Aeth::new(&GOLDEN[1..]).is_none());
    }

    #[test]
    fn emits_golden_bytes() {
        let mut out = [0xaa; AethRepr::LEN];
        REPR.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }

    #[test]
    fn syndromes_are_of_one_kind() {
        assert!(Syndrome::ACK.is_ack());
        assert_eq!(Syndrome::nak(NakCode::REMOTE_ACCESS).0, 0x62);
        assert_eq!(Syndrome(0x62).as_nak(), Some(NakCode::REMOTE_ACCESS));
        assert_eq!(Syndrome(0x62).as_rnr_nak(), None);
        assert_eq!(Syndrome(0x2e).as_rnr_nak(), Some(RnrTimer::new(14)));
        let reserved = Syndrome(0x40);
        assert!(!reserved.is_ack() && reserved.as_nak().is_none() && reserved.as_rnr_nak().is_none());
    }

    #[test]
    fn rnr_timers_are_those_of_the_table() {
        let microseconds = [
            655_360, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280, 1920, 2560, 3840, 5120,
            7680, 10240, 15360, 20480, 30720, 40960, 61440, 81920, 122_880, 163_840, 245_760, 327_680,
            491_520,
        ];
        for (field, expected) in (0..).zip(microseconds) {
            assert_eq!(RnrTimer::new(field).nanoseconds(), expected * 1000, "field {field}");
        }
    }
}
