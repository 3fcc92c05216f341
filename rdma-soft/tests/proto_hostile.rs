//! Packets that no honest peer sends. Each test names the fix that the kernel's drivers once needed.

mod sim;

use rdma_soft::proto::{Attributes, Counter, Event, SendOperation, Sge, State, Status};
use rdma_soft::wire::{
    AethRepr, AtomicAckEthRepr, AtomicEthRepr, BthRepr, IethRepr, ImmDtRepr, NakCode, Opcode, PacketRepr,
    Psn, RethRepr, Syndrome, Transport,
};
use sim::{
    Pair, PairConfig, Rights, Rng, atomic_write, fetch_add, pattern, read_from, with_buffers, write_to,
};

const START: u32 = 0xff_fff0;

/// BTH of a packet to the server, `offset` packets after the first.
fn bth(opcode: Opcode, offset: u32) -> BthRepr {
    BthRepr { ack_request: true, ..BthRepr::new(opcode, 18, Psn::new(START) + offset) }
}

fn send(pair: &mut Pair, to_server: bool, packet: &PacketRepr<'_>) {
    let mut bytes = vec![0; packet.len() + 4];
    packet.emit(&mut bytes).expect("room");
    pair.inject(to_server, &bytes);
}

fn write<'a>(opcode: Opcode, offset: u32, target: Sge, dma_len: u32, payload: &'a [u8]) -> PacketRepr<'a> {
    let reth = RethRepr { va: target.addr, rkey: target.lkey, dma_len };
    PacketRepr { reth: Some(reth), ..PacketRepr::new(bth(opcode, offset), payload) }
}

fn ack(opcode: Opcode, offset: u32, payload: &[u8]) -> PacketRepr<'_> {
    let aeth = AethRepr { syndrome: Syndrome::ACK, msn: 1 };
    let middle = opcode == Opcode::RC_READ_RESPONSE_MIDDLE;
    PacketRepr { aeth: (!middle).then_some(aeth), ..PacketRepr::new(bth(opcode, offset), payload) }
}

/// The server answers with a NAK of `code`, is in ERR, and its memory is as it was.
fn is_refused(pair: &mut Pair, code: NakCode, target: Sge) {
    let nak = pair.server_nak();
    assert_eq!(nak, Some(Syndrome::nak(code)));
    assert_eq!(pair.server.qp.state(), State::Err);
    assert!(pair.server.host.bytes(target).iter().all(|byte| *byte == 0), "memory was touched");
}

/// RDMA/rxe: Fix packet length checks
#[test]
fn payloads_of_a_length_that_their_place_forbids_are_refused() {
    let full = [1; 1024];
    let long = [1; 1028];
    for (opcode, payload) in [
        (Opcode::RC_WRITE_FIRST, &full[..1020]),
        (Opcode::RC_WRITE_FIRST, &full[..0]),
        (Opcode::RC_WRITE_FIRST, &long[..]),
        (Opcode::RC_WRITE_ONLY, &long[..]),
    ] {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 4096);
        send(&mut pair, true, &write(opcode, 0, target, 2000, payload));
        is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
        assert_eq!(pair.server.host.events, [Event::AccessError]);
    }
    for (opcode, payload) in [(Opcode::RC_SEND_FIRST, &full[..4]), (Opcode::RC_SEND_ONLY, &long[..])] {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 4096);
        pair.server.host.post_receive(7, &[target]);
        send(&mut pair, true, &PacketRepr::new(bth(opcode, 0), payload));
        is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
    }
}

/// RDMA/rxe: Fix packet length checks
#[test]
fn a_write_that_brings_more_or_less_than_it_announced_is_refused() {
    let full = [0; 1024];
    // (packets, announced)
    for (packets, announced) in [
        (vec![(Opcode::RC_WRITE_ONLY, 10)], 9),
        (vec![(Opcode::RC_WRITE_ONLY, 10)], 11),
        (vec![(Opcode::RC_WRITE_ONLY, 0)], 1),
        (vec![(Opcode::RC_WRITE_FIRST, 1024)], 1024),
        (vec![(Opcode::RC_WRITE_FIRST, 1024), (Opcode::RC_WRITE_LAST, 1024)], 2047),
        (vec![(Opcode::RC_WRITE_FIRST, 1024), (Opcode::RC_WRITE_LAST, 1)], 2048),
        (vec![(Opcode::RC_WRITE_FIRST, 1024), (Opcode::RC_WRITE_MIDDLE, 1024)], 2048),
        (vec![(Opcode::RC_WRITE_ONLY, 0)], (1 << 31) + 1),
    ] {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 4096);
        for (offset, (opcode, len)) in (0..).zip(packets) {
            let packet = write(opcode, offset, target, announced, &full[..len]);
            let begins = opcode.info().expect("known").position.begins();
            send(&mut pair, true, &PacketRepr { reth: packet.reth.filter(|_| begins), ..packet });
        }
        is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
    }
}

/// RDMA/rxe: Reject non-8-byte ATOMIC_WRITE payloads
#[test]
fn an_atomic_write_of_other_than_eight_bytes_is_refused() {
    let full = [1; 1024];
    // (announced, brought)
    for (announced, len) in [
        (0, 0),
        (0, 8),
        (8, 0),
        (4, 4),
        (7, 7),
        (8, 7),
        (7, 8),
        (8, 9),
        (9, 9),
        (8, 16),
        (16, 16),
        (1024, 1024),
    ] {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 4096);
        send(&mut pair, true, &write(Opcode::RC_ATOMIC_WRITE, 0, target, announced, &full[..len]));
        is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
    }
}

/// RDMA/rxe: Generate a completion for unsupported/invalid opcode
#[test]
fn packets_out_of_their_message_are_refused() {
    let full = [0; 1024];
    let sequences: [&[Opcode]; 8] = [
        &[Opcode::RC_SEND_MIDDLE],
        &[Opcode::RC_SEND_LAST],
        &[Opcode::RC_WRITE_MIDDLE],
        &[Opcode::RC_WRITE_LAST_WITH_IMMEDIATE],
        &[Opcode::RC_SEND_FIRST, Opcode::RC_SEND_ONLY],
        &[Opcode::RC_SEND_FIRST, Opcode::RC_WRITE_MIDDLE],
        &[Opcode::RC_WRITE_FIRST, Opcode::RC_SEND_LAST],
        &[Opcode::RC_SEND_FIRST, Opcode::RC_READ_REQUEST],
    ];
    for sequence in sequences {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 8192);
        pair.server.host.post_receive(7, &[target]);
        for (offset, opcode) in (0..).zip(sequence) {
            let info = opcode.info().expect("known");
            let reth = RethRepr { va: target.addr, rkey: target.lkey, dma_len: 4096 };
            let packet = PacketRepr {
                reth: info.headers.contains(rdma_soft::wire::Headers::RETH).then_some(reth),
                immdt: info.carries_immediate().then_some(ImmDtRepr { data: [0; 4] }),
                ..PacketRepr::new(bth(*opcode, offset), if info.has_payload { &full } else { &[] })
            };
            send(&mut pair, true, &packet);
        }
        is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
        let flushed = pair.server.received();
        assert_eq!(flushed, [(7, Status::WrFlush)], "{sequence:?}");
        assert_eq!(pair.server.host.events, [Event::RequestError]);
    }
}

/// RDMA/rxe: Avoid reprocessing the current packet after the QP enters the error state
#[test]
fn nothing_is_executed_after_the_queue_pair_failed() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 64);
    let bad = Sge { lkey: 0xdead, ..target };
    send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, 0, bad, 4, &[1; 4]));
    for offset in 0..3 {
        send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, offset, target, 4, &[1; 4]));
    }
    is_refused(&mut pair, NakCode::REMOTE_ACCESS, target);
    assert_eq!(pair.server_nak(), None, "said once");
    assert_eq!(pair.server.host.counter(Counter::DropState), 3);
    assert_eq!((pair.server.host.flushed, pair.server.host.events.len()), (1, 1));
}

/// RDMA/rxe: Compute PSN windows correctly
#[test]
fn numbers_far_ahead_and_far_behind_touch_nothing() {
    for (offset, counter) in [
        (1, Counter::OutOfSequenceRequest),
        (1 << 20, Counter::OutOfSequenceRequest),
        ((1 << 20) + 1, Counter::DropPsn),
        (Psn::WINDOW - 1, Counter::DropPsn),
        (Psn::WINDOW, Counter::DuplicateRequest),
        (Psn::MODULUS - 1, Counter::DuplicateRequest),
    ] {
        let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 64);
        send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, offset, target, 4, &[1; 4]));
        assert_eq!(pair.server.host.counter(counter), 1, "{offset:#x}");
        assert_eq!(pair.server.host.bytes(target), [0; 64]);
        assert_eq!(pair.server.qp.state(), State::Rts);
        assert_eq!(pair.server.qp.receive_psn(), Psn::new(START));
    }
}

/// RDMA/rxe: Compute PSN windows correctly
#[test]
fn acknowledgements_of_what_was_never_sent_are_dropped() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    for offset in [0, 1, 1000, Psn::WINDOW, Psn::MODULUS - 1] {
        send(&mut pair, false, &ack(Opcode::RC_ACKNOWLEDGE, offset, &[]));
    }
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    for offset in [1, 2, Psn::WINDOW - 1, Psn::WINDOW, Psn::MODULUS - 1] {
        send(&mut pair, false, &ack(Opcode::RC_ACKNOWLEDGE, offset, &[]));
        assert_eq!(pair.client.sent(), []);
    }
    send(&mut pair, false, &ack(Opcode::RC_ACKNOWLEDGE, 0, &[]));
    assert_eq!(pair.client.sent(), [(1, Status::Success)]);
}

/// RDMA/siw: bound Read Response placement to the RREAD length
#[test]
fn read_responses_of_a_wrong_length_place_nothing() {
    let full = [7; 1024];
    let long = [7; 1028];
    for (opcode, payload) in [
        (Opcode::RC_READ_RESPONSE_FIRST, &long[..]),
        (Opcode::RC_READ_RESPONSE_FIRST, &full[..1020]),
        (Opcode::RC_READ_RESPONSE_FIRST, &full[..0]),
        (Opcode::RC_READ_RESPONSE_ONLY, &full[..]),
        (Opcode::RC_READ_RESPONSE_LAST, &full[..952]),
    ] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 3000);
        pair.client.post(1, read_from(target), &[Sge { length: 2000, ..source }]);
        pair.client.post(2, read_from(target), &[source]);
        pair.transmit();
        send(&mut pair, false, &ack(opcode, 0, payload));
        assert_eq!(pair.client.sent(), [(1, Status::BadResponse), (2, Status::WrFlush)], "{opcode:?}");
        assert_eq!(pair.client.host.bytes(source), pattern(3000));
    }
    // The last one is as long as the rest of the message.
    for len in [0, 972, 980, 1024] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 3000);
        pair.client.post(1, read_from(target), &[Sge { length: 2000, ..source }]);
        pair.transmit();
        send(&mut pair, false, &ack(Opcode::RC_READ_RESPONSE_FIRST, 0, &full));
        send(&mut pair, false, &ack(Opcode::RC_READ_RESPONSE_LAST, 1, &full[..len]));
        assert_eq!(pair.client.sent(), [(1, Status::BadResponse)], "{len}");
        assert_eq!(pair.client.host.bytes(source)[1024..], pattern(3000)[1024..]);
    }
}

/// RDMA/rxe: Fix seg fault in rxe_comp_queue_pkt
/// RDMA/siw: Fix potential NULL pointer dereference in header processing
#[test]
fn responses_that_nobody_asked_for_are_dropped() {
    for opcode in [
        Opcode::RC_ACKNOWLEDGE,
        Opcode::RC_READ_RESPONSE_FIRST,
        Opcode::RC_READ_RESPONSE_MIDDLE,
        Opcode::RC_READ_RESPONSE_LAST,
        Opcode::RC_READ_RESPONSE_ONLY,
        Opcode::RC_ATOMIC_ACKNOWLEDGE,
    ] {
        let is_atomic = opcode == Opcode::RC_ATOMIC_ACKNOWLEDGE;
        let packet = PacketRepr {
            atomic_ack_eth: is_atomic.then_some(AtomicAckEthRepr { original: 1 }),
            ..ack(opcode, 0, &[])
        };
        let mut pair = Pair::rc();
        send(&mut pair, false, &packet);
        assert_eq!(pair.client.qp.state(), State::Rts);
        assert_eq!(pair.client.host.counter(Counter::DropResponse), 1);
        let attributes = *pair.client.qp.attributes();
        for state in [State::Reset, State::Init, State::Rtr, State::Err] {
            pair.client.qp.modify(pair.now, &mut pair.client.host, state, &attributes).expect("allowed");
            send(&mut pair, false, &packet);
        }
        assert_eq!(pair.client.host.counter(Counter::DropState), 4);
        assert_eq!(pair.client.sent(), []);
    }
}

#[test]
fn a_response_of_another_kind_than_the_request_is_a_bad_response() {
    let answer = |operation: fn(Sge) -> SendOperation, packet: &PacketRepr<'_>| {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
        pair.client.post(1, operation(target), &[source]);
        pair.transmit();
        send(&mut pair, false, packet);
        assert_eq!(pair.client.host.bytes(source), pattern(8));
        pair.client.sent()
    };
    let atomic = PacketRepr {
        atomic_ack_eth: Some(AtomicAckEthRepr { original: 1 }),
        ..ack(Opcode::RC_ATOMIC_ACKNOWLEDGE, 0, &[])
    };
    let read = ack(Opcode::RC_READ_RESPONSE_ONLY, 0, &[0; 8]);
    let bad = [(1, Status::BadResponse)];
    assert_eq!(answer(write_to, &atomic), bad);
    assert_eq!(answer(write_to, &read), bad);
    assert_eq!(answer(read_from, &atomic), bad);
    assert_eq!(answer(|target| fetch_add(target, 1), &read), bad);
    // An ATOMIC WRITE is answered without data, in one packet.
    assert_eq!(answer(atomic_write, &read), bad);
    assert_eq!(answer(atomic_write, &atomic), bad);
    assert_eq!(answer(atomic_write, &ack(Opcode::RC_READ_RESPONSE_LAST, 0, &[])), bad);
}

/// A plain acknowledgement in place of a READ response or atomic answer completes nothing.
#[test]
fn an_acknowledgement_is_no_answer_to_a_read() {
    for operation in [read_from as fn(Sge) -> SendOperation, |target| fetch_add(target, 1), atomic_write] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
        pair.client.post(1, operation(target), &[source]);
        pair.transmit();
        for _ in 0..3 {
            send(&mut pair, false, &ack(Opcode::RC_ACKNOWLEDGE, 0, &[]));
        }
        assert_eq!(pair.client.sent(), []);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, Status::Success)]);
    }
}

/// What came after it must not be overwritten by a late copy.
#[test]
fn a_duplicate_of_an_atomic_write_is_answered_and_not_written() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    pair.client.post(1, atomic_write(target), &[source]);
    pair.drive();
    assert_eq!(pair.server.host.bytes(target), pattern(8));
    let sent = pair.links[1].sent;
    for payload in [&[7; 8][..], &[]] {
        send(&mut pair, true, &write(Opcode::RC_ATOMIC_WRITE, 0, target, 8, payload));
    }
    pair.transmit();
    assert_eq!(pair.links[1].sent, sent + 1);
    // A READ or an atomic in its place.
    send(&mut pair, true, &write(Opcode::RC_READ_REQUEST, 0, target, 8, &[]));
    let atomic = AtomicEthRepr { va: target.addr, rkey: target.lkey, swap_add: 5, compare: 0 };
    let packet =
        PacketRepr { atomic_eth: Some(atomic), ..PacketRepr::new(bth(Opcode::RC_FETCH_ADD, 0), &[]) };
    send(&mut pair, true, &packet);
    pair.transmit();
    assert_eq!(pair.links[1].sent, sent + 1);
    assert_eq!(pair.server.host.counter(Counter::DropForgotten), 2);
    assert_eq!(pair.server.host.bytes(target), pattern(8));
}

/// A duplicate READ is answered only from what the original request was allowed.
#[test]
fn duplicates_that_differ_from_their_original_are_dropped() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 4096);
    let secret = pair.server.host.register(vec![9; 4096], Rights::ALL);
    pair.client.post(1, read_from(target), &[source]);
    pair.client.post(2, fetch_add(target, 1), &[source]);
    pair.drive();
    let sent = pair.links[1].sent;
    for (offset, sge, dma_len) in [
        (0, secret, 4096),
        (0, target, 4097),
        (1, target, 3072),
        (1, Sge { addr: target.addr + 1024, ..target }, 3073),
        (1, Sge { addr: target.addr + 1024, ..target }, u32::MAX),
        (0, target, 0),
        (4, target, 8),
        (Psn::MODULUS - 5, target, 8),
    ] {
        send(&mut pair, true, &write(Opcode::RC_READ_REQUEST, offset, sge, dma_len, &[]));
        pair.transmit();
        assert_eq!(pair.links[1].sent, sent, "{offset} {dma_len}");
    }
    // An ATOMIC WRITE in the place of a READ and of an atomic.
    for offset in [0, 4] {
        send(&mut pair, true, &write(Opcode::RC_ATOMIC_WRITE, offset, target, 8, &[7; 8]));
        pair.transmit();
        assert_eq!(pair.links[1].sent, sent);
    }
    // An atomic in the place of a READ, and one that was never executed.
    for offset in [0, Psn::MODULUS - 5] {
        let atomic = AtomicEthRepr { va: target.addr, rkey: target.lkey, swap_add: 5, compare: 0 };
        let packet = PacketRepr {
            atomic_eth: Some(atomic),
            ..PacketRepr::new(bth(Opcode::RC_FETCH_ADD, offset), &[])
        };
        send(&mut pair, true, &packet);
        pair.transmit();
        assert_eq!(pair.links[1].sent, sent);
    }
    assert_eq!(pair.server.host.counter(Counter::DropForgotten), 12);
    assert_eq!(pair.server.host.bytes(target)[..8], 1u64.to_ne_bytes());
    // A rest of the original is answered.
    let rest = Sge { addr: target.addr + 3072, ..target };
    send(&mut pair, true, &write(Opcode::RC_READ_REQUEST, 3, rest, 1024, &[]));
    pair.transmit();
    assert_eq!(pair.links[1].sent, sent + 1);
}

/// RDMA/rxe: Fix responder UAF on IB_QP_MAX_DEST_RD_ATOMIC modify_qp
#[test]
fn the_depth_of_reads_may_change_under_traffic() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 20_000);
    let mut rng = Rng::new(1);
    for id in 0..40 {
        pair.client.post(id, if id % 3 == 0 { fetch_add(target, 0) } else { read_from(target) }, &[source]);
        for _ in 0..5 {
            pair.step();
            let depth = u8::try_from(4 + rng.below(5)).expect("small");
            let attributes = Attributes { max_dest_rd_atomic: depth, ..*pair.server.qp.attributes() };
            let (qp, host) = (&mut pair.server.qp, &mut pair.server.host);
            qp.modify(pair.now, host, State::Rts, &attributes).expect("RTS to RTS");
        }
        if pair.client.qp.send_queue_len() > 10 {
            pair.drive();
        }
    }
    pair.drive();
    assert_eq!(pair.client.sent(), (0..40).map(|id| (id, Status::Success)).collect::<Vec<_>>());
}

/// RDMA/rxe: Reject unknown opcodes before ICRC processing (and those of another service)
#[test]
fn packets_of_another_service_are_dropped() {
    for (transport, opcode) in [
        (Transport::Rc, Opcode::UC_SEND_ONLY),
        (Transport::Rc, Opcode::CNP),
        (Transport::Uc, Opcode::RC_SEND_ONLY),
        (Transport::Ud, Opcode::UC_SEND_ONLY),
    ] {
        let (mut pair, _, target) = with_buffers(&PairConfig::new(transport), 64);
        pair.server.host.post_receive(7, &[target]);
        send(&mut pair, true, &PacketRepr::new(bth(opcode, 0), &[1; 16]));
        assert_eq!(pair.server.host.counter(Counter::DropTransport), 1);
        assert_eq!(pair.server.received(), []);
    }
}

/// RDMA/rxe: Fix "kernel NULL pointer dereference" error (packets before the queue pair is set up)
/// RDMA/rxe: Fix the use-before-initialization error of resp_pkts
/// RDMA/siw: publish QP after initialization
#[test]
fn packets_before_rtr_are_dropped() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 64);
    let attributes = *pair.server.qp.attributes();
    for state in [State::Reset, State::Init] {
        pair.server.qp.modify(pair.now, &mut pair.server.host, state, &attributes).expect("allowed");
        send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, 0, target, 4, &[1; 4]));
        assert_eq!(pair.server.host.bytes(target), [0; 64]);
        assert_eq!(pair.server_nak(), None);
    }
    assert_eq!(pair.server.host.counter(Counter::DropState), 2);
}

/// RDMA/rxe: Fix race condition in QP timer handlers
#[test]
fn timers_end_with_the_queue_pair() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, write_to(target), &[source]);
    pair.client.post(2, SendOperation::Send, &[source]);
    pair.transmit();
    assert!(pair.client.qp.poll_timeout().is_some());
    let attributes = *pair.client.qp.attributes();
    for state in [State::Err, State::Reset] {
        pair.client.qp.modify(pair.now, &mut pair.client.host, state, &attributes).expect("allowed");
        assert_eq!(pair.client.qp.poll_timeout(), None);
        let late = rdma_soft::proto::Time::from_nanoseconds(u64::MAX);
        pair.client.qp.handle_timeout(late, &mut pair.client.host);
    }
    assert_eq!(pair.client.sent(), [(1, Status::WrFlush), (2, Status::WrFlush)]);
}

/// RDMA/rxe: Fix mr leak in RESPST_ERR_RNR
#[test]
fn an_rnr_nak_leaves_nothing_behind() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 64);
    let immediate = |offset| PacketRepr {
        immdt: Some(ImmDtRepr { data: [1; 4] }),
        ..write(Opcode::RC_WRITE_ONLY_WITH_IMMEDIATE, offset, target, 4, &[1; 4])
    };
    for _ in 0..3 {
        pair.now = pair.now + std::time::Duration::from_millis(1);
        send(&mut pair, true, &immediate(0));
        assert!(pair.server_nak().is_some_and(|syndrome| syndrome.as_rnr_nak().is_some()));
        assert_eq!(pair.server.host.bytes(target), [0; 64], "nothing is written before there is a receive");
    }
    pair.server.host.post_receive(7, &[]);
    send(&mut pair, true, &immediate(0));
    assert_eq!(pair.server.received(), [(7, Status::Success)]);
    assert_eq!(pair.server.host.bytes(target)[..4], [1; 4]);
}

/// RDMA/rxe: Fix ref count error in check_rkey()
#[test]
fn a_message_without_data_needs_no_key() {
    let (mut pair, source, _) = with_buffers(&PairConfig::rc(), 64);
    let nothing = Sge { addr: 0, length: 0, lkey: 0 };
    pair.client.post(1, write_to(nothing), &[Sge { length: 0, ..source }]);
    pair.client.post(2, read_from(nothing), &[Sge { length: 0, ..source }]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::Success), (2, Status::Success)]);
}

/// Invalidating what is not there refuses the request, and the receive tells.
#[test]
fn an_invalidation_by_a_stranger_is_refused() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 64);
    pair.server.host.post_receive(7, &[target]);
    let packet = PacketRepr {
        ieth: Some(IethRepr { rkey: 0xdead }),
        ..PacketRepr::new(bth(Opcode::RC_SEND_ONLY_WITH_INVALIDATE, 0), &[])
    };
    send(&mut pair, true, &packet);
    is_refused(&mut pair, NakCode::INVALID_REQUEST, target);
    assert_eq!(pair.server.received(), [(7, Status::RemoteInvalidRequest)]);
    assert_eq!(pair.server.host.events, [], "the completion tells");
}

/// A refusal counts as sent when it leaves, not before: one that a reset takes along never does.
#[test]
fn refusals_are_counted_when_they_are_sent() {
    let (mut pair, ..) = with_buffers(&PairConfig::rc(), 64);
    send(&mut pair, true, &PacketRepr::new(bth(Opcode::RC_SEND_ONLY, 0), &[1; 16]));
    assert_eq!(pair.server.host.counter(Counter::RnrNakSent), 0);
    pair.transmit();
    assert_eq!(pair.server.host.counter(Counter::RnrNakSent), 1);
    send(&mut pair, true, &PacketRepr::new(bth(Opcode::RC_SEND_MIDDLE, 0), &[1; 1024]));
    assert_eq!(pair.server.host.counter(Counter::ErrorNakSent), 0);
    let attributes = *pair.server.qp.attributes();
    pair.server
        .qp
        .modify(pair.now, &mut pair.server.host, State::Reset, &attributes)
        .expect("from any state");
    pair.transmit();
    assert_eq!(pair.server.host.counter(Counter::ErrorNakSent), 0);
    assert_eq!(pair.links[1].sent, 1);
}

/// A sender that does not wait as it was told is not answered packet by packet.
#[test]
fn a_flood_without_a_receive_is_answered_now_and_then() {
    let (mut pair, ..) = with_buffers(&PairConfig::rc(), 64);
    for _ in 0..1000 {
        pair.now = pair.now + std::time::Duration::from_micros(1);
        send(&mut pair, true, &PacketRepr::new(bth(Opcode::RC_SEND_ONLY, 0), &[1; 16]));
        pair.transmit();
    }
    assert_eq!(pair.links[1].sent, 10, "once per 100 us");
    assert_eq!(pair.server.host.counter(Counter::RnrNakSent), 10);
    assert_eq!(pair.server.host.counter(Counter::DropNoReceive), 990);
}

/// A packet with a PSN of its sender's fancy does not make the peer send its flight again.
#[test]
fn a_stray_packet_far_ahead_is_dropped() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 40 * 1024);
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    send(&mut pair, true, &PacketRepr::new(bth(Opcode::RC_SEND_ONLY, 0x40_0000), &[]));
    assert_eq!(pair.server.host.counter(Counter::DropPsn), 1);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::Success)]);
    assert_eq!(pair.client.host.counter(Counter::Retransmitted), 0);
}

/// Nothing that arrives makes a queue pair send more than a bounded number of packets.
#[test]
fn a_flood_of_duplicates_is_answered_once_per_round() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    let sent = pair.links[1].sent;
    for _ in 0..1000 {
        send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, 0, target, 64, &[1; 64]));
    }
    for _ in 0..1000 {
        send(&mut pair, true, &write(Opcode::RC_WRITE_ONLY, 9, target, 64, &[1; 64]));
    }
    pair.transmit();
    assert_eq!(pair.links[1].sent, sent + 1, "one NAK that acknowledges as well");
    assert_eq!(pair.server.host.bytes(target), pattern(64));
}
