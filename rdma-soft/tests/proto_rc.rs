//! RC on a simulated link that loses nothing, as scripts.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

mod sim;

use rdma_soft::proto::{
    Acks, Attributes, BindRequest, Completion, CompletionKind, CompletionOpcode, Counter, Data, Event,
    ImmediateOrKey, PathMtu, PostError, SendFlags, SendOperation, Sge, State, Status,
};
use rdma_soft::wire::{Opcode, Transport};
use sim::{
    Pair, PairConfig, Rights, atomic_write, compare_swap, fetch_add, pattern, read_from, with_buffers,
    write_to,
};

const OK: Status = Status::Success;

#[test]
fn send_arrives_in_the_receive() {
    for len in [0, 1, 3, 1024, 1025, 5000, 65536] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), len);
        pair.server.host.post_receive(7, &[target]);
        pair.client.post(1, SendOperation::SendWithImmediate([1, 2, 3, 4]), &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)], "length {len}");
        let received = pair.server.host.take(CompletionKind::Receive);
        let expected = Completion {
            kind: CompletionKind::Receive,
            wr_id: 7,
            status: OK,
            opcode: CompletionOpcode::Receive,
            byte_len: len as u32,
            immediate: ImmediateOrKey::Immediate([1, 2, 3, 4]),
            src_qp: 0,
            grh: false,
            solicited: false,
        };
        assert_eq!(received, [expected]);
        assert_eq!(pair.server.host.bytes(target), pattern(len));
    }
}

#[test]
fn write_arrives_in_memory_and_takes_no_receive() {
    for len in [0, 1, 1024, 1025, 300_000] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), len);
        pair.server.host.post_receive(7, &[]);
        pair.client.post(1, write_to(target), &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)], "length {len}");
        assert_eq!(pair.server.received(), []);
        assert_eq!(pair.server.host.bytes(target), pattern(len));
    }
}

#[test]
fn write_with_immediate_takes_a_receive_and_says_how_much_was_written() {
    for len in [0, 8, 3000] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), len);
        pair.server.host.post_receive(7, &[]);
        let (va, rkey, immediate) = (target.addr, target.lkey, [9, 8, 7, 6]);
        pair.client.post(1, SendOperation::WriteWithImmediate { va, rkey, immediate }, &[source]);
        pair.drive();
        let received = pair.server.host.take(CompletionKind::Receive);
        assert_eq!(received[0].opcode, CompletionOpcode::ReceiveWriteWithImmediate);
        assert_eq!((received[0].wr_id, received[0].byte_len), (7, len as u32));
        assert_eq!(received[0].immediate, ImmediateOrKey::Immediate(immediate));
        assert_eq!(pair.server.host.bytes(target), pattern(len));
    }
}

#[test]
fn read_brings_the_bytes_of_the_peer() {
    for len in [0, 1, 1024, 1025, 65536, 65537, 1 << 20] {
        let mut pair = Pair::rc();
        let target = pair.client.host.register(vec![0; len], Rights::ALL);
        let source = pair.server.host.register(pattern(len), Rights::ALL);
        pair.client.post(1, read_from(source), &[target]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)], "length {len}");
        assert_eq!(pair.client.host.bytes(target), pattern(len));
        // Long ones are asked for in pieces, so that the window paces the responses too.
        let requests = len.div_ceil(65536).max(1) as u64;
        assert_eq!(pair.server.host.counter(Counter::ReceivedPackets), requests);
    }
}

#[test]
fn atomics_return_what_was_there() {
    let (mut pair, result, word) = with_buffers(&PairConfig::rc(), 8);
    for (operation, original) in
        [(fetch_add(word, 5), 0u64), (compare_swap(word, 5, 9), 5), (compare_swap(word, 5, 1), 9)]
    {
        pair.client.post(1, operation, &[result]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)]);
        assert_eq!(pair.client.host.bytes(result), original.to_ne_bytes());
    }
    assert_eq!(pair.server.host.bytes(word), 9u64.to_ne_bytes());
}

#[test]
fn atomic_write_stores_eight_bytes() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    pair.trace = Some(vec![]);
    pair.client.post(1, atomic_write(target), &[source]);
    pair.drive();
    let sent = pair.client.host.take(CompletionKind::Send);
    assert_eq!((sent[0].status, sent[0].opcode), (OK, CompletionOpcode::AtomicWrite));
    assert_eq!(pair.server.host.bytes(target), pattern(8));
    let inline = Data::Inline(&[&[1, 2, 3], &[4, 5, 6, 7, 8]]);
    pair.client.try_post(2, atomic_write(target), inline, SendFlags::SIGNALED).expect("accepted");
    pair.drive();
    assert_eq!(pair.client.sent(), [(2, OK)]);
    assert_eq!(pair.server.host.bytes(target), [1, 2, 3, 4, 5, 6, 7, 8]);
    let trace = pair.trace.take().expect("traced");
    let opcodes: Vec<_> = trace.iter().map(|(_, opcode, _)| *opcode).collect();
    let round = [Opcode::RC_ATOMIC_WRITE.value(), Opcode::RC_READ_RESPONSE_ONLY.value()];
    assert_eq!(opcodes, [round, round].concat());
}

#[test]
fn send_with_invalidate_invalidates_and_says_so() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 2000);
    let victim = pair.server.host.register(vec![0; 8], Rights::ALL);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post(1, SendOperation::SendWithInvalidate(victim.lkey), &[source]);
    pair.drive();
    let received = pair.server.host.take(CompletionKind::Receive);
    assert_eq!(received[0].immediate, ImmediateOrKey::InvalidatedKey(victim.lkey));
    assert!(pair.server.host.regions.iter().all(|region| region.key != victim.lkey));
}

#[test]
fn inline_data_is_copied_at_the_post() {
    let (mut pair, _, target) = with_buffers(&PairConfig::rc(), 6);
    let mut data = [1, 2, 3, 4, 5, 6];
    let pieces: [&[u8]; 3] = [&data[..1], &[], &data[1..]];
    pair.client.try_post(1, write_to(target), Data::Inline(&pieces), SendFlags::SIGNALED).expect("accepted");
    data.fill(0);
    pair.drive();
    assert_eq!(pair.server.host.bytes(target), [1, 2, 3, 4, 5, 6]);
    let long = [0; 257];
    let too_long = pair.client.try_post(1, write_to(target), Data::Inline(&[&long]), SendFlags::empty());
    assert_eq!(too_long, Err(PostError::InlineTooLong));
    let read = pair.client.try_post(1, read_from(target), Data::Inline(&[&[0; 6]]), SendFlags::empty());
    assert_eq!(read, Err(PostError::InvalidOperation));
}

/// RDMA/rxe: Validate num_sge/cur_sge before indexing wqe->dma.sge[]
#[test]
fn lists_of_elements_are_gathered_and_scattered() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 3000);
    let cut = |sge: Sge, from: u32, length| Sge { addr: sge.addr + u64::from(from), length, ..sge };
    let pieces =
        |sge, a: u32| [cut(sge, 0, a), cut(sge, a, 0), cut(sge, a, 1030), cut(sge, a + 1030, 1970 - a)];
    pair.server.host.post_receive(7, &pieces(target, 999));
    pair.client.post(1, SendOperation::Send, &pieces(source, 3));
    pair.drive();
    assert_eq!(pair.server.host.bytes(target), pattern(3000));
    let back = pair.client.host.register(vec![0; 3000], Rights::ALL);
    pair.client.post(2, read_from(target), &pieces(back, 17));
    pair.drive();
    assert_eq!(pair.client.host.bytes(back), pattern(3000));
    let many = [cut(source, 0, 1); 5];
    let refused = pair.client.try_post(3, SendOperation::Send, Data::Gather(&many), SendFlags::empty());
    assert_eq!(refused, Err(PostError::TooManySges));
}

#[test]
fn unsignalled_requests_complete_in_silence_and_free_their_place() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    for n in 0..100 {
        pair.client.post_with(n, write_to(target), &[source], SendFlags::empty());
        if n % 10 == 9 {
            pair.client.post(1000 + n, write_to(target), &[source]);
            pair.drive();
        }
    }
    let signalled: Vec<_> = (0..10).map(|n| (1009 + 10 * n, OK)).collect();
    assert_eq!(pair.client.sent(), signalled);
    assert_eq!(pair.client.qp.send_queue_len(), 0);
}

#[test]
fn a_full_queue_refuses_and_takes_again() {
    let (mut pair, source, target) = with_buffers(&PairConfig { depth: 5, ..PairConfig::rc() }, 8);
    for n in 0..5 {
        pair.client.post(n, write_to(target), &[source]);
    }
    let post = |pair: &mut Pair| {
        pair.client.try_post(9, write_to(target), Data::Gather(&[source]), SendFlags::SIGNALED)
    };
    assert_eq!(post(&mut pair), Err(PostError::QueueFull));
    pair.drive();
    assert_eq!(post(&mut pair), Ok(()));
}

#[test]
fn only_the_last_packet_of_a_message_is_solicited() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 3000);
    pair.sniff = Some(|_, packet| {
        let ends = packet.bth.opcode() == Opcode::RC_SEND_LAST;
        assert_eq!(packet.bth.solicited(), ends);
    });
    pair.server.host.post_receive(7, &[target]);
    pair.client.post_with(1, SendOperation::Send, &[source], SendFlags::SOLICITED);
    pair.drive();
    assert!(pair.server.host.take(CompletionKind::Receive)[0].solicited);
}

/// The answer leaves first and the acknowledgement with it, or the acknowledgement alone when flushed.
#[test]
fn an_acknowledgement_waits_for_company() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    for id in 0..3 {
        pair.server.host.post_receive(id, &[target]);
        pair.client.post(id, SendOperation::Send, &[source]);
    }
    pair.hold_acks = true;
    pair.drive_for(100_000);
    assert_eq!(pair.server.received().len(), 3);
    assert!(pair.server.qp.ack_pending());
    assert_eq!(pair.client.sent(), []);

    pair.client.host.post_receive(8, &[source]);
    pair.server.post(9, SendOperation::Send, &[target]);
    pair.trace = Some(vec![]);
    pair.flush_acks();
    let expected = [Opcode::RC_SEND_ONLY, Opcode::RC_ACKNOWLEDGE].map(Opcode::value);
    assert_eq!(pair.server_trace(), expected, "one acknowledgement for three messages, behind the answer");
    assert!(!pair.server.qp.ack_pending());
    pair.drive_for(100_000);
    assert_eq!(pair.client.sent(), [0, 1, 2].map(|id| (id, OK)));
}

/// A response acknowledges what came before it, so no acknowledgement is sent beside it.
#[test]
fn a_response_takes_the_acknowledgement_along() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, write_to(target), &[source]);
    pair.client.post(2, read_from(target), &[source]);
    pair.trace = Some(vec![]);
    pair.hold_acks = true;
    pair.drive();
    assert_eq!(pair.server_trace(), [Opcode::RC_READ_RESPONSE_ONLY.value()]);
    assert_eq!(pair.client.sent(), [1, 2].map(|id| (id, OK)));
}

/// An acknowledgement never overtakes READ responses that are due before it.
#[test]
fn acknowledgements_wait_for_earlier_responses() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8192);
    pair.client.post(1, read_from(target), &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.trace = Some(vec![]);
    pair.drive();
    assert_eq!(pair.server_trace().last(), Some(&Opcode::RC_ACKNOWLEDGE.value()));
    assert_eq!(pair.client.host.counter(Counter::ImpliedNak), 0);
    assert_eq!(pair.client.sent(), [1, 2].map(|id| (id, OK)));
}

#[test]
fn a_long_message_is_acknowledged_along_the_way() {
    let config = PairConfig { mtu: PathMtu::Mtu4096, ..PairConfig::rc() };
    let (mut pair, source, target) = with_buffers(&config, 1 << 20);
    pair.client.post(1, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    let acks = pair.client.host.counter(Counter::ReceivedPackets);
    assert!((4..=64).contains(&acks), "{acks} acknowledgements for 256 packets");
}

#[test]
fn the_window_bounds_what_is_in_flight() {
    let config = PairConfig { mtu: PathMtu::Mtu4096, ..PairConfig::rc() };
    let (mut pair, source, target) = with_buffers(&config, 1 << 20);
    pair.client.post(1, write_to(target), &[source]);
    pair.transmit();
    assert_eq!(pair.links[0].sent, 32, "128 KiB at first");
}

#[test]
fn reads_and_atomics_keep_to_the_depth() {
    let attributes = Attributes { max_rd_atomic: 2, ..PairConfig::rc().attributes };
    let (mut pair, source, target) = with_buffers(&PairConfig { attributes, ..PairConfig::rc() }, 64);
    for id in 0..6 {
        pair.client.post(id, if id % 2 == 0 { read_from(target) } else { fetch_add(target, 1) }, &[source]);
    }
    pair.transmit();
    assert_eq!(pair.links[0].sent, 2);
    pair.drive();
    assert_eq!(pair.client.sent().len(), 6);
    assert_eq!(pair.server.host.counter(Counter::ErrorNakSent), 0);
}

#[test]
fn a_fence_waits_for_reads_only() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, read_from(target), &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.client.post_with(3, write_to(target), &[source], SendFlags::SIGNALED | SendFlags::FENCE);
    pair.transmit();
    assert_eq!(pair.links[0].sent, 2);
    pair.drive();
    assert_eq!(pair.client.sent(), [1, 2, 3].map(|id| (id, OK)));
}

#[test]
fn local_operations_happen_in_their_turn() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    let bind =
        BindRequest { window: 5, rkey: 6, lkey: source.lkey, access: 0, addr: source.addr, length: 64 };
    pair.client.post(1, SendOperation::BindWindow(bind), &[]);
    pair.client.post(2, write_to(target), &[source]);
    pair.client.post(3, SendOperation::LocalInvalidate(source.lkey), &[]);
    pair.client.post(4, write_to(target), &[]);
    pair.transmit();
    assert_eq!(pair.client.host.bound, [bind]);
    assert_eq!(pair.links[0].sent, 1, "the invalidation waits for the write");
    pair.drive();
    assert_eq!(pair.client.sent(), [1, 2, 3, 4].map(|id| (id, OK)));
    assert!(pair.client.host.regions.is_empty());
}

#[test]
fn posting_needs_a_state_that_can_send() {
    let mut pair = Pair::rc();
    let attributes = *pair.client.qp.attributes();
    let post = |pair: &mut Pair| {
        pair.client.try_post(1, SendOperation::Send, Data::Gather(&[]), SendFlags::SIGNALED)
    };
    for state in [State::Reset, State::Init, State::Rtr] {
        pair.client.qp.modify(pair.now, &mut pair.client.host, state, &attributes).expect("allowed");
        assert_eq!(post(&mut pair), Err(PostError::InvalidState(state)));
    }
    pair.client.qp.to_error(&mut pair.client.host);
    assert_eq!(post(&mut pair), Ok(()));
    assert_eq!(pair.client.sent(), [(1, Status::WrFlush)]);
}

#[test]
fn transitions_are_those_of_the_specification() {
    use State::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    let way_to = |state| match state {
        Reset => vec![],
        Init => vec![Init],
        Rtr => vec![Init, Rtr],
        Rts => vec![Init, Rtr, Rts],
        Sqd => vec![Init, Rtr, Rts, Sqd],
        Sqe | Err => vec![Err],
    };
    for from in [Reset, Init, Rtr, Rts, Sqd, Err] {
        for to in [Reset, Init, Rtr, Rts, Sqd, Sqe, Err] {
            let mut pair = Pair::rc();
            let attributes = *pair.client.qp.attributes();
            let (qp, host) = (&mut pair.client.qp, &mut pair.client.host);
            qp.modify(pair.now, host, Reset, &attributes).expect("always allowed");
            for state in way_to(from) {
                qp.modify(pair.now, host, state, &attributes).expect("on the way");
            }
            let allowed = matches!(
                (from, to),
                (_, Reset | Err)
                    | (Reset | Init, Init)
                    | (Init, Rtr)
                    | (Rtr | Rts | Sqd, Rts)
                    | (Rts | Sqd, Sqd)
            );
            assert_eq!(qp.modify(pair.now, host, to, &attributes).is_ok(), allowed, "{from:?} to {to:?}");
            assert_eq!(qp.state(), if allowed { to } else { from });
        }
    }
}

/// RDMA/rxe: Fix race in do_task() when draining
#[test]
fn sqd_finishes_what_it_began_and_says_so() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 200_000);
    pair.client.post(1, write_to(target), &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.transmit();
    let attributes = Attributes { sqd_event: true, ..*pair.client.qp.attributes() };
    let sqd = |pair: &mut Pair, to| {
        pair.client.qp.modify(pair.now, &mut pair.client.host, to, &attributes).expect("allowed");
    };
    sqd(&mut pair, State::Sqd);
    assert!(pair.client.qp.sq_draining());
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
    assert_eq!(pair.client.host.events, [Event::SendQueueDrained]);
    assert!(!pair.client.qp.sq_draining());
    pair.client.post(3, write_to(target), &[source]);
    sqd(&mut pair, State::Rts);
    pair.drive();
    assert_eq!(pair.client.sent(), [2, 3].map(|id| (id, OK)));
    sqd(&mut pair, State::Sqd);
    assert_eq!(pair.client.host.events.len(), 2, "an empty queue is drained at once");
}

#[test]
fn the_first_packet_in_rtr_establishes_the_communication() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 8);
    let attributes = *pair.server.qp.attributes();
    for state in [State::Reset, State::Init, State::Rtr] {
        pair.server.qp.modify(pair.now, &mut pair.server.host, state, &attributes).expect("allowed");
    }
    for id in 0..2 {
        pair.client.post(id, write_to(target), &[source]);
    }
    pair.drive();
    assert_eq!(pair.client.sent().len(), 2);
    assert_eq!(pair.server.host.events, [Event::CommunicationEstablished]);
}

/// A packet with another PSN than the agreed one may be anybody's.
#[test]
fn a_packet_out_of_sequence_establishes_nothing() {
    for transport in [Transport::Rc, Transport::Uc] {
        let (mut pair, source, target) = with_buffers(&PairConfig::new(transport), 8);
        let mut attributes = *pair.server.qp.attributes();
        attributes.receive_psn += 1;
        for state in [State::Reset, State::Init, State::Rtr] {
            pair.server.qp.modify(pair.now, &mut pair.server.host, state, &attributes).expect("allowed");
        }
        pair.client.post(1, write_to(target), &[source]);
        pair.transmit();
        pair.step();
        assert_eq!(pair.server.host.events, [], "{transport:?}");
        pair.client.post(2, write_to(target), &[source]);
        pair.drive_for(1_000_000);
        assert_eq!(pair.server.host.events, [Event::CommunicationEstablished], "{transport:?}");
    }
}

#[test]
fn both_directions_at_once() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 50_000);
    for id in 0..8 {
        pair.client.host.post_receive(id, &[source]);
        pair.server.host.post_receive(id, &[target]);
        pair.client.post(id, SendOperation::Send, &[source]);
        pair.server.post(id, SendOperation::Send, &[target]);
    }
    pair.drive();
    for side in [&mut pair.client, &mut pair.server] {
        assert_eq!(side.sent(), (0..8).map(|id| (id, OK)).collect::<Vec<_>>());
        assert_eq!(side.received(), (0..8).map(|id| (id, OK)).collect::<Vec<_>>());
    }
}

#[test]
fn a_short_buffer_sends_nothing_and_breaks_nothing() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.client.post(1, write_to(target), &[source]);
    let mut small = [0; 40];
    let none = pair.client.qp.poll_transmit(pair.now, &mut pair.client.host, Acks::Flush, &mut small);
    assert_eq!(none, None);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
}

#[test]
fn responses_and_requests_take_turns() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 32 * 1024);
    pair.client.post(1, read_from(target), &[source]);
    pair.transmit();
    pair.server.post(2, write_to(source), &[target]);
    pair.now = rdma_soft::proto::Time::from_nanoseconds(6_000);
    let request = pair.links[0].receive(6_000).expect("the request arrived");
    pair.inject(true, &request);
    pair.trace = Some(vec![]);
    pair.transmit();
    let opcodes = pair.server_trace();
    let is_write = |opcode: &u8| (6..=8).contains(opcode);
    assert_eq!(opcodes.len(), 64);
    assert_eq!(opcodes[..32].iter().filter(|opcode| is_write(opcode)).count(), 16);
}

/// The longest message in the smallest packets takes half of all PSNs, and is not taken for acknowledged.
#[test]
fn two_gigabytes_in_small_packets_are_one_message() {
    let config = PairConfig { mtu: PathMtu::Mtu256, ..PairConfig::rc() };
    let (mut pair, source, target) = with_buffers(&config, 1 << 20);
    let huge = Sge { length: 1 << 31, ..source };
    for id in 0..4 {
        pair.client.post(id, write_to(target), &[source]);
    }
    pair.client.post(4, write_to(target), &[huge]);
    pair.client.post(5, write_to(target), &[source]);
    for _ in 0..2000 {
        pair.step();
    }
    // The region ends after a MiB, and the queue pair fails there; before that nothing of it was complete.
    pair.drive();
    let sent = pair.client.sent();
    assert_eq!(sent[..4], [0, 1, 2, 3].map(|id| (id, OK)));
    assert!(sent[4..].iter().all(|(_, status)| *status != OK), "{sent:?}");
    assert_eq!(sent.len(), 6);
}
