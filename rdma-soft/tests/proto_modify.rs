//! Attributes and states that change under traffic.

mod sim;

use rdma_soft::proto::{Attributes, State, Status};
use rdma_soft::wire::{BthRepr, Opcode, PacketRepr, Psn};
use sim::{PairConfig, fetch_add, read_from, with_buffers, write_to};

const OK: Status = Status::Success;

/// What was begun still ends, although nothing new could be.
#[test]
fn a_read_in_flight_ends_when_the_depth_becomes_zero() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 1 << 20);
    pair.client.post(1, read_from(target), &[source]);
    pair.transmit();
    let attributes = Attributes { max_rd_atomic: 0, ..*pair.client.qp.attributes() };
    for state in [State::Sqd, State::Sqd] {
        let (qp, host) = (&mut pair.client.qp, &mut pair.client.host);
        qp.modify(pair.now, host, state, &attributes).expect("allowed");
    }
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert!(!pair.client.qp.sq_draining());
}

/// RESET in the middle of a message; the host forgets the receive, and the next message takes the next.
#[test]
fn a_reset_in_the_middle_of_a_message_begins_anew() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 4096);
    let send = |pair: &mut sim::Pair, opcode, payload: &[u8]| {
        let packet = PacketRepr::new(BthRepr::new(opcode, 18, Psn::new(0xff_fff0)), payload);
        let mut bytes = vec![0; packet.len() + 4];
        packet.emit(&mut bytes).expect("room");
        pair.inject(true, &bytes);
    };
    pair.server.host.post_receive(1, &[target]);
    send(&mut pair, Opcode::RC_SEND_FIRST, &[1; 1024]);
    let attributes = *pair.server.qp.attributes();
    for state in [State::Reset, State::Init, State::Rtr] {
        pair.server.qp.modify(pair.now, &mut pair.server.host, state, &attributes).expect("allowed");
        if state == State::Reset {
            pair.server.host.forget();
        }
    }
    pair.server.host.post_receive(2, &[target]);
    send(&mut pair, Opcode::RC_SEND_ONLY, &[1; 4]);
    assert_eq!(pair.server.received(), [(2, OK)]);
}

/// A queue pair without a timeout waits for ever for what was lost; a timeout that is set later covers it.
#[test]
fn a_timeout_set_later_holds_for_what_is_in_flight() {
    let mut config = PairConfig::rc();
    config.attributes.timeout = 0;
    let (mut pair, source, target) = with_buffers(&config, 8);
    pair.links[0].lose = vec![0];
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    for timeout in [0, 10] {
        let attributes = Attributes { timeout, ..*pair.client.qp.attributes() };
        let (qp, host) = (&mut pair.client.qp, &mut pair.client.host);
        qp.modify(pair.now, host, State::Sqd, &attributes).expect("allowed");
    }
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert!(!pair.client.qp.sq_draining());
}

/// RDMA/rxe: Fix responder UAF on IB_QP_MAX_DEST_RD_ATOMIC modify_qp
#[test]
fn answers_that_wait_survive_a_smaller_depth() {
    for depth in [0, 1] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
        for id in 0..4 {
            pair.client.post(id, fetch_add(target, 1), &[source]);
        }
        pair.transmit();
        while let Some(bytes) = pair.links[0].receive(u64::MAX) {
            pair.inject(true, &bytes);
        }
        let attributes = Attributes { max_dest_rd_atomic: depth, ..*pair.server.qp.attributes() };
        let (qp, host) = (&mut pair.server.qp, &mut pair.server.host);
        qp.modify(pair.now, host, State::Rts, &attributes).expect("allowed");
        pair.drive();
        assert_eq!(pair.client.sent(), [0, 1, 2, 3].map(|id| (id, OK)));
        assert_eq!(pair.client.host.bytes(source), 3u64.to_ne_bytes());
    }
}
