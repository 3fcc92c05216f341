//! Operation codes (clause 9.2.1, table 38): one table says what each carries.

use super::aeth::AethRepr;
use super::atomic_ack_eth::AtomicAckEthRepr;
use super::atomic_eth::AtomicEthRepr;
use super::bth::BthRepr;
use super::deth::DethRepr;
use super::ieth::IethRepr;
use super::immdt::ImmDtRepr;
use super::reth::RethRepr;

/// An operation code as it stands in BTH. Any value may come from a peer; [`info`](Self::info) knows those
/// that this implementation understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Opcode(u8);

/// Which transport service an operation code belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagram.
    Ud,
    /// RoCEv2 congestion notification packet (annex A17.9.3), of no queue pair's service.
    Cnp,
}

/// What an operation code asks for or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// SEND.
    Send,
    /// RDMA WRITE.
    Write,
    /// RDMA READ request.
    ReadRequest,
    /// RDMA READ response.
    ReadResponse,
    /// Acknowledgement, positive or negative.
    Acknowledge,
    /// Answer to an atomic operation.
    AtomicAcknowledge,
    /// Atomic compare and swap.
    CompareSwap,
    /// Atomic fetch and add.
    FetchAdd,
    /// ATOMIC WRITE.
    AtomicWrite,
    /// Congestion notification.
    CongestionNotification,
}

/// Where in its message a packet stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// The first of several: payload is exactly the path MTU.
    First,
    /// Neither first nor last: payload is exactly the path MTU.
    Middle,
    /// The last of several: payload is 1 byte to the path MTU.
    Last,
    /// The whole message: payload is 0 bytes to the path MTU.
    Only,
}

impl Position {
    /// Whether a message begins here.
    #[must_use]
    pub const fn begins(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }

    /// Whether a message ends here.
    #[must_use]
    pub const fn ends(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }

    /// The position that begins and ends as told.
    #[must_use]
    pub const fn new(begins: bool, ends: bool) -> Self {
        match (begins, ends) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, true) => Self::Last,
            (false, false) => Self::Middle,
        }
    }
}

/// A set of extension headers. On the wire they stand in the order of the constants below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers(u8);

impl Headers {
    /// No extension header.
    pub const NONE: Self = Self(0);
    /// Datagram extended transport header.
    pub const DETH: Self = Self(1);
    /// RDMA extended transport header.
    pub const RETH: Self = Self(2);
    /// Atomic extended transport header.
    pub const ATOMIC_ETH: Self = Self(4);
    /// Acknowledge extended transport header.
    pub const AETH: Self = Self(8);
    /// Atomic acknowledge extended transport header.
    pub const ATOMIC_ACK_ETH: Self = Self(16);
    /// Immediate extended transport header.
    pub const IMMDT: Self = Self(32);
    /// Invalidate extended transport header.
    pub const IETH: Self = Self(64);

    /// Whether all of `other` are in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Bytes of BTH and the headers of this set.
    const fn len(self) -> usize {
        let all = [
            (Self::DETH, DethRepr::LEN),
            (Self::RETH, RethRepr::LEN),
            (Self::ATOMIC_ETH, AtomicEthRepr::LEN),
            (Self::AETH, AethRepr::LEN),
            (Self::ATOMIC_ACK_ETH, AtomicAckEthRepr::LEN),
            (Self::IMMDT, ImmDtRepr::LEN),
            (Self::IETH, IethRepr::LEN),
        ];
        let mut len = BthRepr::LEN;
        let mut i = 0;
        while i < all.len() {
            if self.contains(all[i].0) {
                len += all[i].1;
            }
            i += 1;
        }
        len
    }
}

/// What an operation code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpcodeInfo {
    /// Transport service.
    pub transport: Transport,
    /// Operation.
    pub operation: Operation,
    /// Position in the message.
    pub position: Position,
    /// Extension headers after BTH.
    pub headers: Headers,
    /// Bytes of BTH and extension headers.
    pub header_len: usize,
    /// Whether bytes of a message may follow the headers.
    pub has_payload: bool,
}

impl OpcodeInfo {
    /// Whether a responder handles the packet, otherwise a requester.
    #[must_use]
    pub const fn is_request(&self) -> bool {
        !matches!(
            self.operation,
            Operation::ReadResponse
                | Operation::Acknowledge
                | Operation::AtomicAcknowledge
                | Operation::CongestionNotification
        )
    }

    /// Whether the packet, or the message it ends, takes a receive work request.
    #[must_use]
    pub const fn carries_immediate(&self) -> bool {
        self.headers.contains(Headers::IMMDT)
    }
}

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $value:literal:
        $transport:ident $operation:ident $position:ident [$($header:ident)*] $payload:literal;)*) => {
        impl Opcode {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// All operation codes of the table.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }

        static TABLE: [Option<OpcodeInfo>; 256] = {
            let mut table = [None; 256];
            $(
                let headers = Headers::NONE$(.with(Headers::$header))*;
                table[$value] = Some(OpcodeInfo {
                    transport: Transport::$transport,
                    operation: Operation::$operation,
                    position: Position::$position,
                    headers,
                    header_len: headers.len(),
                    has_payload: $payload,
                });
            )*
            table
        };
    };
}

opcodes! {
    /// RC SEND First.
    RC_SEND_FIRST = 0x00: Rc Send First [] true;
    /// RC SEND Middle.
    RC_SEND_MIDDLE = 0x01: Rc Send Middle [] true;
    /// RC SEND Last.
    RC_SEND_LAST = 0x02: Rc Send Last [] true;
    /// RC SEND Last with Immediate.
    RC_SEND_LAST_WITH_IMMEDIATE = 0x03: Rc Send Last [IMMDT] true;
    /// RC SEND Only.
    RC_SEND_ONLY = 0x04: Rc Send Only [] true;
    /// RC SEND Only with Immediate.
    RC_SEND_ONLY_WITH_IMMEDIATE = 0x05: Rc Send Only [IMMDT] true;
    /// RC RDMA WRITE First.
    RC_WRITE_FIRST = 0x06: Rc Write First [RETH] true;
    /// RC RDMA WRITE Middle.
    RC_WRITE_MIDDLE = 0x07: Rc Write Middle [] true;
    /// RC RDMA WRITE Last.
    RC_WRITE_LAST = 0x08: Rc Write Last [] true;
    /// RC RDMA WRITE Last with Immediate.
    RC_WRITE_LAST_WITH_IMMEDIATE = 0x09: Rc Write Last [IMMDT] true;
    /// RC RDMA WRITE Only.
    RC_WRITE_ONLY = 0x0a: Rc Write Only [RETH] true;
    /// RC RDMA WRITE Only with Immediate.
    RC_WRITE_ONLY_WITH_IMMEDIATE = 0x0b: Rc Write Only [RETH IMMDT] true;
    /// RC RDMA READ Request.
    RC_READ_REQUEST = 0x0c: Rc ReadRequest Only [RETH] false;
    /// RC RDMA READ Response First.
    RC_READ_RESPONSE_FIRST = 0x0d: Rc ReadResponse First [AETH] true;
    /// RC RDMA READ Response Middle.
    RC_READ_RESPONSE_MIDDLE = 0x0e: Rc ReadResponse Middle [] true;
    /// RC RDMA READ Response Last.
    RC_READ_RESPONSE_LAST = 0x0f: Rc ReadResponse Last [AETH] true;
    /// RC RDMA READ Response Only.
    RC_READ_RESPONSE_ONLY = 0x10: Rc ReadResponse Only [AETH] true;
    /// RC Acknowledge.
    RC_ACKNOWLEDGE = 0x11: Rc Acknowledge Only [AETH] false;
    /// RC ATOMIC Acknowledge.
    RC_ATOMIC_ACKNOWLEDGE = 0x12: Rc AtomicAcknowledge Only [AETH ATOMIC_ACK_ETH] false;
    /// RC Compare and Swap.
    RC_COMPARE_SWAP = 0x13: Rc CompareSwap Only [ATOMIC_ETH] false;
    /// RC Fetch and Add.
    RC_FETCH_ADD = 0x14: Rc FetchAdd Only [ATOMIC_ETH] false;
    /// RC SEND Last with Invalidate.
    RC_SEND_LAST_WITH_INVALIDATE = 0x16: Rc Send Last [IETH] true;
    /// RC SEND Only with Invalidate.
    RC_SEND_ONLY_WITH_INVALIDATE = 0x17: Rc Send Only [IETH] true;
    /// RC ATOMIC WRITE, of the memory placement extensions (annex A19). An RDMA READ response answers it.
    RC_ATOMIC_WRITE = 0x1d: Rc AtomicWrite Only [RETH] true;
    /// UC SEND First.
    UC_SEND_FIRST = 0x20: Uc Send First [] true;
    /// UC SEND Middle.
    UC_SEND_MIDDLE = 0x21: Uc Send Middle [] true;
    /// UC SEND Last.
    UC_SEND_LAST = 0x22: Uc Send Last [] true;
    /// UC SEND Last with Immediate.
    UC_SEND_LAST_WITH_IMMEDIATE = 0x23: Uc Send Last [IMMDT] true;
    /// UC SEND Only.
    UC_SEND_ONLY = 0x24: Uc Send Only [] true;
    /// UC SEND Only with Immediate.
    UC_SEND_ONLY_WITH_IMMEDIATE = 0x25: Uc Send Only [IMMDT] true;
    /// UC RDMA WRITE First.
    UC_WRITE_FIRST = 0x26: Uc Write First [RETH] true;
    /// UC RDMA WRITE Middle.
    UC_WRITE_MIDDLE = 0x27: Uc Write Middle [] true;
    /// UC RDMA WRITE Last.
    UC_WRITE_LAST = 0x28: Uc Write Last [] true;
    /// UC RDMA WRITE Last with Immediate.
    UC_WRITE_LAST_WITH_IMMEDIATE = 0x29: Uc Write Last [IMMDT] true;
    /// UC RDMA WRITE Only.
    UC_WRITE_ONLY = 0x2a: Uc Write Only [RETH] true;
    /// UC RDMA WRITE Only with Immediate.
    UC_WRITE_ONLY_WITH_IMMEDIATE = 0x2b: Uc Write Only [RETH IMMDT] true;
    /// UD SEND Only.
    UD_SEND_ONLY = 0x64: Ud Send Only [DETH] true;
    /// UD SEND Only with Immediate.
    UD_SEND_ONLY_WITH_IMMEDIATE = 0x65: Ud Send Only [DETH IMMDT] true;
    /// Congestion notification packet; its 16 bytes after BTH have no meaning.
    CNP = 0x81: Cnp CongestionNotification Only [] true;
}

impl Opcode {
    /// UC codes are the RC ones of SEND and WRITE with this bit.
    const UC: u8 = 0x20;

    /// The code with this value, known or not.
    #[must_use]
    pub const fn new(value: u8) -> Self {
        Self(value)
    }

    /// The value in BTH.
    #[must_use]
    pub const fn value(self) -> u8 {
        self.0
    }

    /// What the code means, or `None` if it is not in the table.
    #[must_use]
    pub fn info(self) -> Option<&'static OpcodeInfo> {
        TABLE[usize::from(self.0)].as_ref()
    }

    /// The UC twin of an RC SEND or RDMA WRITE code without invalidate.
    #[must_use]
    pub const fn to_uc(self) -> Self {
        Self(self.0 | Self::UC)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_lengths_are_those_of_the_specification() {
        let len = |opcode: Opcode| opcode.info().expect("known").header_len;
        assert_eq!(len(Opcode::RC_SEND_ONLY), 12);
        assert_eq!(len(Opcode::RC_WRITE_ONLY_WITH_IMMEDIATE), 32);
        assert_eq!(len(Opcode::RC_COMPARE_SWAP), 40);
        assert_eq!(len(Opcode::RC_ATOMIC_ACKNOWLEDGE), 24);
        assert_eq!(len(Opcode::RC_ATOMIC_WRITE), 28);
        assert_eq!(len(Opcode::UD_SEND_ONLY_WITH_IMMEDIATE), 24);
    }

    #[test]
    fn uc_codes_mirror_rc_codes() {
        for value in 0..=0x0b {
            let rc = Opcode::new(value).info().expect("known");
            let uc = Opcode::new(value).to_uc().info().expect("known");
            assert_eq!(OpcodeInfo { transport: Transport::Uc, ..*rc }, *uc);
        }
    }

    #[test]
    fn table_and_list_agree() {
        let known: Vec<u8> = (0..=255).filter(|value| Opcode::new(*value).info().is_some()).collect();
        let listed: Vec<u8> = Opcode::ALL.iter().map(|opcode| opcode.value()).collect();
        assert_eq!(known, listed);
    }
}
