//! RC when packets are lost: retransmission, duplicates, RNR, and how it gives up.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

mod sim;

use rdma_soft::proto::{
    Acks, Attributes, Counter, MAX_PACKET_LEN, PathMtu, SendOperation, State, Status, Time,
};
use rdma_soft::wire::{AethRepr, BthRepr, NakCode, Opcode, PacketRepr, Psn, RnrTimer, Syndrome};
use sim::{
    LinkConfig, Pair, PairConfig, Rights, atomic_write, fetch_add, pattern, read_from, with_buffers, write_to,
};

const OK: Status = Status::Success;

fn with_attributes(change: impl FnOnce(&mut Attributes)) -> PairConfig {
    let mut config = PairConfig::rc();
    change(&mut config.attributes);
    config
}

/// A NAK reports a gap at once, the rest is sent again from there, and no timeout passes.
#[test]
fn a_lost_packet_is_reported_by_a_nak() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 10 * 1024);
    pair.links[0].lose = vec![3];
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.server.host.bytes(target), pattern(10 * 1024));
    assert_eq!(pair.client.host.counter(Counter::SequenceNakReceived), 1);
    assert_eq!(pair.client.host.counter(Counter::Timeout) + pair.client.host.counter(Counter::Probe), 0);
    assert_eq!(pair.links[0].sent, 10 + 7);
}

#[test]
fn a_lost_tail_is_noticed_by_time() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.links[0].lose = vec![0];
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.client.host.counter(Counter::Probe), 1);
    assert!(pair.now.nanoseconds() > (4096 << 9) / 2);
}

#[test]
fn a_lost_acknowledgement_makes_a_duplicate_that_is_acknowledged_again() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.server.host.post_receive(1, &[target]);
    pair.server.host.post_receive(2, &[target]);
    pair.links[1].lose = vec![0];
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.server.received(), [(1, OK)], "delivered once");
    assert_eq!(pair.server.host.counter(Counter::DuplicateRequest), 1);
}

/// What the server sends, as (opcode, PSN from the first one), when it gets `packets`.
fn answers(pair: &mut Pair, packets: &[Vec<u8>]) -> Vec<(u8, u32)> {
    for packet in packets {
        pair.inject(true, packet);
    }
    pair.trace = Some(vec![]);
    pair.transmit();
    let trace = pair.trace.take().expect("traced");
    let sent = trace.iter().filter(|(client, ..)| !client);
    sent.map(|(_, opcode, psn)| (*opcode, *psn - Psn::new(0xff_fff0))).collect()
}

/// All packets that the client has on the way.
fn on_the_way(pair: &mut Pair) -> Vec<Vec<u8>> {
    pair.transmit();
    std::iter::from_fn(|| pair.links[0].receive(u64::MAX)).collect()
}

/// The end of a message is acknowledged when its end comes again, not when its beginning does: rxe takes the former
/// while it still sends for a request that needs no more answer.
#[test]
fn a_duplicate_is_acknowledged_by_its_own_psn() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 4 * 1024);
    pair.client.post(1, write_to(target), &[source]);
    let packets = on_the_way(&mut pair);
    let acknowledge = Opcode::RC_ACKNOWLEDGE.value();
    assert_eq!(answers(&mut pair, &packets), [(acknowledge, 3)]);
    assert_eq!(answers(&mut pair, &packets[..1]), [(acknowledge, 0)]);
    assert_eq!(answers(&mut pair, &packets[1..]), [(acknowledge, 3)]);
    let backwards: Vec<_> = packets.into_iter().rev().collect();
    assert_eq!(answers(&mut pair, &backwards), [(acknowledge, 3)], "the latest of them");
}

/// A READ or atomic is acknowledged by its response alone. An acknowledgement with its PSN would complete it without
/// its data where the requester trusts its peer (rxe does).
#[test]
fn an_acknowledgement_of_a_duplicate_names_no_read_and_no_atomic() {
    for operation in [read_from, |target| fetch_add(target, 1), atomic_write] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
        pair.client.post(1, write_to(target), &[source]);
        pair.client.post(2, operation(target), &[source]);
        let packets = on_the_way(&mut pair);
        assert_eq!(answers(&mut pair, &packets).last().map(|(_, psn)| *psn), Some(1), "answered");
        assert_eq!(answers(&mut pair, &packets[..1]), [(Opcode::RC_ACKNOWLEDGE.value(), 0)]);
    }
}

#[test]
fn a_lost_read_response_is_asked_for_again_from_there() {
    for lost in 0..8 {
        let mut pair = Pair::rc();
        let target = pair.client.host.register(vec![0; 8000], Rights::ALL);
        let source = pair.server.host.register(pattern(8000), Rights::ALL);
        pair.links[1].lose = vec![lost];
        pair.client.post(1, read_from(source), &[target]);
        pair.trace = Some(vec![]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)]);
        assert_eq!(pair.client.host.bytes(target), pattern(8000));
        let trace = pair.trace.take().expect("traced");
        let asked: Vec<u32> =
            trace.iter().filter(|(client, ..)| *client).map(|(.., psn)| *psn - Psn::new(0xff_fff0)).collect();
        assert_eq!(asked, [0, lost as u32], "response {lost} lost");
        let silent = lost == 7;
        assert_eq!(pair.client.host.counter(Counter::ImpliedNak), u64::from(!silent));
    }
}

#[test]
fn a_lost_atomic_answer_is_repeated_and_not_executed_again() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    pair.links[1].lose = vec![0, 1];
    pair.client.post(1, fetch_add(target, 3), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.client.host.bytes(source), 0u64.to_ne_bytes());
    assert_eq!(pair.server.host.bytes(target), 3u64.to_ne_bytes());
    assert_eq!(pair.server.host.counter(Counter::DuplicateRequest), 2);
}

#[test]
fn a_lost_answer_to_an_atomic_write_is_repeated() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    pair.links[1].lose = vec![0, 1];
    pair.client.post(1, atomic_write(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.server.host.bytes(target), pattern(8));
    assert_eq!(pair.server.host.counter(Counter::DuplicateRequest), 2);
}

/// The answer to a SEND that overtakes a lost READ response shows the loss.
#[test]
fn an_acknowledgement_beyond_a_read_implies_a_nak() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.links[1].lose = vec![0];
    pair.client.post(1, read_from(target), &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK), (2, OK)]);
    assert_eq!(pair.client.host.counter(Counter::ImpliedNak), 1);
    assert_eq!(pair.client.host.counter(Counter::Timeout), 0);
}

#[test]
fn silence_exhausts_the_retries_and_flushes_in_order() {
    let (mut pair, source, target) =
        with_buffers(&with_attributes(|attributes| attributes.retry_count = 5), 64);
    pair.links[0].config = LinkConfig { loss: 1.0, ..LinkConfig::default() };
    pair.client.host.post_receive(9, &[source]);
    for id in 1..=3 {
        pair.client.post_with(id, write_to(target), &[source], rdma_soft::proto::SendFlags::empty());
    }
    pair.drive();
    let flushed = [(1, Status::RetryExceeded), (2, Status::WrFlush), (3, Status::WrFlush)];
    assert_eq!(pair.client.sent(), flushed, "visible although unsignalled");
    assert_eq!(pair.client.received(), [(9, Status::WrFlush)]);
    assert_eq!(pair.client.qp.state(), State::Err);
    assert_eq!(pair.client.host.counter(Counter::Timeout), 6, "five retries, then the end");
    let timeouts = 1 + 1 + 2 + 3 + 4 + 4;
    assert_eq!(
        pair.now.nanoseconds(),
        timeouts * (4096 << 9),
        "each is longer, up to four times the attribute"
    );
    assert_eq!(pair.client.qp.poll_timeout(), None);
}

/// Two threads work on a queue pair, and one of them read the clock long before it gets to send: what it sends is
/// as late as all the rest, and silence takes as long as ever to exhaust the retries.
#[test]
fn a_clock_that_was_read_too_early_uses_up_no_retries() {
    let (mut pair, source, target) =
        with_buffers(&with_attributes(|attributes| attributes.retry_count = 3), 64);
    let timeout = 4096 << 9;
    let early = pair.now;
    let mut out = [0; MAX_PACKET_LEN];
    pair.client.post(1, write_to(target), &[source]);
    let client = &mut pair.client;
    let mut now = Time::from_nanoseconds(early.nanoseconds() + 10 * timeout);
    let start = now;
    // What one thread finds due, the other sends again.
    for _ in 0..100 {
        while client.qp.poll_transmit(early, &mut client.host, Acks::Flush, &mut out).is_some() {}
        let Some(due) = client.qp.poll_timeout() else { break };
        now = now.max(due);
        client.qp.handle_timeout(now, &mut client.host);
    }
    assert_eq!(client.sent(), [(1, Status::RetryExceeded)]);
    let silence = now.saturating_since(start).as_nanos();
    assert!(silence >= 3 * u128::from(timeout), "gave up after {silence} ns");
}

/// Progress restores the retry count: losses that are apart never add up.
#[test]
fn progress_restores_the_retries() {
    let (mut pair, source, target) =
        with_buffers(&with_attributes(|attributes| attributes.retry_count = 1), 64);
    for id in 0..20 {
        let next = pair.links[0].sent;
        // The request and its probe are lost, the retry gets through.
        pair.links[0].lose = vec![next, next + 1];
        pair.client.post(id, write_to(target), &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(id, OK)]);
    }
    assert_eq!(pair.client.host.counter(Counter::Timeout), 20);
}

#[test]
fn without_a_timeout_nothing_ticks() {
    let (mut pair, source, target) = with_buffers(&with_attributes(|attributes| attributes.timeout = 0), 64);
    pair.links[0].lose = vec![0];
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), []);
    assert_eq!(pair.client.qp.poll_timeout(), None);
}

#[test]
fn a_retry_count_of_zero_sends_nothing_twice() {
    let (mut pair, source, target) =
        with_buffers(&with_attributes(|attributes| attributes.retry_count = 0), 3000);
    pair.links[0].lose = vec![1];
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::RetryExceeded)]);
    assert_eq!(pair.links[0].sent, 3);
}

#[test]
fn a_receiver_that_is_not_ready_is_waited_for() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    for id in 1..=3 {
        pair.client.post(id, SendOperation::Send, &[source]);
    }
    pair.drive_for(2_000_000);
    assert_eq!(pair.client.sent(), []);
    let told = pair.server.host.counter(Counter::RnrNakSent);
    assert!((2..=4).contains(&told), "once per 640 us, not once per packet: {told}");
    for id in 1..=3 {
        pair.server.host.post_receive(id, &[target]);
    }
    pair.drive();
    assert_eq!(pair.client.sent(), [1, 2, 3].map(|id| (id, OK)));
    assert_eq!(pair.server.received(), [1, 2, 3].map(|id| (id, OK)));
}

#[test]
fn rnr_retries_run_out() {
    let (mut pair, source, _) = with_buffers(
        &with_attributes(|attributes| {
            attributes.rnr_retry = 2;
            attributes.min_rnr_timer = RnrTimer::new(1);
        }),
        64,
    );
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.client.post(2, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::RnrRetryExceeded), (2, Status::WrFlush)]);
    assert_eq!(pair.client.host.counter(Counter::RnrNakReceived), 3);
    assert_eq!(pair.server.qp.state(), State::Rts, "the responder is not at fault");
}

/// A packet that acknowledges, and one that refuses, up to the PSN at `offset`.
fn acknowledge(syndrome: Syndrome, offset: u32) -> Vec<u8> {
    let bth = BthRepr::new(Opcode::RC_ACKNOWLEDGE, 17, Psn::new(0xff_fff0) + offset);
    let mut bytes = vec![0; 20];
    let aeth = AethRepr { syndrome, msn: 0 };
    PacketRepr { aeth: Some(aeth), ..PacketRepr::new(bth, &[]) }.emit(&mut bytes).expect("room");
    bytes
}

/// An acknowledgement that overtakes the RNR NAK before it ends the wait.
#[test]
fn progress_ends_an_rnr_wait() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.transmit();
    pair.inject(false, &acknowledge(Syndrome::rnr_nak(RnrTimer::new(0)), 0));
    pair.inject(false, &acknowledge(Syndrome::ACK, 1));
    assert_eq!(pair.client.sent(), [(1, OK), (2, OK)]);
    assert_eq!(pair.client.qp.poll_timeout(), None, "an empty queue has no timer");
    pair.client.post(3, write_to(target), &[source]);
    let before = pair.links[0].sent;
    pair.transmit();
    assert_eq!(pair.links[0].sent, before + 1, "a new request waits for nobody's receive");
}

/// Copies of an RNR NAK that come before the request is sent again are of no account.
#[test]
fn a_late_copy_of_an_rnr_nak_costs_no_retry() {
    let config = with_attributes(|attributes| attributes.rnr_retry = 1);
    let (mut pair, source, target) = with_buffers(&config, 64);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.transmit();
    let nak = acknowledge(Syndrome::rnr_nak(RnrTimer::new(1)), 0);
    for _ in 0..3 {
        pair.inject(false, &nak);
        pair.inject(false, &nak);
        pair.now = pair.client.qp.poll_timeout().expect("waits");
        pair.client.qp.handle_timeout(pair.now, &mut pair.client.host);
    }
    assert_eq!(pair.client.sent(), []);
    pair.server.host.post_receive(1, &[target]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
}

/// A late duplicate of an answered READ and the next READ, taken before anything is answered.
#[test]
fn a_duplicate_of_an_answered_read_takes_no_room() {
    for depth in [1u8, 4] {
        let config = with_attributes(|attributes| {
            attributes.max_rd_atomic = depth;
            attributes.max_dest_rd_atomic = depth;
        });
        let (mut pair, source, target) = with_buffers(&config, 64);
        let mut requests = vec![];
        for id in 0..=u64::from(depth) {
            pair.client.post(id, read_from(target), &[source]);
            pair.transmit();
            requests.extend(pair.links[0].receive(u64::MAX));
        }
        assert_eq!(requests.len(), usize::from(depth), "the last waits");
        for request in &requests {
            pair.inject(true, request);
        }
        pair.transmit();
        while let Some(response) = pair.links[1].receive(u64::MAX) {
            pair.inject(false, &response);
        }
        assert_eq!(pair.client.sent().len(), usize::from(depth));
        // The network repeats the first request; the last arrives with it.
        pair.inject(true, &requests[0]);
        pair.transmit();
        let last = pair.links[0].receive(u64::MAX).expect("sent");
        pair.inject(true, &requests[0]);
        pair.inject(true, &last);
        pair.drive();
        assert_eq!(pair.client.sent(), [(u64::from(depth), OK)], "depth {depth}");
        assert_eq!(pair.server.qp.state(), State::Rts);
    }
}

/// Nothing is lost or repeated by the network: the answer is slow, the READ is probed, and the server takes the probe
/// and the next READ together.
#[test]
fn a_probed_read_does_not_refuse_the_next() {
    let config = with_attributes(|attributes| {
        attributes.max_rd_atomic = 1;
        attributes.max_dest_rd_atomic = 1;
    });
    let (mut pair, source, target) = with_buffers(&config, 64);
    let mut buffer = vec![0; MAX_PACKET_LEN];
    let mut poll = |pair: &mut Pair, client: bool| {
        let side = if client { &mut pair.client } else { &mut pair.server };
        let sent = side.qp.poll_transmit(pair.now, &mut side.host, Acks::Flush, &mut buffer)?;
        Some(buffer[..sent.len + 4].to_vec())
    };
    pair.client.post(1, read_from(target), &[source]);
    pair.client.post(2, read_from(target), &[source]);
    let first = poll(&mut pair, true).expect("READ 1");
    pair.now = pair.client.qp.poll_timeout().expect("probe");
    pair.client.qp.handle_timeout(pair.now, &mut pair.client.host);
    let probe = poll(&mut pair, true).expect("READ 1 again");
    assert_eq!(first, probe);
    pair.inject(true, &first);
    let answer = poll(&mut pair, false).expect("response 1");
    pair.inject(false, &answer);
    assert_eq!(pair.client.sent(), [(1, OK)]);
    let second = poll(&mut pair, true).expect("READ 2");
    pair.inject(true, &probe);
    pair.inject(true, &second);
    while let Some(bytes) = poll(&mut pair, false) {
        pair.inject(false, &bytes);
    }
    assert_eq!(pair.client.sent(), [(2, OK)]);
    assert_eq!(pair.server.qp.state(), State::Rts);
}

/// The memory of an answered READ may be withdrawn; a late copy of the request is no access error.
#[test]
fn a_duplicate_of_a_read_of_withdrawn_memory_is_dropped() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, read_from(target), &[source]);
    pair.transmit();
    let request = pair.links[0].receive(u64::MAX).expect("sent");
    pair.inject(true, &request);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    pair.server.host.regions.clear();
    pair.inject(true, &request);
    pair.transmit();
    assert_eq!(pair.server.qp.state(), State::Rts);
    assert_eq!(pair.server.host.events, []);
    assert_eq!(pair.server.host.counter(Counter::DropForgotten), 1);
}

/// A copy of a NAK, or one that comes late, does not send the flight again.
#[test]
fn a_stray_nak_is_obeyed_once() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 20 * 1024);
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    let sent = pair.links[0].sent;
    let nak = |offset| acknowledge(Syndrome::nak(NakCode::PSN_SEQUENCE), offset);
    for _ in 0..10 {
        pair.inject(false, &nak(5));
        pair.transmit();
    }
    assert_eq!(pair.links[0].sent, sent + 15, "20 packets, 5 of them acknowledged");
    pair.inject(false, &nak(3));
    pair.transmit();
    assert_eq!(pair.links[0].sent, sent + 15, "stale");
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
}

/// The window falls at a loss, at most once per flight, and recovers.
#[test]
fn the_window_follows_losses() {
    let config = PairConfig { mtu: PathMtu::Mtu4096, ..PairConfig::rc() };
    let (mut pair, source, target) = with_buffers(&config, 2 << 20);
    pair.links[0].lose = vec![2, 5, 9];
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.server.host.bytes(target), pattern(2 << 20));
    assert!(pair.links[0].sent < 512 + 3 * 32 + 3);
}

#[test]
fn reordering_alone_fails_nothing() {
    for seed in 0..20 {
        let link = LinkConfig { reorder: 0.2, duplicate: 0.1, ..LinkConfig::default() };
        let (mut pair, source, target) = with_buffers(&PairConfig { link, seed, ..PairConfig::rc() }, 60_000);
        for id in 0..8 {
            pair.client.post(id, if id % 2 == 0 { write_to(target) } else { read_from(target) }, &[source]);
        }
        pair.drive();
        assert_eq!(pair.client.sent(), (0..8).map(|id| (id, OK)).collect::<Vec<_>>(), "seed {seed}");
    }
}
