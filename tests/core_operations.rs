//! Every operation of `rdma-core`, on the device under test.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests fail by panicking")]

mod support;

use std::time::Instant;

use rdma_core::qp::transport::{Connected, Rc, RdmaWrite};
use rdma_core::{
    Completions, Opcode, Payload, PostErrorKind, RecvRequest, RemoteAccess, RemoteSlice, Status, WorkRequest,
};
use support::{Difference, LIMIT, Pair, QKEY, collect, differs, rc, uc, ud};

fn exchange<T: Connected>(pair: &Pair<T>) {
    pair.b.qp.post_recv(RecvRequest::new(pair.empty(64)).id(1)).unwrap();
    pair.b.qp.post_recv(RecvRequest::new(pair.empty(64)).id(2)).unwrap();
    pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"hello")).id(3)).unwrap();
    pair.a.qp.post_send(WorkRequest::send_with_imm(pair.buffer(b"again"), 77).id(4).solicited()).unwrap();
    let received = collect(&pair.b.cq, 2);
    assert_eq!(received[0].id, 1);
    assert_eq!(received[0].result, Ok((5, None)));
    assert_eq!(&received[0].buffers[0][..], b"hello");
    assert_eq!(received[1].result, Ok((5, Some(77))));
    assert_eq!(&received[1].buffers[0][..], b"again");
    let sent = collect(&pair.a.cq, 2);
    assert_eq!((sent[0].id, sent[1].id), (3, 4));
    assert_eq!(&sent[0].buffers[0][..], b"hello");
}

#[test]
fn rc_send_and_receive() {
    exchange(&rc());
}

#[test]
fn uc_send_and_receive() {
    exchange(&uc());
}

fn write<T: RdmaWrite + Connected>(pair: &Pair<T>) {
    let target = pair.pd.share(vec![0; 100], RemoteAccess::WRITE).unwrap();
    let remote = target.remote();
    let part = remote.slice(3, 20).unwrap();
    pair.a.qp.post_send(WorkRequest::write(pair.buffer(b"0123456789"), part)).unwrap();
    pair.b.qp.post_recv(pair.empty(8)).unwrap();
    let request = WorkRequest::write_with_imm(pair.buffer(b"abc"), remote.slice(50, 3).unwrap(), 0xdead_beef);
    pair.a.qp.post_send(request).unwrap();
    let received = collect(&pair.b.cq, 1);
    assert_eq!(received[0].result, Ok((3, Some(0xdead_beef))));
    let mut bytes = [0; 100];
    target.copy_out(0, &mut bytes).unwrap();
    assert_eq!(&bytes[3..13], b"0123456789");
    assert_eq!(&bytes[50..53], b"abc");
    assert_eq!(bytes[13], 0);
    assert!(collect(&pair.a.cq, 2).iter().all(|done| done.result.is_ok()));
}

#[test]
fn rc_write() {
    write(&rc());
}

#[test]
fn uc_write() {
    write(&uc());
}

#[test]
fn read_and_atomics() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
    shared.copy_in(8, b"read me!").unwrap();
    shared.store(16, 40).unwrap();
    let at = |offset, len| shared.remote().slice(offset, len).unwrap();

    let read = pair.a.qp.start_send(WorkRequest::read(pair.empty(8), at(8, 8))).unwrap();
    let read = read.wait(LIMIT).unwrap();
    assert!(read.result().is_ok());
    assert_eq!(read.completion().opcode(), Opcode::Read);
    assert_eq!(&read.into_buffer().unwrap()[..], b"read me!");

    let value = |finished: rdma_core::inflight::Finished| {
        assert!(finished.result().is_ok(), "{:?}", finished.result());
        u64::from_ne_bytes(finished.into_buffer().unwrap()[..].try_into().unwrap())
    };
    let add = WorkRequest::fetch_and_add(pair.empty(8), at(16, 8), 2);
    assert_eq!(value(pair.a.qp.start_send(add).unwrap().wait(LIMIT).unwrap()), 40);
    let swap = WorkRequest::compare_and_swap(pair.empty(8), at(16, 8), 42, 7).fence();
    assert_eq!(value(pair.a.qp.start_send(swap).unwrap().wait(LIMIT).unwrap()), 42);
    assert_eq!(shared.load(16).unwrap(), 7);

    // What cannot be is refused here, and the request comes back.
    let request = WorkRequest::fetch_and_add(pair.empty(8), at(17, 8), 2);
    let refused = pair.a.qp.post_send(request).unwrap_err();
    assert_eq!(refused.kind, PostErrorKind::BadAtomic);
    assert_eq!(refused.request.into_payload().into_buffers().count(), 1);
    let request = WorkRequest::read(pair.empty(9), at(8, 8));
    let refused = pair.a.qp.post_send(request).unwrap_err();
    assert_eq!(refused.kind, PostErrorKind::OutOfBounds { asked: 9, limit: 8 });
}

#[test]
fn scatter_gather_and_inline() {
    let pair = rc();
    pair.b.qp.post_recv(RecvRequest::new([pair.empty(4), pair.empty(4), pair.empty(64)])).unwrap();
    let parts = [pair.buffer(b"abc"), pair.buffer(b"defgh"), pair.buffer(b"i")];
    pair.a.qp.post_send(WorkRequest::send(parts)).unwrap();
    let received = collect(&pair.b.cq, 1);
    let bytes: Vec<&[u8]> = received[0].buffers.iter().map(|b| &b[..]).collect();
    assert_eq!(bytes, [&b"abcd"[..], b"efgh", b"i"]);
    assert_eq!(collect(&pair.a.cq, 1)[0].buffers.len(), 3);

    pair.b.qp.post_recv(pair.empty(64)).unwrap();
    let text = String::from("inline");
    pair.a.qp.post_send(WorkRequest::send(Payload::inline(text.as_bytes()))).unwrap();
    drop(text);
    assert_eq!(&collect(&pair.b.cq, 1)[0].buffers[0][..], b"inline");
    assert!(collect(&pair.a.cq, 1)[0].buffers.is_empty());

    let parts: Vec<_> = (0..4).map(|_| pair.empty(1)).collect();
    let refused = pair.a.qp.post_send(WorkRequest::send(parts)).unwrap_err();
    assert_eq!(refused.kind, PostErrorKind::TooManySegments { asked: 4, limit: 3 });
    assert_eq!(refused.request.into_payload().into_buffers().count(), 4);
}

#[test]
fn buffers_of_a_receive_taken_one_by_one_show_what_each_received() {
    let pair = rc();
    pair.b.qp.post_recv(RecvRequest::new([pair.empty(4), pair.empty(4), pair.empty(64)])).unwrap();
    pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"abcdefghi"))).unwrap();
    let mut completions = Completions::new();
    let deadline = Instant::now() + LIMIT;
    let mut received = Vec::new();
    while received.is_empty() {
        assert!(Instant::now() < deadline, "nothing arrives");
        for mut completion in pair.b.cq.poll(&mut completions).unwrap() {
            received.extend(completion.take_buffer());
            received.extend(completion.take_buffers());
        }
    }
    let bytes: Vec<&[u8]> = received.iter().map(|b| &b[..]).collect();
    assert_eq!(bytes, [&b"abcd"[..], b"efgh", b"i"]);
    collect(&pair.a.cq, 1);
}

#[test]
fn unsignaled_sends_come_back_with_the_next_signaled_one() {
    let pair = rc();
    for round in 0..20 {
        for _ in 0..4 {
            pair.b.qp.post_recv(pair.empty(8)).unwrap();
        }
        for id in 0..3 {
            pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"quiet")).id(id).unsignaled()).unwrap();
        }
        pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"loud")).id(3)).unwrap();
        let ids: Vec<u64> = collect(&pair.a.cq, 4).iter().map(|done| done.id).collect();
        assert_eq!(ids, [0, 1, 2, 3], "round {round}");
        assert_eq!(collect(&pair.b.cq, 4).len(), 4);
    }
    assert_eq!(pair.a.cq.credits_in_use(), 0);
    assert_eq!(pair.a.cq.stray_completions() + pair.b.cq.stray_completions(), 0);
}

#[test]
fn only_unsignaled_sends_do_not_block_the_queue() {
    let pair = rc();
    let mut completions = rdma_core::Completions::new();
    let start = std::time::Instant::now();
    let (mut sent, mut back) = (0, 0);
    while sent < 100 {
        assert!(start.elapsed() < LIMIT, "{sent} sent, {back} back");
        match pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"quiet")).unsignaled()) {
            Ok(()) => {
                sent += 1;
                pair.b.qp.post_recv(pair.empty(8)).unwrap();
                collect(&pair.b.cq, 1);
            }
            Err(error) => assert_eq!(error.kind, PostErrorKind::QueueFull),
        }
        back += pair.a.cq.poll(&mut completions).unwrap().len();
    }
    assert!(back >= 84, "{back} of {sent} came back");
}

#[test]
fn batches() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
    assert_eq!(pair.a.qp.post_batch(&mut Vec::new()), Ok(0));
    pair.b.qp.post_recv(pair.empty(8)).unwrap();
    let mut batch: Vec<WorkRequest<'_, Rc>> = vec![
        WorkRequest::write(pair.buffer(b"one"), shared.remote()).id(1).unsignaled(),
        WorkRequest::send(pair.buffer(b"two")).id(2).unsignaled(),
        WorkRequest::read(pair.empty(3), shared.remote().slice(0, 3).unwrap()).id(3),
    ];
    assert_eq!(pair.a.qp.post_batch(&mut batch), Ok(3));
    assert!(batch.is_empty());
    let done = collect(&pair.a.cq, 3);
    assert_eq!(done.iter().map(|d| d.id).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(&done[2].buffers[0][..], b"one");
    assert_eq!(&collect(&pair.b.cq, 1)[0].buffers[0][..], b"two");

    // More than fits: the rest stays.
    let mut batch: Vec<_> =
        (0..20).map(|id| WorkRequest::write(pair.buffer(b"x"), shared.remote()).id(id)).collect();
    assert_eq!(pair.a.qp.post_batch(&mut batch), Err(PostErrorKind::QueueFull));
    assert_eq!(batch.len(), 4);
    assert_eq!(collect(&pair.a.cq, 16).len(), 16);

    // One that cannot be: those before it are posted.
    let mut batch = vec![
        WorkRequest::write(pair.buffer(b"x"), shared.remote()),
        WorkRequest::write(pair.buffer(b"x"), shared.remote().slice(0, 0).unwrap()),
        WorkRequest::write(pair.buffer(b"x"), shared.remote()),
    ];
    assert_eq!(pair.a.qp.post_batch(&mut batch), Err(PostErrorKind::OutOfBounds { asked: 1, limit: 0 }));
    assert_eq!(batch.len(), 2);
    assert!(collect(&pair.a.cq, 1)[0].result.is_ok());
    let mut operations = Vec::new();
    drop(batch.remove(0));
    assert_eq!(pair.a.qp.start_batch(&mut batch, &mut operations), Ok(1));
    assert!(operations.pop().unwrap().wait(LIMIT).unwrap().result().is_ok());
}

/// One that fails in a run of unsignalled sends completes by itself: those before it have succeeded, those behind it are flushed.
#[test]
fn an_unsignaled_send_that_fails() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
    let beyond = RemoteSlice { addr: shared.remote().addr + 4096, ..shared.remote() };
    let mut batch: Vec<WorkRequest<'_, Rc>> = (0..6)
        .map(|id| {
            let remote = if id == 3 { beyond } else { shared.remote() };
            // Of both kinds that are kept in different ways: one buffer, or a list.
            let request = match id % 2 {
                0 => WorkRequest::write([pair.buffer(b"a"), pair.buffer(b"b")], remote),
                _ => WorkRequest::write(pair.buffer(b"c"), remote),
            };
            request.id(id).unsignaled()
        })
        .collect();
    assert_eq!(pair.a.qp.post_batch(&mut batch), Ok(6));
    // Behind it nothing is signalled: only by the error do those before it end.
    let done = collect(&pair.a.cq, 6);
    for (id, done) in (0..).zip(&done) {
        assert_eq!((done.id, done.buffers.len()), (id, 2 - id as usize % 2));
        match &done.result {
            Ok(_) => assert!(id < 3, "{id} succeeded"),
            Err(error) => {
                assert_eq!(error.is_flush(), id > 3, "{id}: {error}");
                assert!(id >= 3, "{id}: {error}");
            }
        }
    }
    assert_eq!(pair.a.cq.stray_completions(), 0);
}

/// What ends a run does not fit: the last that does is signalled in its stead.
#[test]
fn a_batch_that_ends_too_early() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
    let request = |id| WorkRequest::write(pair.buffer(b"x"), shared.remote()).id(id);
    let mut batch: Vec<_> = (0..4).map(|id| request(id).unsignaled()).collect();
    let nowhere = shared.remote().slice(0, 0).unwrap();
    batch.push(WorkRequest::write(pair.buffer(b"x"), nowhere).id(4));
    assert_eq!(pair.a.qp.post_batch(&mut batch), Err(PostErrorKind::OutOfBounds { asked: 1, limit: 0 }));
    assert_eq!(batch.len(), 1);
    let ids: Vec<_> = collect(&pair.a.cq, 4).iter().map(|done| (done.id, done.result.is_ok())).collect();
    assert_eq!(ids, [(0, true), (1, true), (2, true), (3, true)]);
    assert_eq!(pair.a.cq.credits_in_use(), 0);
}

#[test]
fn batches_of_receives() {
    let pair = rc();
    assert_eq!(pair.b.qp.post_recv_batch(&mut Vec::new()), Ok(0));
    let request = |id: u64| match id % 3 {
        0 => RecvRequest::new(pair.empty(8)).id(id),
        1 => RecvRequest::new([pair.empty(2), pair.empty(2), pair.empty(2)]).id(id),
        _ => RecvRequest::new(rdma_core::Payload::empty()).id(id),
    };
    // More than fits: the rest stays.
    let mut batch: Vec<_> = (0..20).map(request).collect();
    assert_eq!(pair.b.qp.post_recv_batch(&mut batch), Err(PostErrorKind::QueueFull));
    assert_eq!(batch.len(), 4);
    for round in 0..2 {
        let count = if round == 0 { 16 } else { 4 };
        for id in 0..count {
            let message = match (id + round * 16) % 3 {
                2 => WorkRequest::send(rdma_core::Payload::empty()),
                _ => WorkRequest::send(pair.buffer(b"hello")),
            };
            pair.a.qp.post_send(message).unwrap();
        }
        for (done, id) in collect(&pair.b.cq, count).iter().zip(round * 16..) {
            assert_eq!(done.id, id as u64);
            let lengths: Vec<_> = done.buffers.iter().map(|buffer| buffer.len()).collect();
            let expected: &[usize] = [&[5][..], &[2, 2, 1], &[]][id % 3];
            assert_eq!(lengths, expected, "of receive {id}");
        }
        collect(&pair.a.cq, count);
        if round == 0 {
            assert_eq!(pair.b.qp.post_recv_batch(&mut batch), Ok(4));
        }
    }

    // One that cannot be: those before it are posted.
    let mut batch = vec![
        RecvRequest::new(pair.empty(8)).id(1),
        RecvRequest::new(rdma_core::Payload::inline(b"read only")).id(2),
        RecvRequest::new(pair.empty(8)).id(3),
    ];
    assert_eq!(pair.b.qp.post_recv_batch(&mut batch), Err(PostErrorKind::NotWritable));
    assert_eq!(batch.len(), 2);
    assert_eq!(pair.b.qp.recv_queue().in_flight(), 1);
}

#[test]
fn datagrams() {
    let pair = ud();
    let address = pair.address();
    pair.b.qp.post_recv(pair.empty(100)).unwrap();
    pair.b.qp.post_recv(pair.empty(100)).unwrap();
    let to = pair.b.qp.num();
    pair.a.qp.post_send(WorkRequest::send_to(pair.buffer(b"datagram"), &address, to, QKEY)).unwrap();
    // The high bit says: the sender's own Q_Key.
    let request = WorkRequest::send_to_with_imm(pair.buffer(b"own key"), &address, to, 0x8000_0000, 5);
    pair.a.qp.post_send(request).unwrap();
    let lost = differs(&pair.context, Difference::QKeyAsPosted);
    if lost {
        // What has the key arrives behind it.
        let request = WorkRequest::send_to_with_imm(pair.buffer(b"the key"), &address, to, QKEY, 6);
        pair.a.qp.post_send(request).unwrap();
    }
    drop(address);
    let received = collect(&pair.b.cq, 2);
    assert_eq!(received[0].result, Ok((48, None)));
    assert_eq!(&received[0].buffers[0][40..], b"datagram");
    assert_eq!(received[1].result, Ok((47, Some(if lost { 6 } else { 5 }))));
    assert_eq!(collect(&pair.a.cq, if lost { 3 } else { 2 }).len(), if lost { 3 } else { 2 });
}

#[test]
fn errors_explain_themselves_and_flushes_name_the_first() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::READ).unwrap();
    pair.a.qp.post_recv(RecvRequest::new(pair.empty(8)).id(3)).unwrap();
    pair.a.qp.post_send(WorkRequest::write(pair.buffer(b"forbidden"), shared.remote()).id(1)).unwrap();
    pair.a.qp.post_send(WorkRequest::write(pair.buffer(b"behind it"), shared.remote()).id(2)).unwrap();
    let mut done = collect(&pair.a.cq, 3);
    let first = done.iter().find(|d| d.id == 1).unwrap().result.clone().unwrap_err();
    assert_eq!(first.status(), Status::REMOTE_ACCESS);
    assert!(first.to_string().contains("access rights"), "{first}");
    // What is posted to the failed pair is flushed as well.
    pair.a.qp.post_recv(RecvRequest::new(pair.empty(8)).id(4)).unwrap();
    if differs(&pair.context, Difference::LateReceivesStay) {
        pair.a.qp.abort().unwrap();
    }
    done.extend(collect(&pair.a.cq, 1));
    for id in [2, 3, 4] {
        let flush = done.iter().find(|d| d.id == id).unwrap().result.clone().unwrap_err();
        assert!(flush.is_flush());
        assert_eq!(flush.cause(), Some(Status::REMOTE_ACCESS));
    }
    assert!(done.iter().all(|d| d.buffers.len() == 1));
    assert_eq!(pair.a.qp.first_error(), Some(Status::REMOTE_ACCESS));
    assert_eq!(pair.a.qp.observe().unwrap(), rdma_core::Observed::Failed);
}

#[test]
fn abort_drain_reset() {
    let pair = rc();
    let waiting = pair.a.qp.start_recv(pair.empty(8)).unwrap().detach();
    pair.a.qp.post_recv(RecvRequest::new(pair.empty(8)).id(9)).unwrap();
    pair.a.qp.handle().abort().unwrap();
    let finished = waiting.wait(LIMIT).unwrap();
    assert!(finished.result().unwrap_err().is_flush());
    let support::Side { qp, cq } = pair.a;
    let qp = qp.drain(LIMIT).unwrap();
    assert_eq!(collect(&cq, 1)[0].id, 9);
    let qp = qp.reset(LIMIT).unwrap();
    assert_eq!(qp.recv_queue().in_flight(), 0);
    assert_eq!(cq.credits_in_use(), 0);
    assert_eq!(qp.first_error(), None);
}
