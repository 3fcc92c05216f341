//! RC when packets are lost: retransmission, duplicates, RNR, and how it gives up.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

mod sim;

use rdma_soft::proto::{Attributes, Counter, PathMtu, SendOperation, State, Status};
use rdma_soft::wire::{AethRepr, BthRepr, NakCode, Opcode, PacketRepr, Psn, RnrTimer, Syndrome};
use sim::{LinkConfig, Pair, PairConfig, Rights, fetch_add, pattern, read_from, with_buffers, write_to};

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
        with_buffers(&with_attributes(|attributes| attributes.retry_count = 3), 64);
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
    assert_eq!(pair.client.host.counter(Counter::Timeout), 4, "three retries, then the end");
    assert_eq!(pair.now.nanoseconds(), 4 * (4096 << 9), "the local ack timeout is kept");
    assert_eq!(pair.client.qp.poll_timeout(), None);
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

/// A copy of a NAK, or one that comes late, does not send the flight again.
#[test]
fn a_stray_nak_is_obeyed_once() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 20 * 1024);
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    let sent = pair.links[0].sent;
    let nak = |offset: u32| {
        let bth = BthRepr::new(Opcode::RC_ACKNOWLEDGE, 17, Psn::new(0xff_fff0) + offset);
        let aeth = AethRepr { syndrome: Syndrome::nak(NakCode::PSN_SEQUENCE), msn: 0 };
        let mut bytes = vec![0; 20];
        PacketRepr { aeth: Some(aeth), ..PacketRepr::new(bth, &[]) }.emit(&mut bytes).expect("room");
        bytes
    };
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
