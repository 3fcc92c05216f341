//! The wire format of the soft device: packets read and written, and their checksum.
//!
//! `cargo bench --bench codec`.

mod common;

use std::hint::black_box;

use criterion::{BenchmarkId, Throughput};
use rdma_soft::wire::{
    AethRepr, BthRepr, IcrcPrefix, Ipv4Repr, Opcode, Packet, PacketRepr, Psn, ROCE_V2_PORT, RethRepr,
    Syndrome, UdpRepr,
};

const ICRC: [u8; 4] = [0; 4];

fn main() {
    let payload = vec![0x5a; 4096];
    let packets = [
        ("acknowledgement", {
            let bth = BthRepr::new(Opcode::RC_ACKNOWLEDGE, 17, Psn::new(1));
            let aeth = AethRepr { syndrome: Syndrome::ACK, msn: 1 };
            PacketRepr { aeth: Some(aeth), ..PacketRepr::new(bth, &[]) }
        }),
        ("send of 64", PacketRepr::new(BthRepr::new(Opcode::RC_SEND_ONLY, 17, Psn::new(1)), &payload[..64])),
        ("write of 4096", {
            let bth = BthRepr::new(Opcode::RC_WRITE_ONLY, 17, Psn::new(1));
            PacketRepr {
                reth: Some(RethRepr { va: 1 << 40, rkey: 7, dma_len: 4096 }),
                ..PacketRepr::new(bth, &payload)
            }
        }),
    ];
    let mut criterion = common::criterion();
    let mut group = criterion.benchmark_group("codec");
    let mut room = vec![0; 8192];
    for (name, packet) in &packets {
        group.bench_function(BenchmarkId::new("emit", name), |bencher| {
            bencher.iter(|| black_box(packet).emit(black_box(&mut room)));
        });
        let length = packet.emit(&mut room).expect("room enough");
        let bytes = [&room[..length], &ICRC].concat();
        group.bench_function(BenchmarkId::new("parse", name), |bencher| {
            bencher.iter(|| Packet::parse(black_box(&bytes)).map(|packet| packet.payload().len()));
        });
    }
    let udp = UdpRepr { src_port: 49152, dst_port: ROCE_V2_PORT, len: 0, checksum: 0 };
    let ip = Ipv4Repr {
        traffic_class: 0,
        total_len: 0,
        identification: 0,
        dont_fragment: true,
        hop_limit: 64,
        src: [127, 0, 0, 1],
        dst: [127, 0, 0, 2],
    };
    let prefix = IcrcPrefix::ipv4(&ip, &udp);
    for size in [64, 1024, 4096] {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("ICRC", size), |bencher| {
            bencher.iter(|| prefix.icrc(black_box(&payload[..size])));
        });
    }
    group.finish();
    criterion.final_summary();
}
