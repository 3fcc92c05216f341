//! A whole transport packet: BTH, extension headers, payload, padding and ICRC.

use super::*;

/// Length of the longest BTH with extension headers (an atomic request).
pub const MAX_TRANSPORT_HEADER_LEN: usize = BthRepr::LEN + AtomicEthRepr::LEN;

/// Why a packet was rejected before any queue pair saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseError {
    /// Too short for BTH, its extension headers, its padding and the ICRC.
    TooShort,
    /// The transport version is not zero.
    Version,
    /// The operation code is not in the table.
    UnknownOpcode(Opcode),
    /// Padding exceeds the payload, or the packet is no multiple of four bytes.
    Pad,
    /// Payload where the operation code has none.
    UnexpectedPayload,
}

impl std::fmt::Display for ParseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooShort => f.write_str("packet too short for its headers"),
            Self::Version => f.write_str("unknown transport version"),
            Self::UnknownOpcode(opcode) => write!(f, "unknown opcode {:#04x}", opcode.value()),
            Self::Pad => f.write_str("invalid pad count"),
            Self::UnexpectedPayload => f.write_str("payload where none may be"),
        }
    }
}

impl std::error::Error for ParseError {}

/// A packet whose shape was checked: the operation code is known, all its headers are there, and padding
/// and ICRC are outside of the payload.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    /// The base transport header, of which few fields are read at a time.
    pub bth: Bth<'a>,
    info: &'static OpcodeInfo,
    headers: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Checks and reads what follows the UDP header, the ICRC included. The ICRC is not verified.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let bth = Bth::new(bytes).ok_or(ParseError::TooShort)?;
        if bth.version() != TRANSPORT_VERSION {
            return Err(ParseError::Version);
        }
        let info = bth.opcode().info().ok_or(ParseError::UnknownOpcode(bth.opcode()))?;
        let (headers, rest) = bytes.split_at_checked(info.header_len).ok_or(ParseError::TooShort)?;
        let padded_len = rest.len().checked_sub(ICRC_LEN).ok_or(ParseError::TooShort)?;
        if !padded_len.is_multiple_of(4) {
            return Err(ParseError::Pad);
        }
        let payload_len = padded_len.checked_sub(usize::from(bth.pad())).ok_or(ParseError::Pad)?;
        let payload = &rest[..payload_len];
        if !info.has_payload && padded_len != 0 {
            return Err(ParseError::UnexpectedPayload);
        }
        Ok(Self { bth, info, headers, payload })
    }

    /// What the operation code means.
    #[must_use]
    pub fn info(&self) -> &'static OpcodeInfo {
        self.info
    }

    /// Bytes of the message that this packet carries, without padding.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// What stands at `offset`, if the operation has `header`.
    fn header(&self, header: Headers, offset: usize) -> Option<&'a [u8]> {
        if self.info.headers.contains(header) { self.headers.get(offset..) } else { None }
    }

    /// Immediate and invalidate headers stand last, wherever that is.
    fn last_word(&self, header: Headers) -> Option<&'a [u8]> {
        self.header(header, self.info.header_len - ImmDtRepr::LEN)
    }

    /// Datagram extended transport header, if the operation has one.
    #[must_use]
    pub fn deth(&self) -> Option<DethRepr> {
        self.header(Headers::DETH, BthRepr::LEN).and_then(Deth::new).map(DethRepr::parse)
    }

    /// RDMA extended transport header, if the operation has one.
    #[must_use]
    pub fn reth(&self) -> Option<RethRepr> {
        self.header(Headers::RETH, BthRepr::LEN).and_then(Reth::new).map(RethRepr::parse)
    }

    /// Atomic extended transport header, if the operation has one.
    #[must_use]
    pub fn atomic_eth(&self) -> Option<AtomicEthRepr> {
        self.header(Headers::ATOMIC_ETH, BthRepr::LEN).and_then(AtomicEth::new).map(AtomicEthRepr::parse)
    }

    /// Acknowledge extended transport header, if the operation has one.
    #[must_use]
    pub fn aeth(&self) -> Option<AethRepr> {
        self.header(Headers::AETH, BthRepr::LEN).and_then(Aeth::new).map(AethRepr::parse)
    }

    /// Atomic acknowledge extended transport header, if the operation has one.
    #[must_use]
    pub fn atomic_ack_eth(&self) -> Option<AtomicAckEthRepr> {
        self.header(Headers::ATOMIC_ACK_ETH, BthRepr::LEN + AethRepr::LEN)
            .and_then(AtomicAckEth::new)
            .map(AtomicAckEthRepr::parse)
    }

    /// Immediate data, if the operation has any.
    #[must_use]
    pub fn immdt(&self) -> Option<ImmDtRepr> {
        self.last_word(Headers::IMMDT).and_then(ImmDt::new).map(ImmDtRepr::parse)
    }

    /// Key to invalidate, if the operation has one.
    #[must_use]
    pub fn ieth(&self) -> Option<IethRepr> {
        self.last_word(Headers::IETH).and_then(Ieth::new).map(IethRepr::parse)
    }

    /// Everything in the packet, ready to be emitted again.
    #[must_use]
    pub fn to_repr(&self) -> PacketRepr<'a> {
        PacketRepr {
            bth: BthRepr::parse(self.bth),
            deth: self.deth(),
            reth: self.reth(),
            atomic_eth: self.atomic_eth(),
            aeth: self.aeth(),
            atomic_ack_eth: self.atomic_ack_eth(),
            immdt: self.immdt(),
            ieth: self.ieth(),
            payload: self.payload,
        }
    }
}

/// A transport packet as plain data. The operation code alone decides which headers are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketRepr<'a> {
    /// Base transport header. `pad` is computed from the payload when emitted.
    pub bth: BthRepr,
    /// Datagram extended transport header.
    pub deth: Option<DethRepr>,
    /// RDMA extended transport header.
    pub reth: Option<RethRepr>,
    /// Atomic extended transport header.
    pub atomic_eth: Option<AtomicEthRepr>,
    /// Acknowledge extended transport header.
    pub aeth: Option<AethRepr>,
    /// Atomic acknowledge extended transport header.
    pub atomic_ack_eth: Option<AtomicAckEthRepr>,
    /// Immediate data.
    pub immdt: Option<ImmDtRepr>,
    /// Key to invalidate.
    pub ieth: Option<IethRepr>,
    /// Bytes of the message.
    pub payload: &'a [u8],
}

impl<'a> PacketRepr<'a> {
    /// A packet with BTH and payload only.
    #[must_use]
    pub fn new(bth: BthRepr, payload: &'a [u8]) -> Self {
        Self {
            bth,
            deth: None,
            reth: None,
            atomic_eth: None,
            aeth: None,
            atomic_ack_eth: None,
            immdt: None,
            ieth: None,
            payload,
        }
    }

    /// Bytes that [`emit`](Self::emit) writes.
    #[must_use]
    pub fn len(&self) -> usize {
        let headers = [
            self.deth.map_or(0, |_| DethRepr::LEN),
            self.reth.map_or(0, |_| RethRepr::LEN),
            self.atomic_eth.map_or(0, |_| AtomicEthRepr::LEN),
            self.aeth.map_or(0, |_| AethRepr::LEN),
            self.atomic_ack_eth.map_or(0, |_| AtomicAckEthRepr::LEN),
            self.immdt.map_or(0, |_| ImmDtRepr::LEN),
            self.ieth.map_or(0, |_| IethRepr::LEN),
        ];
        BthRepr::LEN + headers.iter().sum::<usize>() + self.payload.len().next_multiple_of(4)
    }

    /// Never: there is always a base transport header.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes headers, payload and zeroed padding to the front of `out`, without ICRC, and returns their
    /// length, or `None` if `out` is too short.
    pub fn emit(&self, out: &mut [u8]) -> Option<usize> {
        let len = self.len();
        let out = out.get_mut(..len)?;
        let pad = u8::try_from(self.payload.len().next_multiple_of(4) - self.payload.len()).unwrap_or(0);
        let bth = BthRepr { pad, ..self.bth };
        let (chunk, mut rest) = out.split_first_chunk_mut()?;
        bth.emit(chunk);
        macro_rules! emit {
            ($($field:ident)*) => {$(
                if let Some(header) = self.$field {
                    let (chunk, after) = rest.split_first_chunk_mut()?;
                    header.emit(chunk);
                    rest = after;
                }
            )*};
        }
        emit!(deth reth atomic_eth aeth atomic_ack_eth immdt ieth);
        let (payload, padding) = rest.split_at_mut_checked(self.payload.len())?;
        payload.copy_from_slice(self.payload);
        padding.fill(0);
        Some(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(opcode: Opcode, pad: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        BthRepr { pad, ..BthRepr::new(opcode, 17, Psn::new(1)) }
            .emit(bytes.first_chunk_mut().expect("long enough"));
        bytes
    }

    /// RDMA/rxe: Validate pad and ICRC before payload_size() in rxe_rcv
    /// RDMA/siw: Reject MPA FPDU length underflow before signed receive math
    #[test]
    fn pad_beyond_the_payload_is_rejected() {
        for pad in 1..=3 {
            assert_eq!(Packet::parse(&only(Opcode::RC_SEND_ONLY, pad, 16)).err(), Some(ParseError::Pad));
            let bytes = only(Opcode::RC_SEND_ONLY, pad, 20);
            assert_eq!(
                Packet::parse(&bytes).expect("one word of payload").payload().len(),
                4 - usize::from(pad)
            );
        }
        assert_eq!(Packet::parse(&only(Opcode::RC_SEND_ONLY, 0, 18)).err(), Some(ParseError::Pad));
    }

    /// RDMA/rxe: Reject unknown opcodes before ICRC processing
    #[test]
    fn unknown_opcodes_are_rejected() {
        for value in (0..=255).filter(|value| Opcode::new(*value).info().is_none()) {
            let opcode = Opcode::new(value);
            let expected = Some(ParseError::UnknownOpcode(opcode));
            assert_eq!(Packet::parse(&only(opcode, 0, 64)).err(), expected);
        }
    }

    /// RDMA/rxe: Fix packet length checks
    /// RDMA/siw: Bound fragmented header copies by the remaining length
    #[test]
    fn every_truncation_is_rejected() {
        for opcode in Opcode::ALL {
            let least = opcode.info().expect("known").header_len + ICRC_LEN;
            let bytes = only(*opcode, 0, least);
            assert!(Packet::parse(&bytes).is_ok(), "{opcode:?}");
            for len in 0..least {
                assert_eq!(
                    Packet::parse(&bytes[..len]).err(),
                    Some(ParseError::TooShort),
                    "{opcode:?} {len}"
                );
            }
        }
    }

    /// RDMA/rxe: Fix packet length checks
    #[test]
    fn payload_where_none_may_be_is_rejected() {
        for opcode in Opcode::ALL {
            let info = opcode.info().expect("known");
            let result = Packet::parse(&only(*opcode, 0, info.header_len + 8 + ICRC_LEN)).err();
            let expected = (!info.has_payload).then_some(ParseError::UnexpectedPayload);
            assert_eq!(result, expected, "{opcode:?}");
        }
    }

    #[test]
    fn other_transport_versions_are_rejected() {
        let mut bytes = only(Opcode::RC_SEND_ONLY, 0, 16);
        bytes[1] |= 1;
        assert_eq!(Packet::parse(&bytes).err(), Some(ParseError::Version));
    }
}
