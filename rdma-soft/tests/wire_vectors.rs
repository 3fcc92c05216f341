//! Every captured packet of the kernel's rxe parses, is emitted again byte for byte, and passes the ICRC check.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;
use rdma_soft::wire::{
    AethRepr, AtomicAckEthRepr, AtomicEthRepr, BthRepr, DethRepr, Headers, ICRC_LEN, Icrc, IethRepr,
    ImmDtRepr, Ipv4, Ipv4Repr, Opcode, Packet, PacketRepr, Psn, ROCE_V2_PORT, RethRepr, Syndrome, Udp,
    UdpRepr, UnknownIdentification,
};

const ETHERNET: usize = 14;

/// The frames of a classic little-endian pcap file.
fn frames(pcap: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    let mut rest = &pcap[24..];
    while let Some((header, after)) = rest.split_first_chunk::<16>() {
        let len = u32::from_le_bytes(header[8..12].try_into().expect("four bytes")) as usize;
        frames.push(&after[..len]);
        rest = &after[len..];
    }
    frames
}

fn captures() -> Vec<(String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let mut captures: Vec<_> = std::fs::read_dir(folder)
        .expect("the vectors are there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pcap"))
        .map(|path| (path.display().to_string(), std::fs::read(&path).expect("readable")))
        .collect();
    captures.sort();
    captures
}

#[test]
fn captured_packets_survive_parse_and_emit_and_pass_the_icrc() {
    let mut opcodes = BTreeSet::new();
    let mut count = 0;
    for (name, pcap) in captures() {
        for frame in frames(&pcap) {
            let ip_bytes = &frame[ETHERNET..];
            let ip = Ipv4::new(ip_bytes).and_then(Ipv4Repr::parse).expect("IPv4 and UDP");
            let ip_bytes = &ip_bytes[..usize::from(ip.total_len)];
            let udp = UdpRepr::parse(Udp::new(&ip_bytes[Ipv4Repr::LEN..]).expect("UDP"));
            assert_eq!(udp.dst_port, ROCE_V2_PORT);
            let bytes = &ip_bytes[Ipv4Repr::LEN + UdpRepr::LEN..];

            let packet = Packet::parse(bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
            opcodes.insert(packet.bth.opcode().value());
            let (transport, trailer) = bytes.split_last_chunk::<ICRC_LEN>().expect("an ICRC");
            let mut out = vec![0xaa; transport.len()];
            assert_eq!(packet.to_repr().emit(&mut out), Some(transport.len()), "{name}");
            assert_eq!(out, transport, "{name}");

            let mut header = [0; Ipv4Repr::LEN];
            ip.emit(&mut header);
            assert_eq!(header, ip_bytes[..Ipv4Repr::LEN], "{name}");

            let received = Icrc::from_bytes(*trailer);
            assert_eq!(Icrc::ipv4(&ip, &udp, transport), received, "{name}");
            assert_eq!(received.to_bytes(), *trailer);
            let with_zero = Icrc::ipv4(&Ipv4Repr { identification: 0, ..ip }, &udp, transport);
            let explained = UnknownIdentification::explain(with_zero, received, transport.len());
            assert_eq!(explained, Some(ip.identification), "{name}");
            count += 1;
        }
    }
    assert_eq!(count, 692);
    assert_eq!(opcodes.len(), 20, "{opcodes:?}");
}

/// rxe: correctly calculate iCRC for unaligned payloads
#[test]
fn captures_hold_payloads_of_every_alignment() {
    let pads: BTreeSet<u8> = captures()
        .iter()
        .flat_map(|(_, pcap)| frames(pcap))
        .filter_map(|frame| Packet::parse(&frame[ETHERNET + Ipv4Repr::LEN + UdpRepr::LEN..]).ok())
        .map(|packet| packet.bth.pad())
        .collect();
    assert!(pads.contains(&0) && pads.len() >= 3, "{pads:?}");
}

fn any_bth() -> impl Strategy<Value = BthRepr> {
    let numbers = (0..Opcode::ALL.len(), any::<u32>(), any::<u32>(), any::<u16>(), any::<[u8; 2]>());
    (numbers, any::<[bool; 5]>()).prop_map(|((opcode, dest_qp, psn, pkey, reserved), bits)| BthRepr {
        solicited: bits[0],
        migration: bits[1],
        fecn: bits[2],
        becn: bits[3],
        ack_request: bits[4],
        pkey,
        reserved: [reserved[0] & 0x3f, reserved[1] & 0x7f],
        ..BthRepr::new(Opcode::ALL[opcode], dest_qp & 0xff_ffff, Psn::new(psn))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is emitted parses to the same.
    #[test]
    fn emitted_packets_parse_to_the_same(
        bth in any_bth(),
        words in any::<[u64; 4]>(),
        data in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let info = bth.opcode.info().expect("known");
        let has = |header| info.headers.contains(header);
        let payload: &[u8] = if info.has_payload { &data } else { &[] };
        let pad = (payload.len().next_multiple_of(4) - payload.len()) as u8;
        let (word, key) = (words[0] as u32, words[1] as u32);
        let repr = PacketRepr {
            deth: has(Headers::DETH).then_some(DethRepr { qkey: key, src_qp: word & 0xff_ffff }),
            reth: has(Headers::RETH).then_some(RethRepr { va: words[2], rkey: key, dma_len: word }),
            atomic_eth: has(Headers::ATOMIC_ETH)
                .then_some(AtomicEthRepr { va: words[2], rkey: key, swap_add: words[3], compare: words[0] }),
            aeth: has(Headers::AETH).then_some(AethRepr { syndrome: Syndrome(key as u8), msn: word & 0xff_ffff }),
            atomic_ack_eth: has(Headers::ATOMIC_ACK_ETH).then_some(AtomicAckEthRepr { original: words[3] }),
            immdt: has(Headers::IMMDT).then_some(ImmDtRepr { data: word.to_be_bytes() }),
            ieth: has(Headers::IETH).then_some(IethRepr { rkey: key }),
            ..PacketRepr::new(BthRepr { pad, ..bth }, payload)
        };
        let mut bytes = vec![0xaa; repr.len() + ICRC_LEN];
        prop_assert_eq!(repr.emit(&mut bytes), Some(repr.len()));
        let packet = Packet::parse(&bytes).expect("emitted packets parse");
        prop_assert_eq!(packet.to_repr(), repr);
        prop_assert_eq!(repr.emit(&mut bytes[..repr.len() - 1]), None);
    }

    /// No bytes make the parser panic, and what it accepts is emitted as it was.
    #[test]
    fn any_bytes_are_parsed_or_rejected(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), opcode: u8) {
        if let [first, second, ..] = &mut bytes[..] {
            *first = opcode;
            *second &= 0xf0;
        }
        if let Ok(packet) = Packet::parse(&bytes) {
            let repr = packet.to_repr();
            let mut out = vec![0; bytes.len()];
            let len = repr.emit(&mut out).expect("as long as it was");
            prop_assert_eq!(len, bytes.len() - ICRC_LEN);
            let reserved_in_deth = if repr.deth.is_some() { 12 + 4 } else { usize::MAX };
            let padding = len - usize::from(packet.bth.pad())..len;
            for place in (0..len).filter(|place| *place != reserved_in_deth && !padding.contains(place)) {
                prop_assert_eq!(out[place], bytes[place], "byte {}", place);
            }
        }
    }
}
