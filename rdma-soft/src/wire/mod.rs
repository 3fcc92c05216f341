//! The RoCEv2 wire format: every header as a checked view and a plain struct, one opcode table, the ICRC.
//!
//! Each header file has the same shape: a view over a fixed number of bytes (`Bth<'a>`) whose getters
//! cannot fail, a plain struct (`BthRepr`) with `parse` and `emit`, and golden bytes both ways in its tests.
//! [`Packet`] puts them together: it takes what follows the UDP header and rejects whatever does not fit
//! before any other layer looks at it.
//!
//! The format is that of the InfiniBand Architecture Specification, volume 1, clause 9.2 to 9.3, carried
//! over UDP as annex A17 says.

#![forbid(unsafe_code)]

mod aeth;
mod atomic_ack_eth;
mod atomic_eth;
mod bth;
mod deth;
mod field;
mod icrc;
mod ieth;
mod immdt;
mod ipv4;
mod ipv6;
mod opcode;
mod packet;
mod psn;
mod reth;
mod udp;

pub use aeth::{Aeth, AethRepr, NakCode, RnrTimer, Syndrome};
pub use atomic_ack_eth::{AtomicAckEth, AtomicAckEthRepr};
pub use atomic_eth::{AtomicEth, AtomicEthRepr};
pub use bth::{Bth, BthRepr, DEFAULT_PKEY, Qpn};
pub use deth::{Deth, DethRepr};
pub use icrc::{ICRC_LEN, Icrc, IcrcMasking, IcrcPrefix, UnknownIdentification};
pub use ieth::{Ieth, IethRepr};
pub use immdt::{ImmDt, ImmDtRepr};
pub use ipv4::{Ipv4, Ipv4Repr};
pub use ipv6::{Ipv6, Ipv6Repr};
pub use opcode::{Headers, Opcode, OpcodeInfo, Operation, Position, Transport};
pub use packet::{MAX_TRANSPORT_HEADER_LEN, Packet, PacketRepr, ParseError};
pub use psn::Psn;
pub use reth::{Reth, RethRepr};
pub use udp::{ROCE_V2_PORT, Udp, UdpRepr};

/// The transport version that BTH carries; any other is dropped (clause 9.2.3).
pub const TRANSPORT_VERSION: u8 = 0;
