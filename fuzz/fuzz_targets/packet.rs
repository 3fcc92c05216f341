//! One packet: into the parser, and into a live queue pair of each transport.
//!
//! The first byte says which queue pair and which fields are made to fit, so that the packet gets past the
//! first checks; the second how far its PSN is from the expected one. The rest is the packet.

#![no_main]

#[path = "../../rdma-soft/tests/sim/mod.rs"]
mod sim;

use libfuzzer_sys::fuzz_target;
use rdma_soft::proto::{CompletionKind, State};
use rdma_soft::wire::{BthRepr, Packet, PacketRepr, Psn, Transport};
use sim::{Pair, PairConfig, Rights, fetch_add, read_from};

const START: u32 = 0xff_fff0;
const GUARD: u8 = 0xa5;

fuzz_target!(|data: &[u8]| {
    let [how, offset, bytes @ ..] = data else { return };
    let Ok(packet) = Packet::parse(bytes) else { return };
    round_trip(&packet);

    let transport = [Transport::Rc, Transport::Uc, Transport::Ud, Transport::Rc][usize::from(how & 3)];
    let mut pair = Pair::new(&PairConfig::new(transport));
    let target = pair.server.host.register(vec![0; 4096], Rights::ALL);
    let guard =
        pair.server.host.register(vec![GUARD; 4096], Rights { local_write: true, ..Rights::default() });
    pair.server.host.post_receive(1, &[target]);
    let is_response = !packet.info().is_request();
    if transport == Transport::Rc && (is_response || how & 4 != 0) {
        pair.server.post(1, read_from(guard), &[target]);
        pair.server.post(2, fetch_add(guard, 1), &[target]);
        pair.transmit();
    }

    let mut repr = packet.to_repr();
    if how & 0x80 != 0 {
        repr.bth = BthRepr {
            psn: Psn::new(START.wrapping_add((*offset).cast_signed() as u32)),
            pkey: 0xffff,
            ..repr.bth
        };
    }
    if how & 0x40 != 0 {
        if let Some(reth) = &mut repr.reth {
            reth.rkey = target.lkey;
            reth.va = target.addr.wrapping_add(reth.va & 0x1fff);
        }
        if let Some(atomic) = &mut repr.atomic_eth {
            atomic.rkey = target.lkey;
            atomic.va = target.addr.wrapping_add(atomic.va & 0x1fff);
        }
        if let Some(deth) = &mut repr.deth {
            deth.qkey = 0x1111_1111;
        }
    }
    inject(&mut pair, &repr);
    // The same once more: a duplicate, or a packet after the failure.
    inject(&mut pair, &repr);

    // Unless the packet invalidated its key, the guard is there, untouched.
    if pair.server.host.regions.iter().any(|region| region.key == guard.lkey) {
        assert_eq!(pair.server.host.bytes(guard), [GUARD; 4096]);
    }
    assert!(pair.server.host.take(CompletionKind::Receive).len() <= 1);
    let before = pair.links[1].sent;
    pair.transmit();
    assert!(pair.links[1].sent - before <= 16, "one packet is answered by few");
    assert!(matches!(pair.server.qp.state(), State::Rts | State::Err));
});

fn round_trip(packet: &Packet<'_>) {
    let repr = packet.to_repr();
    let mut out = vec![0; repr.len() + 4];
    assert_eq!(repr.emit(&mut out), Some(repr.len()));
    let again = Packet::parse(&out).expect("what was emitted parses");
    assert_eq!(again.to_repr(), repr);
}

fn inject(pair: &mut Pair, repr: &PacketRepr<'_>) {
    let mut bytes = vec![0; repr.len() + 4];
    repr.emit(&mut bytes).expect("room");
    pair.inject(true, &bytes);
}
