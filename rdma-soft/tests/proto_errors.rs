//! Each thing that can be wrong with a request, and the completions that say so on both sides.

mod sim;

use rdma_soft::proto::{
    Acks, Attributes, BindRequest, Event, MAX_PACKET_LEN, PathMtu, QpAccess, SendFlags, SendOperation, Sge,
    State, Status,
};
use sim::{
    Pair, PairConfig, Rights, atomic_write, compare_swap, fetch_add, read_from, with_buffers, write_to,
};

const OK: Status = Status::Success;

/// Posts a good request, the one in question and another, and returns the statuses at the requester.
fn statuses(pair: &mut Pair, good: (SendOperation, Sge), bad: (SendOperation, Sge)) -> Vec<Status> {
    for (id, (operation, sge)) in [(1, good), (2, bad), (3, good)] {
        pair.client.post_with(id, operation, &[sge], SendFlags::SIGNALED);
    }
    pair.drive();
    let sent = pair.client.sent();
    assert_eq!(sent.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3], "in order");
    sent.into_iter().map(|(_, status)| status).collect()
}

/// What the peer refuses: the request fails as told, both sides go to ERR, the responder raises `event`.
fn refused(change: impl FnOnce(&mut Pair, Sge) -> (SendOperation, Sge), status: Status, event: Event) {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 4096);
    pair.server.host.post_receive(50, &[]);
    let bad = change(&mut pair, target);
    let got = statuses(&mut pair, (write_to(target), source), bad);
    assert_eq!(got, [OK, status, Status::WrFlush]);
    assert_eq!(pair.client.qp.state(), State::Err);
    assert_eq!(pair.server.qp.state(), State::Err);
    assert_eq!(pair.server.host.events, [event]);
    assert_eq!(pair.server.host.flushed, 1);
}

fn source_of(pair: &Pair) -> Sge {
    let region = &pair.client.host.regions[0];
    Sge { addr: region.addr, length: 4096, lkey: region.key }
}

fn word_of(pair: &Pair) -> Sge {
    Sge { length: 8, ..source_of(pair) }
}

#[test]
fn a_wrong_remote_key_is_an_access_error() {
    let wrong = |target: Sge| Sge { lkey: 0xdead, ..target };
    refused(
        |pair, target| (write_to(wrong(target)), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    refused(
        |pair, target| (read_from(wrong(target)), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    refused(
        |pair, target| (fetch_add(wrong(target), 1), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    refused(
        |pair, target| (atomic_write(wrong(target)), word_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
}

/// RDMA/rxe: Fix integer overflow in mr_check_range() leading to OOB access
#[test]
fn a_range_that_leaves_the_region_is_an_access_error() {
    for addr in [1, u64::MAX - 10, 0u64.wrapping_sub(4096)] {
        let beyond = move |target: Sge| Sge { addr: target.addr.wrapping_add(addr), ..target };
        refused(
            |pair, target| (write_to(beyond(target)), source_of(pair)),
            Status::RemoteAccess,
            Event::AccessError,
        );
        refused(
            |pair, target| (read_from(beyond(target)), source_of(pair)),
            Status::RemoteAccess,
            Event::AccessError,
        );
    }
}

#[test]
fn a_right_that_the_region_lacks_is_an_access_error() {
    let restricted = |pair: &mut Pair| {
        pair.server.host.register(vec![0; 4096], Rights { local_write: true, ..Rights::default() })
    };
    refused(
        |pair, _| (write_to(restricted(pair)), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    refused(
        |pair, _| (read_from(restricted(pair)), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    refused(
        |pair, _| (compare_swap(restricted(pair), 0, 0), source_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
    let no_write = |pair: &mut Pair| {
        pair.server.host.register(vec![0; 4096], Rights { remote_write: false, ..Rights::ALL })
    };
    refused(
        |pair, _| (atomic_write(no_write(pair)), word_of(pair)),
        Status::RemoteAccess,
        Event::AccessError,
    );
}

#[test]
fn an_operation_that_the_queue_pair_does_not_allow_is_invalid() {
    for (operation, missing) in [
        (read_from as fn(Sge) -> SendOperation, QpAccess::REMOTE_READ),
        (|target| fetch_add(target, 1), QpAccess::REMOTE_ATOMIC),
    ] {
        refused(
            |pair, target| {
                let access = QpAccess::all() - missing;
                let attributes = Attributes { access, ..*pair.server.qp.attributes() };
                let (qp, host) = (&mut pair.server.qp, &mut pair.server.host);
                qp.modify(pair.now, host, State::Rts, &attributes).expect("RTS to RTS");
                (operation(target), source_of(pair))
            },
            Status::RemoteInvalidRequest,
            Event::RequestError,
        );
    }
}

#[test]
fn a_write_that_the_queue_pair_does_not_allow_is_invalid() {
    for operation in [write_to as fn(Sge) -> SendOperation, atomic_write] {
        let attributes =
            Attributes { access: QpAccess::all() - QpAccess::REMOTE_WRITE, ..PairConfig::rc().attributes };
        let (mut pair, source, target) = with_buffers(&PairConfig { attributes, ..PairConfig::rc() }, 8);
        let got = statuses(&mut pair, (read_from(target), source), (operation(target), source));
        assert_eq!(got, [OK, Status::RemoteInvalidRequest, Status::WrFlush]);
        assert_eq!(pair.server.host.events.last(), Some(&Event::RequestError));
        assert_eq!(pair.server.host.bytes(target), [0; 8]);
    }
}

#[test]
fn an_unaligned_atomic_is_invalid() {
    let unaligned = |target: Sge| Sge { addr: target.addr + 4, ..target };
    refused(
        |pair, target| (fetch_add(unaligned(target), 1), source_of(pair)),
        Status::RemoteInvalidRequest,
        Event::AccessError,
    );
    refused(
        |pair, target| (atomic_write(unaligned(target)), word_of(pair)),
        Status::RemoteInvalidRequest,
        Event::AccessError,
    );
}

#[test]
fn more_reads_than_the_responder_takes_are_invalid() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 4096);
    let attributes = Attributes { max_dest_rd_atomic: 0, ..*pair.server.qp.attributes() };
    let (qp, host) = (&mut pair.server.qp, &mut pair.server.host);
    qp.modify(pair.now, host, State::Rts, &attributes).expect("RTS to RTS");
    let got = statuses(&mut pair, (write_to(target), source), (read_from(target), source));
    assert_eq!(got, [OK, Status::RemoteInvalidRequest, Status::WrFlush]);
}

#[test]
fn a_read_without_depth_is_a_local_error() {
    let attributes = Attributes { max_rd_atomic: 0, ..PairConfig::rc().attributes };
    let (mut pair, source, target) = with_buffers(&PairConfig { attributes, ..PairConfig::rc() }, 64);
    let got = statuses(&mut pair, (write_to(target), source), (read_from(target), source));
    assert_eq!(got, [OK, Status::LocalQpOperation, Status::WrFlush]);
}

#[test]
fn a_message_longer_than_its_receive_fails_on_both_sides() {
    for len in [100, 5000] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), len);
        let short = Sge { length: target.length - 1, ..target };
        pair.server.host.post_receive(7, &[short]);
        pair.server.host.post_receive(8, &[target]);
        pair.client.post(1, SendOperation::Send, &[source]);
        pair.drive();
        assert_eq!(pair.client.sent(), [(1, Status::RemoteInvalidRequest)]);
        assert_eq!(pair.server.received(), [(7, Status::LocalLength), (8, Status::WrFlush)]);
        assert_eq!(pair.server.host.events, [], "the completion tells");
    }
}

#[test]
fn a_receive_that_names_foreign_memory_is_an_operation_error() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 100);
    pair.server.host.post_receive(7, &[Sge { lkey: 1, ..target }]);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::RemoteOperation)]);
    assert_eq!(pair.server.received(), [(7, Status::LocalProtection)]);
    assert_eq!(pair.server.host.events, [], "the completion tells");
}

#[test]
fn a_wrong_local_key_is_a_protection_error_in_its_turn() {
    for operation in [write_to as fn(Sge) -> SendOperation, read_from] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 3000);
        let wrong = Sge { lkey: 1, ..source };
        let got = statuses(&mut pair, (write_to(target), source), (operation(target), wrong));
        assert_eq!(got, [OK, Status::LocalProtection, Status::WrFlush]);
        assert_eq!(pair.client.qp.state(), State::Err);
    }
}

#[test]
fn a_read_into_memory_without_local_write_is_a_protection_error() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    let constant = pair.client.host.register(vec![5; 64], Rights::default());
    let got = statuses(&mut pair, (write_to(target), source), (read_from(target), constant));
    assert_eq!(got, [OK, Status::LocalProtection, Status::WrFlush]);
    assert_eq!(pair.client.host.bytes(constant), [5; 64]);
}

/// RDMA/rxe: Fix mismatched max_msg_sz
#[test]
fn a_message_beyond_two_gigabytes_is_a_length_error() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    let huge = Sge { length: (1 << 31) + 1, ..source };
    let got = statuses(&mut pair, (write_to(target), source), (write_to(target), huge));
    assert_eq!(got, [OK, Status::LocalLength, Status::WrFlush]);
}

#[test]
fn an_atomic_write_of_other_than_eight_bytes_is_a_length_error() {
    for length in [0, 7, 9, 16, (1 << 31) + 1] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
        let wrong = Sge { length, ..source };
        let got = statuses(&mut pair, (read_from(target), source), (atomic_write(target), wrong));
        assert_eq!(got, [OK, Status::LocalLength, Status::WrFlush], "{length}");
    }
}

#[test]
fn an_atomic_without_room_for_its_answer_is_a_length_error() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    let short = Sge { length: 7, ..source };
    let got = statuses(&mut pair, (write_to(target), source), (fetch_add(target, 1), short));
    assert_eq!(got, [OK, Status::LocalLength, Status::WrFlush]);
}

#[test]
fn a_failed_bind_or_invalidation_is_a_bind_error() {
    let bind = BindRequest { window: u32::MAX, rkey: 0, lkey: 0, access: 0, addr: 0, length: 0 };
    for operation in [SendOperation::BindWindow(bind), SendOperation::LocalInvalidate(0xdead)] {
        let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
        let got = statuses(&mut pair, (write_to(target), source), (operation, source));
        assert_eq!(got, [OK, Status::MwBind, Status::WrFlush]);
    }
}

#[test]
fn an_invalidation_that_the_peer_cannot_do_is_invalid() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post(1, SendOperation::SendWithInvalidate(0xdead), &[source]);
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::RemoteInvalidRequest)]);
    assert_eq!(pair.server.received(), [(7, Status::RemoteInvalidRequest)]);
}

/// RDMA/rxe: Delete error messages triggered by incoming Read requests
#[test]
fn memory_that_goes_away_during_a_read_ends_it_with_an_access_error() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 60_000);
    pair.client.post(1, read_from(target), &[source]);
    pair.transmit();
    pair.now = rdma_soft::proto::Time::from_nanoseconds(6_000);
    let request = pair.links[0].receive(6_000).expect("the request arrived");
    pair.inject(true, &request);
    pair.server.host.regions.clear();
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, Status::RemoteAccess)]);
    assert_eq!(pair.server.qp.state(), State::Err);
}

/// RDMA/rxe: Allow good work requests to be executed
#[test]
fn requests_before_a_failing_one_are_executed() {
    let (mut pair, source, target) =
        with_buffers(&PairConfig { mtu: PathMtu::Mtu256, ..PairConfig::rc() }, 20_000);
    let got = statuses(&mut pair, (write_to(target), source), (write_to(target), Sge { lkey: 1, ..source }));
    assert_eq!(got, [OK, Status::LocalProtection, Status::WrFlush]);
    assert_eq!(pair.server.host.bytes(target), sim::pattern(20_000));
}

#[test]
fn to_error_flushes_everything_in_order() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    for id in 0..4 {
        pair.client.post_with(id, write_to(target), &[source], SendFlags::empty());
        pair.client.host.post_receive(id, &[]);
    }
    pair.transmit();
    pair.client.qp.to_error(&mut pair.client.host);
    let flushed: Vec<_> = (0..4).map(|id| (id, Status::WrFlush)).collect();
    assert_eq!(pair.client.sent(), flushed);
    assert_eq!(pair.client.received(), flushed);
    pair.client.qp.to_error(&mut pair.client.host);
    assert_eq!(pair.client.host.flushed, 1);
    pair.drive();
    assert_eq!(pair.client.sent(), []);
}

/// A message that was delivered is acknowledged even if its receiver fails before it says so.
#[test]
fn a_held_acknowledgement_survives_the_error_state() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 64);
    pair.server.host.post_receive(7, &[target]);
    pair.client.post(1, SendOperation::Send, &[source]);
    pair.hold_acks = true;
    pair.drive_for(100_000);
    assert_eq!(pair.server.received(), [(7, OK)]);
    pair.server.qp.to_error(&mut pair.server.host);
    pair.hold_acks = false;
    pair.drive();
    assert_eq!(pair.client.sent(), [(1, OK)]);
}

/// The program was told that the queue pair failed, and withdraws its memory: what the peer had asked for is neither
/// read nor an error any more.
#[test]
fn a_failed_queue_pair_answers_no_reads() {
    let (mut pair, source, target) = with_buffers(&PairConfig::rc(), 60_000);
    pair.client.post(1, read_from(target), &[source]);
    pair.transmit();
    let request = pair.links[0].receive(u64::MAX).expect("sent");
    pair.inject(true, &request);
    pair.server.post(9, write_to(target), &[Sge { lkey: 1, ..target }]);
    let mut buffer = vec![0; MAX_PACKET_LEN];
    let mut responses = 0;
    let side = &mut pair.server;
    while side.qp.poll_transmit(pair.now, &mut side.host, Acks::Flush, &mut buffer).is_some() {
        responses += 1;
        if side.qp.state() == State::Err {
            side.host.regions.clear();
        }
    }
    assert!(responses <= 2, "{responses} of 59 responses");
    assert_eq!(side.sent(), [(9, Status::LocalProtection)]);
    assert_eq!(side.host.events, []);
}
