//! UC and UD on a simulated link.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

mod sim;

use rdma_soft::proto::{
    Attributes, Completion, CompletionKind, CompletionOpcode, Counter, Data, Destination, ImmediateOrKey,
    PacketMeta, PathMtu, PostError, SendFlags, SendOperation, SendRequest, Sge, State, Status,
};
use rdma_soft::wire::{BthRepr, DethRepr, Opcode, Packet, PacketRepr, Psn, Transport};
use sim::{LinkConfig, Pair, PairConfig, fetch_add, pattern, read_from, with_buffers, write_to};

const OK: Status = Status::Success;

fn uc() -> PairConfig {
    PairConfig::new(Transport::Uc)
}

fn ud() -> PairConfig {
    PairConfig::new(Transport::Ud)
}

#[test]
fn uc_messages_arrive() {
    for len in [0, 1, 1024, 5000] {
        let (mut pair, source, target) = with_buffers(&uc(), len);
        pair.server.host.post_receive(7, &[target]);
        pair.client.post(1, SendOperation::SendWithImmediate([1, 2, 3, 4]), &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)]);
        let received = pair.server.host.take(CompletionKind::Receive);
        assert_eq!((received[0].wr_id, received[0].byte_len), (7, len as u32));
        assert_eq!(received[0].immediate, ImmediateOrKey::Immediate([1, 2, 3, 4]));
        assert_eq!(pair.server.host.bytes(target), pattern(len));
        assert_eq!(pair.links[1].sent, 0, "nothing is acknowledged");
    }
}

#[test]
fn uc_writes_arrive() {
    let (mut pair, source, target) = with_buffers(&uc(), 5000);
    pair.server.host.post_receive(7, &[]);
    let (va, rkey) = (target.addr, target.lkey);
    pair.client.post(1, SendOperation::WriteWithImmediate { va, rkey, immediate: [5; 4] }, &[source]);
    pair.drive();
    let received = pair.server.host.take(CompletionKind::Receive);
    assert_eq!(received[0].opcode, CompletionOpcode::ReceiveWriteWithImmediate);
    assert_eq!(received[0].byte_len, 5000);
    assert_eq!(pair.server.host.bytes(target), pattern(5000));
}

#[test]
fn uc_drops_a_broken_message_in_silence_and_reuses_its_receive() {
    for lost in 0..5 {
        let (mut pair, source, target) = with_buffers(&uc(), 5000);
        pair.server.host.post_receive(7, &[target]);
        pair.links[0].lose = vec![lost];
        pair.client.post(1, SendOperation::Send, &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK)], "sent is done");
        assert_eq!(pair.server.received(), []);
        pair.client.post(2, SendOperation::Send, &[source]);
        pair.drive();
        assert_eq!(pair.server.received(), [(7, OK)]);
        assert_eq!(pair.server.host.bytes(target), pattern(5000));
        assert_eq!(pair.links[1].sent, 0);
        assert!(pair.server.host.counter(Counter::DropBrokenMessage) > 0, "packet {lost} lost");
    }
}

#[test]
fn uc_without_a_receive_drops_and_goes_on() {
    let (mut pair, source, target) = with_buffers(&uc(), 3000);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.server.host.counter(Counter::DropNoReceive), 1);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post(2, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.server.received(), [(7, OK)]);
}

#[test]
fn uc_refuses_wrong_keys_without_a_word() {
    let (mut pair, source, target) = with_buffers(&uc(), 3000);
    pair.client.post(1, write_to(Sge { lkey: 0xdead, ..target }), &[source]);
    pair.client.post(2, write_to(target), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK), (2, OK)]);
    assert_eq!(pair.server.host.counter(Counter::DropAccess), 1);
    assert_eq!(pair.server.qp.state(), State::Rts);
    assert_eq!(pair.server.host.bytes(target), pattern(3000));
}

#[test]
fn uc_delivers_whole_messages_only_under_loss() {
    let link = LinkConfig { loss: 0.1, duplicate: 0.05, reorder: 0.05, ..LinkConfig::default() };
    for seed in 0..20 {
        let (mut pair, source, target) = with_buffers(&PairConfig { link, seed, ..uc() }, 4000);
        for id in 0..16 {
            pair.server.host.post_receive(id, &[target]);
            pair.client.post(id, SendOperation::SendWithImmediate([id as u8; 4]), &[source]);
        }
        pair.drive();
        for completion in pair.server.host.take(CompletionKind::Receive) {
            assert_eq!((completion.status, completion.byte_len), (OK, 4000));
        }
    }
}

#[test]
fn operations_that_a_transport_lacks_are_refused() {
    let post = |config: &PairConfig, operation: fn(Sge) -> SendOperation| {
        let (mut pair, source, target) = with_buffers(config, 8);
        pair.client.try_post(1, operation(target), Data::Gather(&[source]), SendFlags::empty())
    };
    let lacking: [fn(Sge) -> SendOperation; 3] =
        [read_from, |target| fetch_add(target, 1), |_| SendOperation::SendWithInvalidate(1)];
    for operation in lacking {
        assert_eq!(post(&uc(), operation), Err(PostError::InvalidOperation));
        assert_eq!(post(&ud(), operation), Err(PostError::InvalidOperation));
    }
    assert_eq!(post(&ud(), write_to), Err(PostError::InvalidOperation));
}

#[test]
fn ud_delivers_behind_the_global_route_header() {
    let (mut pair, source, _) = with_buffers(&ud(), 100);
    let target = pair.server.host.register(vec![0xff; 140], sim::Rights::ALL);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post_with(
        1,
        SendOperation::SendWithImmediate([4, 3, 2, 1]),
        &[source],
        SendFlags::SIGNALED | SendFlags::SOLICITED,
    );
    pair.transmit();
    let bytes = pair.links[0].receive(1_000_000).expect("sent");
    let grh: [u8; 40] = std::array::from_fn(|n| n as u8);
    let packet = Packet::parse(&bytes).expect("parses");
    let meta = PacketMeta { grh: Some(&grh) };
    pair.server.qp.handle_packet(pair.now, &mut pair.server.host, &packet, &meta);
    let expected = Completion {
        kind: CompletionKind::Receive,
        wr_id: 7,
        status: OK,
        opcode: CompletionOpcode::Receive,
        byte_len: 140,
        immediate: ImmediateOrKey::Immediate([4, 3, 2, 1]),
        src_qp: 17,
        grh: true,
        solicited: true,
    };
    assert_eq!(pair.server.host.take(CompletionKind::Receive), [expected]);
    assert_eq!(pair.server.host.bytes(target)[..40], grh);
    assert_eq!(pair.server.host.bytes(target)[40..], pattern(100));
    assert_eq!(pair.client.sent(), [(1, OK)]);
}

#[test]
fn ud_sends_the_key_of_the_request_or_its_own() {
    for (qkey, delivered) in [(0x1111_1111, true), (0x2222_2222, false), (0x8000_0000, true)] {
        let (mut pair, source, _) = with_buffers(&ud(), 10);
        let target = pair.server.host.register(vec![0; 50], sim::Rights::ALL);
        pair.server.host.post_receive(7, &[target]);
        let destination = Destination { qp_num: 18, qkey, tag: 77, ..Destination::default() };
        let request = SendRequest {
            wr_id: 1,
            operation: SendOperation::Send,
            flags: SendFlags::SIGNALED,
            data: Data::Gather(&[source]),
            destination: Some(&destination),
        };
        pair.client.qp.post_send(pair.now, &mut pair.client.host, &request).expect("accepted");
        pair.drive();
        assert_eq!(pair.server.received().len(), usize::from(delivered));
        assert_eq!(pair.server.host.counter(Counter::DropQkey), u64::from(!delivered));
        let without = SendRequest { destination: None, ..request };
        let refused = pair.client.qp.post_send(pair.now, &mut pair.client.host, &without);
        assert_eq!(refused, Err(PostError::NoDestination));
    }
}

#[test]
fn ud_drops_what_does_not_fit_and_keeps_the_receive() {
    let (mut pair, source, _) = with_buffers(&ud(), 100);
    let target = pair.server.host.register(vec![0; 139], sim::Rights::ALL);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.server.host.counter(Counter::DropNoReceive), 1);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post(2, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.server.host.counter(Counter::DropLength), 1);
    pair.client.post(3, SendOperation::Send, &[Sge { length: 99, ..source }]);
    pair.drive();
    assert_eq!(pair.server.received(), [(7, OK)]);
}

/// SQE: the failing request completes in error, what follows is flushed, and RTS is reached again.
#[test]
fn ud_goes_to_sqe_at_a_local_error_and_comes_back() {
    for (bad, status) in [(1025, Status::LocalLength), (10, Status::LocalProtection)] {
        let (mut pair, source, _) = with_buffers(&PairConfig { mtu: PathMtu::Mtu1024, ..ud() }, 2000);
        let lkey = if status == Status::LocalProtection { 1 } else { source.lkey };
        pair.client.post(1, SendOperation::Send, &[Sge { length: 5, ..source }]);
        pair.client.post(2, SendOperation::Send, &[Sge { length: bad, lkey, ..source }]);
        pair.client.post(3, SendOperation::Send, &[Sge { length: 5, ..source }]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, OK), (2, status), (3, Status::WrFlush)]);
        assert_eq!(pair.client.qp.state(), State::Sqe);
        pair.client.post(4, SendOperation::Send, &[]);
        assert_eq!(pair.client.sent(), [(4, Status::WrFlush)]);
        // Receiving goes on.
        let target = pair.client.host.register(vec![0; 50], sim::Rights::ALL);
        pair.client.host.post_receive(8, &[target]);
        pair.server.post(9, SendOperation::Send, &[]);
        pair.drive();
        assert_eq!(pair.client.received(), [(8, OK)]);
        let attributes = *pair.client.qp.attributes();
        pair.client.qp.modify(pair.now, &mut pair.client.host, State::Rts, &attributes).expect("SQE to RTS");
        pair.client.post(5, SendOperation::Send, &[]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(5, OK)]);
    }
}

#[test]
fn partitions_must_match_and_one_side_be_a_full_member() {
    let deliver = |theirs: u16, ours: u16| {
        let attributes = Attributes { pkey: ours, ..ud().attributes };
        let mut pair = Pair::new(&PairConfig { attributes, ..ud() });
        let target = pair.server.host.register(vec![0; 40], sim::Rights::ALL);
        pair.server.host.post_receive(7, &[target]);
        let bth = BthRepr { pkey: theirs, ..BthRepr::new(Opcode::UD_SEND_ONLY, 18, Psn::new(0)) };
        let deth = DethRepr { qkey: 0x1111_1111, src_qp: 1 };
        let mut bytes = vec![0; 24];
        PacketRepr { deth: Some(deth), ..PacketRepr::new(bth, &[]) }.emit(&mut bytes).expect("room");
        pair.inject(true, &bytes);
        (pair.server.received().len(), pair.server.host.counter(Counter::DropPkey))
    };
    assert_eq!(deliver(0xffff, 0xffff), (1, 0));
    assert_eq!(deliver(0x7fff, 0xffff), (1, 0));
    assert_eq!(deliver(0x7fff, 0x7fff), (0, 1), "two limited members");
    assert_eq!(deliver(0x8001, 0xffff), (0, 1));
}
