//! The objects around the operations, on the device under test: shared receive queues, windows, events, multicast, channels,
//! the states off the main road, and the end of a pair.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::time::Instant;

use rdma_core::qp::transport::{Connected, Rc, Ud};
use rdma_core::{
    AddressVector, AnyQueuePair, AsyncEvents, Buffer, ConnectOptions, EndpointOptions, Error, Event,
    EventKind, Gid, GlobalRoute, Notify, Observed, PostErrorKind, ProtectionDomain, RecvRequest, RegionFlags,
    RemoteAccess, SharedRegion, Status, WindowType, WorkRequest,
};
use support::{Difference, LIMIT, Pair, QKEY, collect, differs, open, rc, skip, uc, ud};

/// A buffer that holds `bytes`.
fn buffer(pd: &ProtectionDomain, bytes: &[u8]) -> Buffer {
    pd.register(bytes.to_vec()).unwrap().into_buffer()
}

/// The next event that `wanted` takes.
fn event(events: &AsyncEvents, wanted: impl Fn(&Event) -> bool) -> Event {
    let start = Instant::now();
    loop {
        while let Some(event) = events.next_event().unwrap() {
            if wanted(&event) {
                return event;
            }
        }
        assert!(start.elapsed() < LIMIT, "the event did not come");
        let _ = events.wait(LIMIT / 20).unwrap();
    }
}

#[test]
fn shared_receive_queues_and_their_limit() {
    let pair = rc();
    let events = pair.context.events().unwrap();
    let srq = pair.pd.shared_receive_queue(8, 1).unwrap();
    let cq = pair.context.completion_queue(64).build().unwrap();
    let mut sides = Vec::new();
    for _ in 0..2 {
        let a = pair.pd.queue_pair::<Rc>(&pair.a.cq, &pair.a.cq).build().unwrap();
        let b = pair.pd.queue_pair::<Rc>(&cq, &cq).shared_receive_queue(&srq).build().unwrap();
        let options = EndpointOptions::default();
        let (from_a, from_b) = (a.endpoint(&options).unwrap(), b.endpoint(&options).unwrap());
        let a = a.connect(&from_a, &from_b, &ConnectOptions::default()).unwrap();
        sides.push((a, b.connect(&from_b, &from_a, &ConnectOptions::default()).unwrap()));
    }
    assert_eq!(cq.credits_in_use(), 2 * srq.depth(), "each pair reserves the depth");
    for id in 0..4 {
        srq.post_recv(RecvRequest::new(pair.empty(8)).id(id)).unwrap();
    }
    srq.arm_limit(3).unwrap();
    assert_eq!(srq.limit().unwrap(), 3);
    for (a, _) in &sides {
        a.post_send(pair.buffer(b"shared")).unwrap();
    }
    let mut received = collect(&cq, 2);
    received.sort_by_key(|done| done.id);
    assert!(received.iter().all(|done| &done.buffers[0][..] == b"shared"));
    let limit =
        |event: &Event| matches!(event, Event::SharedReceiveQueue(EventKind::SrqLimitReached, Some(_)));
    event(&events, limit);
    assert_eq!(srq.limit().unwrap(), 0, "an event disarms");

    // An operation of the shared queue finishes wherever it is received.
    srq.post_recv(pair.empty(8)).unwrap();
    collect(&pair.a.cq, 2);
    // The pairs end; the device says that it holds no receive of theirs, and others' events are not lost by that.
    for (_, b) in sides {
        let number = b.num();
        let start = Instant::now();
        let drained = b.drain(LIMIT).unwrap();
        assert!(start.elapsed() < LIMIT, "the device did not give its word");
        let last = |event: &Event| match event {
            Event::QueuePair(EventKind::LastWqeReached, Some(pair)) => pair.num() == number,
            _ => false,
        };
        event(&events, last);
        drop(drained);
    }
    let _ = cq.poll(&mut rdma_core::Completions::new()).unwrap().len();
    assert_eq!(cq.credits_in_use(), 0);
    assert_eq!(srq.work_queue().in_flight(), 3);
}

/// Writes through `token`; how that ended.
fn write(pair: &Pair<Rc>, token: rdma_core::RemoteSlice) -> Status {
    let request = WorkRequest::write(pair.buffer(b"window"), token);
    pair.b.qp.start_send(request).unwrap().wait(LIMIT).unwrap().completion().status()
}

fn region(pair: &Pair<Rc>) -> SharedRegion {
    pair.pd.share_with(vec![0; 64], RemoteAccess::empty(), RegionFlags::WINDOWS).unwrap()
}

#[test]
fn windows_of_type_1() {
    let pair = rc();
    let window = match pair.pd.memory_window(WindowType::One) {
        Ok(window) => window,
        Err(error) => return skip("windows of type 1", error),
    };
    let shared = region(&pair);
    let (bind, token) =
        pair.a.qp.bind_window(&window, &shared.slice(8..16).unwrap(), RemoteAccess::WRITE).unwrap();
    assert!(bind.wait(LIMIT).unwrap().result().is_ok());
    assert_eq!(write(&pair, token), Status::SUCCESS);
    let mut bytes = [0; 6];
    shared.copy_out(8, &mut bytes).unwrap();
    assert_eq!(&bytes, b"window");
    // Bound anew, the old token is void; and so is one for more than the window.
    let (bind, other) =
        pair.a.qp.bind_window(&window, &shared.slice(16..24).unwrap(), RemoteAccess::WRITE).unwrap();
    assert!(bind.wait(LIMIT).unwrap().result().is_ok());
    assert_ne!(other.rkey, token.rkey);
    assert_eq!(write(&pair, token), Status::REMOTE_ACCESS);
    assert!(matches!(
        window.bind::<Rc>(&shared.slice(..).unwrap(), RemoteAccess::WRITE),
        Err(Error::Invalid { .. })
    ));
}

#[test]
fn windows_of_type_2() {
    // Each way to take a window's key back, and its use before.
    for way in ["the owner", "the peer", "a bind"] {
        let pair = rc();
        let window = match pair.pd.memory_window(WindowType::Two) {
            Ok(window) => window,
            Err(error) => return skip("windows of type 2", error),
        };
        let shared = region(&pair);
        let (bind, token) = window.bind(&shared.slice(8..16).unwrap(), RemoteAccess::WRITE).unwrap();
        assert!(pair.a.qp.start_send(bind).unwrap().wait(LIMIT).unwrap().result().is_ok());
        assert_eq!(window.rkey(), token.rkey);
        assert_eq!(write(&pair, token), Status::SUCCESS);
        assert_eq!(shared.load(8).unwrap() & 0xff, u64::from(b'w'));
        match way {
            "the owner" => {
                let invalidate = pair.a.qp.start_send(WorkRequest::invalidate(&window)).unwrap();
                assert!(invalidate.wait(LIMIT).unwrap().result().is_ok());
            }
            "the peer" => {
                let receive = pair.a.qp.start_recv(pair.empty(8)).unwrap();
                let request = WorkRequest::send_with_invalidate(pair.buffer(b"done"), token.rkey);
                pair.b.qp.post_send(request).unwrap();
                let received = receive.wait(LIMIT).unwrap();
                let named = !differs(&pair.context, Difference::InvalidatedKeyUnnamed);
                let invalidated = received.result().unwrap().invalidated_rkey();
                assert_eq!(invalidated, named.then_some(token.rkey));
            }
            _ => {
                let invalidate = pair.a.qp.start_send(WorkRequest::invalidate(&window)).unwrap();
                assert!(invalidate.wait(LIMIT).unwrap().result().is_ok());
                let (bind, other) = window.bind(&shared.slice(16..24).unwrap(), RemoteAccess::WRITE).unwrap();
                assert!(pair.a.qp.start_send(bind).unwrap().wait(LIMIT).unwrap().result().is_ok());
                assert_eq!(write(&pair, other), Status::SUCCESS);
            }
        }
        assert_eq!(write(&pair, token), Status::REMOTE_ACCESS, "{way}");
    }
}

#[test]
fn a_bound_window_goes_with_its_pair() {
    let Pair { pd, a, b, context } = rc();
    let window = match pd.memory_window(WindowType::Two) {
        Ok(window) => window,
        Err(error) => return skip("windows of type 2", error),
    };
    let shared = pd.share_with(vec![0; 64], RemoteAccess::empty(), RegionFlags::WINDOWS).unwrap();
    let slice = shared.slice(..8).unwrap();
    let (bind, _) = window.bind(&slice, RemoteAccess::WRITE).unwrap();
    assert!(a.qp.start_send(bind).unwrap().wait(LIMIT).unwrap().result().is_ok());
    let (prepared, _) = window.bind(&slice, RemoteAccess::WRITE).unwrap();
    let start = Instant::now();
    drop(a);
    assert!(start.elapsed() < LIMIT, "the pair waits for its window");
    assert!(matches!(window.bind::<Rc>(&slice, RemoteAccess::WRITE), Err(Error::Invalid { .. })));
    assert_eq!(b.qp.post_send(prepared).unwrap_err().kind, PostErrorKind::WindowGone);
    drop((window, shared, b, pd));
    assert_eq!(rdma_core::leaks(), 0);
    drop(context);
}

#[test]
fn access_is_changed_and_taken_back() {
    let pair = rc();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::READ).unwrap();
    let clone = shared.clone();
    let (error, shared) = shared.change_access(RemoteAccess::WRITE).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    drop(clone);
    let shared = match shared.change_access(RemoteAccess::WRITE) {
        Ok(shared) => shared,
        Err((error, _)) => return skip("change of access", error),
    };
    assert_eq!(shared.access(), RemoteAccess::WRITE);
    assert_eq!(write(&pair, shared.remote()), Status::SUCCESS);
    let mine = shared.revoke().unwrap();
    assert_eq!(&mine[..6], b"window");
}

#[test]
fn multicast_reaches_who_joined() {
    // An IPv4 group by its mapped address, and as RoCE v1 writes it.
    for (first, name) in [([0, 0], "::ffff:239.7.8.9"), ([0xff, 0x0e], "ff0e::ffff:239.7.8.9")] {
        let pair = ud();
        if first != [0, 0] && differs(&pair.context, Difference::MappedGroupsOnly) {
            return;
        }
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&first);
        bytes[10..].copy_from_slice(&[0xff, 0xff, 239, 7, 8, 9]);
        multicast(pair, Gid(bytes), name);
    }
}

fn multicast(pair: Pair<Ud>, group: Gid, name: &str) {
    if let Err(error) = pair.b.qp.attach_multicast(group, 0) {
        return skip("multicast", error);
    }
    let own = pair.context.choose_gid(1).unwrap().entry;
    // Kept until the end: an interface is in a group for as long as the socket lives.
    let membership = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    if differs(&pair.context, Difference::GroupsNeedTheInterface) {
        membership.join_multicast_v4(&group.ipv4().unwrap(), &own.gid.ipv4().unwrap()).unwrap();
    }
    let route = GlobalRoute::new(group, u8::try_from(own.index).unwrap());
    let to = pair.pd.address_handle(&AddressVector::global(1, route)).unwrap();
    let send = || {
        let request = WorkRequest::send_to(pair.buffer(b"to all"), &to, 0xff_ffff, QKEY);
        pair.a.qp.post_send(request).unwrap();
        assert!(collect(&pair.a.cq, 1)[0].result.is_ok());
    };
    pair.b.qp.post_recv(pair.empty(64)).unwrap();
    send();
    assert_eq!(&collect(&pair.b.cq, 1)[0].buffers[0][40..], b"to all", "{name}");
    pair.b.qp.detach_multicast(group, 0).unwrap();
    assert!(pair.b.qp.detach_multicast(group, 0).is_err());
    // A pair that is dropped leaves its groups; it could not be destroyed otherwise.
    pair.b.qp.attach_multicast(group, 0).unwrap();
    let before = rdma_core::leaks();
    drop(pair);
    assert_eq!(rdma_core::leaks(), before);
}

#[test]
fn a_datagram_is_answered_by_its_completion() {
    let pair = ud();
    let address = pair.address();
    pair.b.qp.post_recv(pair.empty(64)).unwrap();
    pair.a.qp.post_recv(pair.empty(64)).unwrap();
    pair.a.qp.post_send(WorkRequest::send_to(pair.buffer(b"ping"), &address, pair.b.qp.num(), QKEY)).unwrap();
    let mut completions = rdma_core::Completions::new();
    let start = Instant::now();
    'answered: loop {
        assert!(start.elapsed() < LIMIT);
        if let Some(mut completion) = pair.b.cq.poll(&mut completions).unwrap().next() {
            let datagram = completion.take_buffer().unwrap();
            let success = completion.result().unwrap();
            assert!(success.has_grh());
            assert_eq!(success.src_qp(), pair.a.qp.num());
            let short = AddressVector::of_sender(&pair.context, 1, &success, &datagram[..39]);
            assert!(matches!(short, Err(Error::OutOfBounds { .. })));
            let sender = AddressVector::of_sender(&pair.context, 1, &success, &datagram).unwrap();
            assert_eq!(sender.route.unwrap().gid, pair.context.choose_gid(1).unwrap().entry.gid);
            let sender = pair.pd.address_handle(&sender).unwrap();
            let answer = WorkRequest::send_to(pair.buffer(b"pong"), &sender, success.src_qp(), QKEY);
            pair.b.qp.post_send(answer).unwrap();
            break 'answered;
        }
    }
    let done = collect(&pair.a.cq, 2);
    assert!(done.iter().any(|done| done.buffers.iter().any(|b| b.len() == 44 && &b[40..] == b"pong")));
}

#[test]
fn channels_tell_of_what_was_asked_for() {
    let context = open();
    let pd = context.protection_domain().unwrap();
    let channel = context.completion_channel().unwrap();
    let cq = context.completion_queue(16).channel(&channel).user(5).build().unwrap();
    let other = context.completion_queue(16).channel(&channel).user(6).build().unwrap();
    let qp = pd.queue_pair::<Rc>(&other, &cq).build().unwrap();
    let local = qp.endpoint(&EndpointOptions::default()).unwrap();
    let qp = qp.connect(&local, &local, &ConnectOptions::default()).unwrap();
    let buffer = || pd.allocate(8).unwrap().into_buffer();
    let exchange = |solicited: bool| {
        qp.post_recv(buffer()).unwrap();
        let request = WorkRequest::send(buffer());
        qp.post_send(if solicited { request.solicited() } else { request }).unwrap();
        assert_eq!(collect(&cq, 1).len() + collect(&other, 1).len(), 2);
    };
    // Not armed: nothing.
    exchange(true);
    assert!(channel.next_event().unwrap().is_none());
    // Any.
    cq.arm(Notify::Any).unwrap();
    exchange(false);
    assert!(channel.wait(LIMIT).unwrap());
    assert_eq!(channel.next_event().unwrap().unwrap().user(), 5);
    assert!(channel.next_event().unwrap().is_none(), "one event for one arm");
    // Solicited: not for a message that is not.
    cq.arm(Notify::Solicited).unwrap();
    exchange(false);
    assert!(channel.next_event().unwrap().is_none());
    exchange(true);
    assert!(channel.wait(LIMIT).unwrap());
    assert_eq!(channel.next_event().unwrap().unwrap().user(), 5);
    // Many events, acknowledged in batches, and both queues of one channel.
    for _ in 0..200 {
        cq.arm(Notify::Any).unwrap();
        other.arm(Notify::Any).unwrap();
        exchange(false);
        let mut users = Vec::new();
        while users.len() < 2 {
            assert!(channel.wait(LIMIT).unwrap());
            users.extend(channel.next_event().unwrap().map(|queue| queue.user()));
        }
        users.sort_unstable();
        assert_eq!(users, [5, 6]);
    }
    // A queue with events that nobody read goes without waiting for them.
    cq.arm(Notify::Any).unwrap();
    exchange(false);
    drop((qp, cq));
    while let Some(queue) = channel.next_event().unwrap() {
        assert_eq!(queue.user(), 6);
    }
}

#[test]
fn completion_queues_are_resized() {
    let pair = rc();
    for _ in 0..4 {
        pair.a.qp.post_recv(pair.empty(8)).unwrap();
    }
    match pair.a.cq.resize(3) {
        Err(Error::InUse { .. }) => {}
        other => panic!("a resize below what is in use: {other:?}"),
    }
    if let Err(error) = pair.a.cq.resize(200) {
        return skip("resize", error);
    }
    assert!(pair.a.cq.depth() >= 200);
    pair.a.qp.abort().unwrap();
    assert_eq!(collect(&pair.a.cq, 4).len(), 4);
    pair.a.cq.resize(1).unwrap();
    if let Err(error) = pair.a.cq.moderate(8, 100) {
        skip("moderation", error);
    }
}

#[test]
fn a_send_queue_drains_and_goes_on() {
    let pair = rc();
    let context = pair.context.clone();
    let events = pair.context.events().unwrap();
    pair.b.qp.post_recv(pair.empty(8)).unwrap();
    pair.a.qp.post_send(pair.buffer(b"before")).unwrap();
    let number = pair.a.qp.num();
    let sqd = match pair.a.qp.sqd() {
        Ok(sqd) => sqd,
        Err(error) => return skip("SQD", error),
    };
    let drained = |event: &Event| match event {
        Event::QueuePair(EventKind::SendQueueDrained, Some(pair)) => pair.num() == number,
        _ => false,
    };
    event(&events, drained);
    assert_eq!(sqd.observe().unwrap(), Observed::Ready("SQD"));
    let held = differs(&context, Difference::SendsBeginLater);
    if !held {
        assert!(collect(&pair.a.cq, 1)[0].result.is_ok());
    }
    let qp = sqd.resume().unwrap();
    pair.b.qp.post_recv(buffer(&pair.pd, b"12345678")).unwrap();
    qp.post_send(buffer(&pair.pd, b"after")).unwrap();
    let received = collect(&pair.b.cq, 2);
    assert_eq!(&received[0].buffers[0][..], b"before");
    assert_eq!(&received[1].buffers[0][..], b"after");
    let left = if held { 2 } else { 1 };
    assert!(collect(&pair.a.cq, left).iter().all(|done| done.result.is_ok()));
}

#[test]
fn a_send_that_fails_leaves_the_receives_of_ud() {
    let pair = ud();
    let foreign = pair.context.protection_domain().unwrap();
    let address = pair.address();
    // Memory of another domain is a local protection error.
    let request =
        WorkRequest::send_to(foreign.allocate(8).unwrap().into_buffer(), &address, pair.b.qp.num(), QKEY);
    pair.a.qp.post_send(request).unwrap();
    let flushed = differs(&pair.context, Difference::LocalErrorsAreFlushes);
    let expected = if flushed { Status::FLUSHED } else { Status::LOCAL_PROTECTION };
    assert_eq!(collect(&pair.a.cq, 1)[0].result.clone().unwrap_err().status(), expected);
    if flushed {
        return assert_eq!(pair.a.qp.observe().unwrap(), Observed::Failed);
    }
    if pair.a.qp.observe().unwrap() != Observed::SendFailed {
        return skip("SQE", "the device moved the pair elsewhere");
    }
    let sqe = pair.a.qp.send_failed().unwrap();
    sqe.post_recv(buffer(&pair.pd, &[0; 64])).unwrap();
    let qp = sqe.resume().unwrap();
    let request = WorkRequest::send_to(buffer(&pair.pd, b"again"), &address, qp.num(), QKEY);
    qp.post_send(request).unwrap();
    assert!(collect(&pair.a.cq, 2).iter().all(|done| done.result.is_ok()));
    // A pair that did not fail is not in SQE.
    let error = pair.b.qp.send_failed().unwrap_err();
    assert!(error.to_string().contains("not in SQE"), "{error}");
    let any: AnyQueuePair<Ud> = error.queue_pair.into();
    assert_eq!(any.state(), "RTS");
}

/// Unsignalled sends that arrived, and then the end: none of them is reported as flushed.
fn end_of_a_run<T: Connected>(pair: Pair<T>) {
    for id in 0..3 {
        pair.b.qp.post_recv(pair.empty(8)).unwrap();
        pair.a.qp.post_send(WorkRequest::send(pair.buffer(b"quiet")).id(id).unsignaled()).unwrap();
    }
    assert_eq!(collect(&pair.b.cq, 3).len(), 3);
    // The acknowledgement has to come, too, before a send is known to have succeeded.
    std::thread::sleep(LIMIT / 50);
    let _ = pair.a.cq.dispatch().unwrap();
    let drained = pair.a.qp.drain(LIMIT).unwrap();
    let done = collect(&pair.a.cq, 3);
    assert_eq!(done.iter().map(|done| done.id).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    let again = drained.reset(LIMIT).unwrap();
    assert_eq!(pair.a.cq.credits_in_use(), 0);
    drop(again);
}

#[test]
fn drained_runs_of_rc_have_succeeded() {
    end_of_a_run(rc());
}

#[test]
fn drained_runs_of_uc_have_succeeded() {
    end_of_a_run(uc());
}

#[test]
fn drained_runs_of_ud_have_succeeded() {
    let pair = ud();
    let address = pair.address();
    for _ in 0..3 {
        pair.b.qp.post_recv(pair.empty(64)).unwrap();
        let request = WorkRequest::send_to(pair.buffer(b"quiet"), &address, pair.b.qp.num(), QKEY);
        pair.a.qp.post_send(request.unsignaled()).unwrap();
    }
    assert_eq!(collect(&pair.b.cq, 3).len(), 3);
    pair.a.qp.drain(LIMIT).unwrap();
    assert!(collect(&pair.a.cq, 3).iter().all(|done| done.result.is_ok()));
}

#[test]
fn halves_are_joined_only_with_their_own() {
    let (one, two) = (rc(), rc());
    let (send, receive) = one.a.qp.split();
    let (other_send, other_receive) = two.a.qp.split();
    let (send, _) = send.reunite(other_receive).unwrap_err();
    one.b.qp.post_recv(buffer(&one.pd, &[0; 8])).unwrap();
    receive.post_recv(buffer(&one.pd, &[0; 8])).unwrap();
    send.post_send(buffer(&one.pd, b"half")).unwrap();
    assert_eq!(&collect(&one.b.cq, 1)[0].buffers[0][..], b"half");
    drop(other_send);
    assert_eq!(send.reunite(receive).unwrap().observe().unwrap(), Observed::Ready("RTS"));
}
