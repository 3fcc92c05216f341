//! Datagrams that anybody may send to the device's port: each is dropped and counted by its reason, none is answered,
//! and no memory is touched.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use common::*;
use rdma_soft::wire::{
    AethRepr, BthRepr, DethRepr, Icrc, Ipv4Repr, Opcode, PacketRepr, Psn, ROCE_V2_PORT, RethRepr, Syndrome,
    UdpRepr,
};
use verbs_sys::inline::ibv_query_port_ex;
use verbs_sys::*;

/// Somebody with a socket and an address.
struct Stranger {
    socket: UdpSocket,
    to: Ipv4Addr,
}

impl Stranger {
    fn at(from: Ipv4Addr, to: Ipv4Addr) -> Self {
        Stranger { socket: UdpSocket::bind((from, 0)).unwrap(), to }
    }

    /// Sends bytes as they are.
    fn send_raw(&self, bytes: &[u8]) {
        assert_eq!(self.socket.send_to(bytes, (self.to, ROCE_V2_PORT)).unwrap(), bytes.len());
    }

    /// Sends what follows the UDP header, with an ICRC that fits.
    fn send_sealed(&self, transport: &[u8]) {
        let own = self.socket.local_addr().unwrap();
        let IpAddr::V4(from) = own.ip() else { panic!("bound to an IPv4 address") };
        let len = transport.len() as u16 + 4 + UdpRepr::LEN as u16;
        let ip = Ipv4Repr {
            traffic_class: 0,
            total_len: len + Ipv4Repr::LEN as u16,
            identification: 0,
            dont_fragment: true,
            hop_limit: 64,
            src: from.octets(),
            dst: self.to.octets(),
        };
        let udp = UdpRepr { src_port: own.port(), dst_port: ROCE_V2_PORT, len, checksum: 0 };
        self.send_raw(&[transport, &Icrc::ipv4(&ip, &udp, transport).to_bytes()].concat());
    }

    fn send(&self, packet: &PacketRepr<'_>) {
        self.send_sealed(&bytes_of(packet));
    }
}

fn bytes_of(packet: &PacketRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; packet.len()];
    packet.emit(&mut bytes).unwrap();
    bytes
}

fn counter(name: &str) -> u64 {
    rdma_soft::counters().unwrap().into_iter().find(|(n, _)| *n == name).unwrap().1
}

/// What `send` sends is counted under `name`, once.
fn dropped_as(name: &str, send: impl FnOnce()) {
    let before = counter(name);
    send();
    let begin = Instant::now();
    while counter(name) == before {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "nothing counted as {name}: {:?}",
            rdma_soft::counters()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(counter(name), before + 1, "{name}");
}

/// An RDMA WRITE that would be executed: the right key, the right address, the right number.
fn write_to(target: Address, psn: u32) -> PacketRepr<'static> {
    let reth = RethRepr { va: target.va, rkey: target.rkey, dma_len: 16 };
    let bth = BthRepr::new(Opcode::RC_WRITE_ONLY, target.qp_num, Psn::new(psn));
    PacketRepr { reth: Some(reth), ..PacketRepr::new(bth, &[0xee; 16]) }
}

#[test]
fn hostile_packets_are_counted_by_their_reason_and_touch_nothing() {
    let (a, b) = pair(Options::default());
    let (_c, failed) = pair(Options::default());
    let mut error: ibv_qp_attr = zeroed();
    error.qp_state = ibv_qp_state::IBV_QPS_ERR;
    assert_eq!(failed.modify(&mut error, ibv_qp_attr_mask::IBV_QP_STATE), 0);
    let datagrams = End::new(Options { qp_type: ibv_qp_type::IBV_QPT_UD, ..Options::default() });
    datagrams.connect(a.address());

    let target = b.address();
    let own = Ipv4Addr::from(*target.gid.last_chunk::<4>().unwrap());
    // Both ends are in this process, so this is the address of the peer.
    let peer = Stranger::at(own, own);
    let stranger = Stranger::at(Ipv4Addr::new(127, 99, 0, 1), own);
    let good = write_to(target, target.psn);
    let bytes = bytes_of(&good);
    let changed = |bth: BthRepr| PacketRepr { bth, ..good };
    let sent = counter("sent_pkts");

    // Nobody's packets.
    dropped_as("drop_too_short", || peer.send_raw(&bytes[..11]));
    dropped_as("drop_too_short", || peer.send_raw(&[]));
    dropped_as("drop_version", || peer.send(&changed(BthRepr { version: 1, ..good.bth })));
    dropped_as("drop_unknown_opcode", || {
        peer.send(&changed(BthRepr { opcode: Opcode::new(0x1f), ..good.bth }))
    });
    dropped_as("drop_pad", || peer.send_sealed(&bytes[..bytes.len() - 3]));
    let bth = BthRepr::new(Opcode::RC_ACKNOWLEDGE, target.qp_num, Psn::new(target.psn));
    let ack =
        PacketRepr { aeth: Some(AethRepr { syndrome: Syndrome::ACK, msn: 0 }), ..PacketRepr::new(bth, &[]) };
    dropped_as("drop_unexpected_payload", || peer.send(&PacketRepr { payload: &[1; 4], ..ack }));
    dropped_as("rx_icrc_errors", || peer.send_raw(&[&bytes[..], &[0xde, 0xad, 0xbe, 0xef]].concat()));
    dropped_as("rcvd_cnp", || {
        peer.send(&PacketRepr::new(BthRepr { opcode: Opcode::CNP, ..good.bth }, &[0; 16]));
    });
    dropped_as("drop_no_qp", || peer.send(&changed(BthRepr { dest_qp: 0x00ab_cdef, ..good.bth })));
    dropped_as("drop_no_multicast_group", || peer.send(&changed(BthRepr { dest_qp: 0xff_ffff, ..good.bth })));

    // A connection's packets, were they its peer's.
    dropped_as("drop_wrong_source", || stranger.send(&good));
    dropped_as("drop_wrong_source", || stranger.send(&ack));

    // With the peer's address.
    dropped_as("drop_state", || peer.send(&write_to(failed.address(), target.psn)));
    dropped_as("drop_pkey", || peer.send(&changed(BthRepr { pkey: 0x8001, ..good.bth })));
    let uc = BthRepr { opcode: Opcode::UC_SEND_ONLY, ..good.bth };
    dropped_as("drop_transport", || peer.send(&PacketRepr::new(uc, &[1; 16])));
    dropped_as("drop_psn_out_of_window", || peer.send(&write_to(target, target.psn.wrapping_add(1 << 22))));
    dropped_as("drop_unexpected_response", || peer.send(&ack));
    let read =
        BthRepr { opcode: Opcode::RC_READ_REQUEST, psn: Psn::new(target.psn.wrapping_sub(5)), ..good.bth };
    dropped_as("drop_forgotten_request", || peer.send(&PacketRepr { bth: read, payload: &[], ..good }));

    // To a queue pair that takes packets from anybody.
    let bth = BthRepr::new(Opcode::UD_SEND_ONLY, datagrams.address().qp_num, Psn::new(7));
    let datagram =
        |qkey| PacketRepr { deth: Some(DethRepr { qkey, src_qp: 5 }), ..PacketRepr::new(bth, &[1; 16]) };
    dropped_as("drop_qkey", || stranger.send(&datagram(0x2222_2222)));
    let mut port: ibv_port_attr = zeroed();
    assert_eq!(unsafe { ibv_query_port_ex(a.context, 1, &mut port) }, Some(0));
    assert_eq!((port.bad_pkey_cntr, port.qkey_viol_cntr), (1, 1));
    dropped_as("drop_no_receive", || stranger.send(&datagram(0x1111_1111)));
    assert_eq!(datagrams.post_recv(1, 0, 55), 0);
    dropped_as("drop_length", || stranger.send(&datagram(0x1111_1111)));

    assert_eq!(counter("sent_pkts"), sent, "none of them was answered");
    let untouched = vec![0; b.options.size];
    assert!(b.read(0, b.options.size) == untouched && failed.read(0, failed.options.size) == untouched);
    assert!(datagrams.read(0, datagrams.options.size) == untouched);

    // The same packet in order, from the right address, is executed: nothing else was wrong with it.
    peer.send(&good);
    let begin = Instant::now();
    while b.read(0, 16) != [0xee; 16] {
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", rdma_soft::counters());
        std::thread::sleep(Duration::from_millis(1));
    }
}
