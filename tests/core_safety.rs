//! The safety bar of `docs/SAFETY.md` from safe code, on the device under test: points 1, 5, 8, 9, 10, 11 and 13. The
//! others need a device that misbehaves (`rdma-core/tests/evil.rs`) or a compiler (`rdma-core/src/qp/typestate.rs`).
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rdma_core::qp::transport::Rc;
use rdma_core::{
    Completions, ConnectOptions, EndpointOptions, Notify, PostErrorKind, RecvRequest, RegionFlags,
    RemoteAccess, RemoteSlice, Status, WindowType, WorkRequest,
};
use support::{LIMIT, QKEY, collect, open, queue_pair, rc, skip, ud};

/// Everything there is, with work in flight on it.
fn everything() -> Vec<Box<dyn Any>> {
    let pair = rc();
    let datagrams = ud();
    let address = datagrams.address();
    let mut all: Vec<Box<dyn Any>> = Vec::new();
    let channel = pair.context.completion_channel().unwrap();
    let cq = pair.context.completion_queue(64).channel(&channel).build().unwrap();
    cq.arm(Notify::Any).unwrap();
    let srq = pair.pd.shared_receive_queue(8, 1).unwrap();
    srq.post_recv(pair.empty(64)).unwrap();
    all.push(Box::new(srq.start_recv(pair.empty(64)).unwrap().detach()));
    let on_srq = pair.pd.queue_pair::<Rc>(&cq, &cq).shared_receive_queue(&srq).build().unwrap();
    let shared = pair.pd.share_with(vec![0; 64], RemoteAccess::all(), RegionFlags::WINDOWS).unwrap();
    match pair.pd.memory_window(WindowType::Two) {
        Ok(window) => {
            let (bind, token) = window.bind(&shared.slice(..8).unwrap(), RemoteAccess::WRITE).unwrap();
            pair.a.qp.post_send(bind).unwrap();
            pair.a.qp.post_send(WorkRequest::write(pair.buffer(b"12345678"), token)).unwrap();
            all.push(Box::new(window));
        }
        Err(error) => skip("memory windows", error),
    }
    pair.b.qp.post_recv(pair.empty(64)).unwrap();
    all.push(Box::new(pair.b.qp.start_recv(pair.empty(64)).unwrap().detach()));
    all.push(Box::new(pair.a.qp.start_send(pair.buffer(b"in flight")).unwrap().detach()));
    pair.a.qp.post_send(WorkRequest::write(pair.buffer(b"in flight"), shared.remote()).unsignaled()).unwrap();
    all.push(Box::new(
        pair.a.qp.start_send(WorkRequest::read(pair.empty(64), shared.remote())).unwrap().detach(),
    ));
    datagrams.b.qp.post_recv(datagrams.empty(64)).unwrap();
    let to = datagrams.b.qp.num();
    datagrams.a.qp.post_send(WorkRequest::send_to(datagrams.buffer(b"x"), &address, to, QKEY)).unwrap();
    let (head, tail) = pair.empty(64).split_at(10).unwrap();
    all.push(Box::new(head));
    all.push(Box::new(tail));
    all.push(Box::new(pair.pd.allocate(64).unwrap()));
    all.push(Box::new(shared.slice(..).unwrap()));
    all.push(Box::new(pair.context.events().unwrap()));
    all.push(Box::new(pair.a.qp.handle()));
    let (send, receive) = pair.b.qp.split();
    all.extend([Box::new(send) as Box<dyn Any>, Box::new(receive), Box::new(pair.b.cq)]);
    all.extend([Box::new(pair.a.qp) as Box<dyn Any>, Box::new(pair.a.cq), Box::new(pair.pd)]);
    all.extend([Box::new(on_srq) as Box<dyn Any>, Box::new(srq), Box::new(cq), Box::new(channel)]);
    all.extend([Box::new(shared) as Box<dyn Any>, Box::new(address), Box::new(datagrams)]);
    all.push(Box::new(pair.context));
    all
}

/// Point 1: any object dropped or forgotten in any order, with work in flight.
#[test]
fn point_01_any_order_of_drop_and_forget() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..60 {
        let mut all = everything();
        random.shuffle(&mut all);
        for object in all {
            // Every third round forgets half of them.
            if round % 3 == 2 && random.bool() {
                std::mem::forget(object);
            } else {
                drop(object);
            }
        }
    }
    assert_eq!(rdma_core::leaks(), 0, "a destroy failed");
}

/// Point 5: memory that is posted is nobody's until the completion, and is whole then.
#[test]
fn point_05_posted_memory_comes_back_with_the_completion() {
    let pair = rc();
    let posted = pair.empty(64);
    let place = posted.as_ptr().addr();
    let receive = pair.b.qp.start_recv(posted).unwrap();
    let Err(receive) = receive.try_finish() else { panic!("nothing was sent") };
    pair.a.qp.post_send(pair.buffer(b"whole")).unwrap();
    let buffer = receive.wait(LIMIT).unwrap().into_buffer().unwrap();
    assert_eq!(buffer.as_ptr().addr(), place);
    assert_eq!(&buffer[..], b"whole");
    // Memory that a peer may write gives copies only; see `point_05_bytes_of_a_shared_region` for references.
    let shared = pair.pd.share(vec![7; 16], RemoteAccess::WRITE).unwrap();
    assert!(shared.slice(8..24).is_err());
    let (start, end) = (9, 3);
    assert!(shared.slice(start..end).is_err());
    assert!(shared.copy_in(usize::MAX, &[1]).is_err());
    assert!(shared.copy_out(16, &mut [0]).is_err());
    assert!(shared.copy_out(16, &mut []).is_ok());
}

/// Point 8: nothing to post is no work.
#[test]
fn point_08_empty_batches() {
    let pair = rc();
    assert_eq!(pair.a.qp.post_batch(&mut Vec::new()), Ok(0));
    let mut operations = Vec::new();
    assert_eq!(pair.a.qp.start_batch(&mut Vec::new(), &mut operations), Ok(0));
    assert!(operations.is_empty());
    // Nor is a list of nothing: a message of length 0.
    pair.b.qp.post_recv(RecvRequest::new(Vec::<rdma_core::Buffer>::new())).unwrap();
    pair.a.qp.post_send(WorkRequest::send(Vec::<rdma_core::Buffer>::new())).unwrap();
    assert_eq!(collect(&pair.b.cq, 1)[0].result, Ok((0, None)));
    assert_eq!(collect(&pair.a.cq, 1).len(), 1);
}

/// Point 9: what a work request names lives until its completion, whatever became of the handles before the post.
#[test]
fn point_09_what_a_request_names_dies_before_the_post() {
    let pair = ud();
    let address = pair.address();
    let to = pair.b.qp.num();
    pair.b.qp.post_recv(pair.empty(64)).unwrap();
    let request = WorkRequest::send_to(pair.buffer(b"after"), &address, to, QKEY);
    drop(address);
    pair.a.qp.post_send(request).unwrap();
    assert_eq!(&collect(&pair.b.cq, 1)[0].buffers[0][40..], b"after");

    let pair = rc();
    match pair.pd.memory_window(WindowType::Two) {
        Ok(window) => {
            let shared =
                pair.pd.share_with(vec![0; 64], RemoteAccess::empty(), RegionFlags::WINDOWS).unwrap();
            let (bind, token) = window.bind(&shared.slice(..).unwrap(), RemoteAccess::WRITE).unwrap();
            drop((window, shared));
            assert!(pair.a.qp.start_send(bind).unwrap().wait(LIMIT).unwrap().result().is_ok());
            // The bind was the last to hold the window: its key is void now.
            let write = pair.b.qp.start_send(WorkRequest::write(pair.buffer(b"x"), token)).unwrap();
            assert_eq!(write.wait(LIMIT).unwrap().result().unwrap_err().status(), Status::REMOTE_ACCESS);
        }
        Err(error) => skip("memory windows", error),
    }

    // Requests behind the first of a chain.
    let pair = rc();
    let mut batch: Vec<_> = (0..3).map(|id| WorkRequest::send(pair.buffer(b"chain")).id(id)).collect();
    (0..3).for_each(|_| pair.b.qp.post_recv(pair.empty(8)).unwrap());
    pair.a.qp.post_batch(&mut batch).unwrap();
    drop(batch);
    assert!(collect(&pair.b.cq, 3).iter().all(|done| &done.buffers[0][..] == b"chain"));
}

/// Point 10: every object from many threads at once, pairs made and destroyed meanwhile.
#[test]
fn point_10_many_threads() {
    let pair = rc();
    let channel = pair.context.completion_channel().unwrap();
    let cq = pair.context.completion_queue(256).channel(&channel).build().unwrap();
    let srq = pair.pd.shared_receive_queue(16, 1).unwrap();
    let events = pair.context.events().unwrap();
    let shared = pair.pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut completions = Completions::new();
                while !stop.load(Ordering::Relaxed) {
                    let _ = cq.poll(&mut completions).unwrap().len();
                    let _ = cq.dispatch().unwrap();
                    let _ = pair.a.cq.poll(&mut completions).unwrap().len();
                    let _ = pair.b.cq.poll(&mut completions).unwrap().len();
                    cq.arm(Notify::Any).unwrap();
                    let _ = channel.next_event().unwrap();
                    let _ = events.next_event().unwrap();
                    shared.copy_in(3, b"0123456789").unwrap();
                    let _ = shared.load(8).unwrap();
                    thread::yield_now();
                }
            });
        }
        let workers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..40 {
                        // A message without a receive would hold up what comes behind it.
                        if pair.b.qp.post_recv(pair.empty(64)).is_ok() {
                            let _ = pair.a.qp.post_send(pair.buffer(b"many"));
                        }
                        let write = WorkRequest::write(pair.buffer(b"many"), shared.remote());
                        if let Ok(write) = pair.a.qp.start_send(write) {
                            assert!(write.wait(LIMIT).unwrap().result().is_ok());
                        }
                        let _ = srq.post_recv(pair.empty(64));
                        let qp = pair.pd.queue_pair::<Rc>(&cq, &cq).shared_receive_queue(&srq).build();
                        let other = queue_pair::<Rc>(&pair.pd, &cq);
                        let local = other.endpoint(&EndpointOptions::default()).unwrap();
                        let other = other.connect(&local, &local, &ConnectOptions::default()).unwrap();
                        // No room while the pollers are behind is no failure.
                        let _ = other.post_recv(pair.empty(8));
                        let _ = other.start_send(pair.buffer(b"to itself"));
                        let handle = other.handle();
                        handle.abort().unwrap();
                        drop((qp, other));
                        assert_eq!(handle.observe().unwrap(), None);
                    }
                })
            })
            .collect();
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, Ordering::Relaxed);
        ended.into_iter().for_each(|worker| worker.unwrap());
    });
    assert_eq!(rdma_core::leaks(), 0);
}

/// Point 11: no remote token, true or invented, reaches memory that this process has a reference to.
#[test]
fn point_11_loopback_against_a_live_reference() {
    let tokens = |buffer: &rdma_core::Buffer, keys: [u32; 2]| {
        let addr = buffer.as_ptr().addr() as u64;
        keys.map(|rkey| RemoteSlice { addr, rkey, len: buffer.len() as u64 })
    };
    for kind in 0..2 {
        for which in 0..2 {
            let pair = rc();
            let mut mine = pair.buffer(b"mine");
            let shared = pair.pd.share(vec![1; 8], RemoteAccess::all()).unwrap();
            // The key of the buffer itself, and a key that is good for other memory.
            let token = tokens(&mine, [mine.lkey(), shared.remote().rkey])[which];
            let reference = &mut mine[..];
            let request = match kind {
                0 => WorkRequest::write(pair.buffer(b"evil"), token),
                _ => WorkRequest::read(pair.empty(4), token),
            };
            let done = pair.a.qp.start_send(request).unwrap().wait(LIMIT).unwrap();
            assert_eq!(done.result().unwrap_err().status(), Status::REMOTE_ACCESS);
            reference[0] = b'M';
            assert_eq!(reference, b"Mine");
        }
    }
    // A token outlives the sharing: taking the memory back makes it void.
    let pair = rc();
    let shared = pair.pd.share(vec![1; 8], RemoteAccess::all()).unwrap();
    let token = shared.remote();
    let mut mine = shared.revoke().unwrap();
    let reference = &mut mine[..];
    let request = WorkRequest::write(pair.buffer(b"evil"), token.slice(0, 4).unwrap());
    let done = pair.a.qp.start_send(request).unwrap().wait(LIMIT).unwrap();
    assert_eq!(done.result().unwrap_err().status(), Status::REMOTE_ACCESS);
    assert_eq!(reference, [1; 8]);
}

/// Point 13: a completion queue has room for all that is posted; the post without room says so.
#[test]
fn point_13_a_completion_queue_does_not_overrun() {
    let context = open();
    let pd = context.protection_domain().unwrap();
    let cq = context.completion_queue(4).build().unwrap();
    let depth = cq.depth();
    let mut pairs = Vec::new();
    for _ in 0..depth.div_ceil(4) + 1 {
        let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(8).max_recv(8).build().unwrap();
        let local = qp.endpoint(&EndpointOptions::default()).unwrap();
        pairs.push(qp.connect(&local, &local, &ConnectOptions::default()).unwrap());
    }
    let mut posted = 0;
    'full: for qp in &pairs {
        for _ in 0..8 {
            match qp.post_recv(pd.allocate(8).unwrap().into_buffer()) {
                Ok(()) => posted += 1,
                Err(error) => {
                    assert_eq!(error.kind, PostErrorKind::QueueFull);
                    break 'full;
                }
            }
        }
    }
    assert_eq!(posted, depth);
    let refused = pairs[0].post_send(pd.allocate(8).unwrap().into_buffer()).unwrap_err();
    assert_eq!(refused.kind, PostErrorKind::QueueFull);
    assert!(cq.resize(depth - 1).is_err());
    // All of it flushed at once: every completion finds its place.
    for qp in &pairs {
        qp.abort().unwrap();
    }
    assert_eq!(collect(&cq, depth as usize).len(), depth as usize);
    assert_eq!((cq.credits_in_use(), cq.stray_completions()), (0, 0));
    assert!(pairs[0].post_recv(pd.allocate(8).unwrap().into_buffer()).is_ok());
}
