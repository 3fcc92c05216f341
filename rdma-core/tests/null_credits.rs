//! Credits and the order of completions on the null provider: what changes while others post.

#![cfg(feature = "test-providers")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as TaskContext, Wake, Waker};
use std::time::{Duration, Instant};

use rdma_core::qp::state::{Reset, Rts};
use rdma_core::qp::transport::Rc;
use rdma_core::{
    Buffer, CompletionQueue, Completions, ConnectOptions, Context, Device, EndpointOptions, Opcode,
    PostErrorKind, ProtectionDomain, QueuePair, RecvRequest, RemoteAccess, WorkRequest,
};

fn open() -> (Context, ProtectionDomain) {
    let context = Device::null().unwrap().open().unwrap();
    let pd = context.protection_domain().unwrap();
    (context, pd)
}

fn pair(pd: &ProtectionDomain, cq: &CompletionQueue, depth: u32) -> QueuePair<Rc, Rts> {
    let qp = pd.queue_pair::<Rc>(cq, cq).max_send(depth).max_recv(depth).build().unwrap();
    let endpoint = qp.endpoint(&EndpointOptions::default()).unwrap();
    qp.connect(&endpoint, &endpoint, &ConnectOptions::default()).unwrap()
}

/// Posts a SEND and its receive, with what is there; what was refused for want of room comes back.
fn post(qp: &QueuePair<Rc, Rts>, buffers: &mut Vec<Buffer>) {
    let Some(buffer) = buffers.pop() else { return };
    if let Err(refused) = qp.post_recv(RecvRequest::new(buffer)) {
        assert_eq!(refused.kind, PostErrorKind::QueueFull);
        buffers.extend(refused.request.into_payload().into_buffers());
        return;
    }
    let Some(buffer) = buffers.pop() else { return };
    if let Err(refused) = qp.post_send(buffer) {
        assert_eq!(refused.kind, PostErrorKind::QueueFull);
        buffers.extend(refused.request.into_payload().into_buffers());
    }
}

/// A completion queue on which whole depths are reserved comes to count, while threads post and poll: no buffer and no credit is
/// lost, and it never holds more than it has room for.
#[test]
fn credits_come_to_be_counted_while_others_post() {
    for round in 0..20 {
        let (context, pd) = open();
        let cq = context.completion_queue(16).build().unwrap();
        let qp = pair(&pd, &cq, 4);
        let done = AtomicBool::new(false);
        let mut extra = Vec::new();
        let total = std::thread::scope(|scope| {
            let posters: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut buffers: Vec<_> = pd.allocate(8 * 8).unwrap().into_buffers(8).collect();
                        let mut completions = Completions::new();
                        while !done.load(Ordering::Relaxed) {
                            post(&qp, &mut buffers);
                            buffers.extend(
                                cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()),
                            );
                            assert!(cq.credits_in_use() <= cq.depth());
                        }
                        buffers.len()
                    })
                })
                .collect();
            if round % 2 == 1 {
                std::thread::yield_now();
            }
            // 8 of 16 are reserved; the second of these does not fit, and from then on all count.
            for _ in 0..3 {
                extra.push(pair(&pd, &cq, 4));
                std::thread::yield_now();
            }
            done.store(true, Ordering::Relaxed);
            posters.into_iter().map(|poster| poster.join().unwrap()).sum::<usize>()
        });
        let mut completions = Completions::new();
        let mut left = 0;
        while qp.send_queue().in_flight() > 0 {
            left += cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()).count();
        }
        left += cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()).count();
        let waiting = qp.recv_queue().in_flight() as usize;
        assert_eq!(total + left + waiting, 16, "each buffer is somewhere, once");
        drop((qp, extra));
        let _ = cq.poll(&mut completions).unwrap().len();
        assert_eq!(cq.credits_in_use(), 0);
    }
}

/// Sends of one buffer, which complete by a short way, between unsignalled ones, which complete with a later one: all come
/// back, each once, none before it was sent, in order of posting.
#[test]
fn plain_sends_between_unsignalled_ones() {
    let (context, pd) = open();
    let cq = context.completion_queue(64).build().unwrap();
    let qp = pair(&pd, &cq, 8);
    let mut buffers: Vec<_> = pd.allocate(8 * 64).unwrap().into_buffers(8).collect();
    let mut completions = Completions::new();
    let (mut posted, mut seen) = (0_u64, 0_u64);
    // Every pattern of four signalled and unsignalled sends, over and over, polled after each, or after all.
    for pattern in 0..64_u32 {
        for i in 0..4 {
            qp.post_recv(RecvRequest::new(buffers.pop().unwrap()).id(u64::MAX)).unwrap();
            let request = WorkRequest::send(buffers.pop().unwrap()).id(posted);
            let signaled = pattern >> i & 1 == 1;
            qp.post_send(if signaled { request } else { request.unsignaled() }).unwrap();
            posted += 1;
            if pattern < 32 || i == 3 {
                for mut completion in cq.poll(&mut completions).unwrap() {
                    if completion.id() != u64::MAX {
                        assert_eq!(completion.id(), seen, "in order of posting");
                        seen += 1;
                    }
                    buffers.push(completion.take_buffer().unwrap());
                }
                assert!(seen <= posted);
            }
            if signaled && (pattern < 32 || i == 3) {
                assert_eq!(seen, posted, "a signalled send completes all before it");
            }
        }
    }
    qp.post_recv(RecvRequest::new(buffers.pop().unwrap()).id(u64::MAX)).unwrap();
    qp.post_send(WorkRequest::send(buffers.pop().unwrap()).id(posted)).unwrap();
    buffers.extend(cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()));
    assert_eq!(buffers.len(), 64);
    assert_eq!(cq.credits_in_use(), 0);
}

/// Batches of every shape, one buffer or a list, signalled or not, more than fit or fewer: all come back, each once and in order of
/// posting, the buffers of each as they were given; and what ends a run completes it.
#[test]
fn batches_of_every_shape() {
    for (depth, entries) in [(8, 128), (8, 5), (5, 64)] {
        let (context, pd) = open();
        // With few entries the queues count what they may post, instead of having their depth reserved.
        let cq = context.completion_queue(entries).build().unwrap();
        let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(depth).max_recv(1).max_send_sge(3).build().unwrap();
        let endpoint = qp.endpoint(&EndpointOptions::default()).unwrap();
        let qp = qp.connect(&endpoint, &endpoint, &ConnectOptions::default()).unwrap();
        let target = pd.share(vec![0; 64], RemoteAccess::all()).unwrap();
        let mut idle: Vec<_> = pd.allocate(8 * 64).unwrap().into_buffers(8).collect();
        let mut completions = Completions::new();
        let (mut next, mut seen) = (0_u64, 0_u64);
        let mut given = VecDeque::new();
        let mut random = 1_u64;
        let mut rolls = move |sides: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % sides
        };
        for round in 0..3000 {
            let mut batch = Vec::new();
            for _ in 0..rolls(7) {
                let count = if rolls(4) == 0 { 3 } else { 1 };
                if idle.len() < count {
                    break;
                }
                let buffers: Vec<_> = (0..count).map(|_| idle.pop().unwrap()).collect();
                let addresses: Vec<_> = buffers.iter().map(|buffer| buffer.as_ptr().addr()).collect();
                let request = match <[Buffer; 1]>::try_from(buffers) {
                    Ok([buffer]) => WorkRequest::write(buffer, target.remote()),
                    Err(buffers) => WorkRequest::write(buffers, target.remote()),
                };
                given.push_back((next, addresses));
                let request = request.id(next);
                batch.push(if rolls(3) == 0 { request } else { request.unsignaled() });
                next += 1;
            }
            if let Err(kind) = qp.post_batch(&mut batch) {
                assert_eq!(kind, PostErrorKind::QueueFull);
            }
            // What did not fit is not posted, and the numbers are given to others.
            for request in batch.into_iter().rev() {
                next -= 1;
                let (number, addresses) = given.pop_back().unwrap();
                let buffers: Vec<_> = request.into_payload().into_buffers().collect();
                assert_eq!((number, buffers.len()), (next, addresses.len()), "round {round}");
                assert!(buffers.iter().map(|buffer| buffer.as_ptr().addr()).eq(addresses));
                idle.extend(buffers);
            }
            for mut completion in cq.poll(&mut completions).unwrap() {
                completion.result().unwrap();
                assert_eq!(completion.opcode(), Opcode::Write);
                let (number, addresses) = given.pop_front().unwrap();
                assert_eq!(completion.id(), number, "round {round}");
                let buffers: Vec<_> = completion.take_buffers().collect();
                assert!(buffers.iter().map(|buffer| buffer.as_ptr().addr()).eq(addresses));
                idle.extend(buffers);
                seen += 1;
            }
            assert_eq!(qp.send_queue().in_flight() as usize, given.len(), "round {round}");
        }
        assert!(seen > 3000, "{seen} of {next} came back");
        let last = WorkRequest::write(idle.pop().unwrap(), target.remote()).id(next);
        if let Err(refused) = qp.post_send(last) {
            assert_eq!(refused.kind, PostErrorKind::QueueFull);
            idle.extend(refused.request.into_payload().into_buffers());
        }
        idle.extend(
            cq.poll(&mut completions).unwrap().flat_map(|mut c| c.take_buffers().collect::<Vec<_>>()),
        );
        assert_eq!((idle.len(), qp.send_queue().in_flight()), (64, 0));
        assert_eq!(cq.credits_in_use(), 0);
        assert_eq!(cq.stray_completions(), 0);
    }
}

/// A pair that keeps places for its receives can post them all, however many sends take what else there is.
#[test]
fn kept_receives_have_their_places() {
    let (context, pd) = open();
    let cq = context.completion_queue(10).build().unwrap();
    let depth = cq.depth();
    let builder = || pd.queue_pair::<Rc>(&cq, &cq).max_send(depth);
    let connect = |qp: QueuePair<Rc, Reset>| {
        let endpoint = qp.endpoint(&EndpointOptions::default()).unwrap();
        qp.connect(&endpoint, &endpoint, &ConnectOptions::default()).unwrap()
    };
    let target = pd.share(vec![0; 8], RemoteAccess::all()).unwrap();
    let mut buffers: Vec<_> = pd.allocate(8 * 64).unwrap().into_buffers(8).collect();
    let mut completions = Completions::new();
    let places = cq.keep_places(5);
    assert!(places.is_ready());
    let error = builder().max_recv(6).keep_receives(&places).build().unwrap_err();
    assert!(matches!(error, rdma_core::Error::InUse { .. }), "{error}");
    let qp = connect(builder().max_recv(4).keep_receives(&places).build().unwrap());
    // One was more than it needed.
    drop(places);
    assert_eq!(cq.credits_in_use(), 0);
    for _ in 0..3 {
        let mut sends = 0;
        loop {
            let request = WorkRequest::write(buffers.pop().unwrap(), target.remote());
            match qp.post_send(request) {
                Ok(()) => sends += 1,
                Err(refused) => {
                    assert_eq!(refused.kind, PostErrorKind::QueueFull);
                    buffers.extend(refused.request.into_payload().into_buffers());
                    break;
                }
            }
        }
        assert_eq!(sends, depth - 4);
        for _ in 0..4 {
            qp.post_recv(buffers.pop().unwrap()).unwrap();
        }
        assert_eq!(cq.credits_in_use(), depth);
        let done: Vec<_> = cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()).collect();
        assert_eq!(done.len(), sends as usize);
        buffers.extend(done);
        // As many sends as receives: they take them.
        for _ in 0..4 {
            qp.post_send(buffers.pop().unwrap()).unwrap();
        }
        let done: Vec<_> = cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()).collect();
        assert_eq!((done.len(), cq.credits_in_use()), (8, 0));
        buffers.extend(done);
    }
    // What is in flight when it goes comes back, and the places with it.
    qp.post_recv(buffers.pop().unwrap()).unwrap();
    drop(qp);
    buffers.extend(cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()));
    let _ = cq.poll(&mut completions).unwrap().len();
    assert_eq!((buffers.len(), cq.credits_in_use()), (64, 0));
    let places = cq.keep_places(depth);
    drop(builder().max_recv(depth).keep_receives(&places).build().unwrap());
    let _ = cq.poll(&mut completions).unwrap().len();
    // However many are asked for, nobody gets more than there are.
    drop(places);
    let many = [u32::MAX, u32::MAX, depth + 1, 1].map(|count| cq.keep_places(count));
    for places in &many {
        for receives in [1, depth + 1] {
            assert!(builder().max_recv(receives).keep_receives(places).build().is_err());
        }
    }
    drop(many);
    assert_eq!(cq.credits_in_use(), 0);
}

/// Places that are kept while requests in flight have them are handed over when these complete, and to nobody else.
#[test]
fn places_are_handed_over() {
    let (context, pd) = open();
    let cq = context.completion_queue(10).build().unwrap();
    let depth = cq.depth();
    let qp = pair(&pd, &cq, 2 * depth);
    let target = pd.share(vec![0; 8], RemoteAccess::all()).unwrap();
    let mut buffers: Vec<_> = pd.allocate(8 * 64).unwrap().into_buffers(8).collect();
    let mut completions = Completions::new();
    let write = |buffers: &mut Vec<Buffer>| {
        let posted = qp.post_send(WorkRequest::write(buffers.pop().unwrap(), target.remote()));
        posted.map_err(|refused| buffers.extend(refused.request.into_payload().into_buffers())).is_ok()
    };
    let mut in_flight = 0;
    while write(&mut buffers) {
        in_flight += 1;
    }
    assert_eq!(in_flight, depth);
    let places = cq.keep_places(4);
    assert!(!places.is_ready());
    let builder = || pd.queue_pair::<Rc>(&cq, &cq).max_recv(4).keep_receives(&places);
    assert!(matches!(builder().build().unwrap_err(), rdma_core::Error::InUse { .. }));
    let done: Vec<_> = cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()).collect();
    assert_eq!(done.len(), depth as usize);
    buffers.extend(done);
    assert!(places.is_ready());
    drop(builder().build().unwrap());
    let _ = cq.poll(&mut completions).unwrap().len();
    // Given up, they go to whoever waits.
    while write(&mut buffers) {}
    let places = cq.keep_places(1);
    buffers.extend(cq.poll(&mut completions).unwrap().filter_map(|mut c| c.take_buffer()));
    assert_eq!((0..=depth).filter(|_| write(&mut buffers)).count(), depth as usize - 1);
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&flag));
    assert!(qp.send_queue().poll_ready(&mut TaskContext::from_waker(&waker)).is_pending());
    drop(places);
    assert!(flag.0.load(Ordering::SeqCst));
    assert!(write(&mut buffers));
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Whoever waits for a credit is woken by the poll that returns one, also while others try to take more than there are.
#[test]
fn who_waits_for_a_credit_is_woken_whatever_others_try() {
    let (context, pd) = open();
    let cq = context.completion_queue(4).build().unwrap();
    let (one, two) = (pair(&pd, &cq, 64), pair(&pd, &cq, 64));
    let srq = pd.shared_receive_queue(1000, 1).unwrap();
    let target = pd.share(vec![0; 8], RemoteAccess::all()).unwrap();
    let mut buffers: Vec<_> = pd.allocate(8 * 64).unwrap().into_buffers(8).collect();
    let mut completions = Completions::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let refused = pd.queue_pair::<Rc>(&cq, &cq).shared_receive_queue(&srq).build();
                assert!(matches!(refused.unwrap_err(), rdma_core::Error::InUse { .. }));
            }
        });
        let begin = Instant::now();
        let mut lost = 0;
        while begin.elapsed() < Duration::from_secs(1) {
            while let Some(buffer) = buffers.pop() {
                if let Err(refused) = one.post_send(WorkRequest::write(buffer, target.remote())) {
                    buffers.extend(refused.request.into_payload().into_buffers());
                    break;
                }
            }
            let flag = Arc::new(Flag::default());
            let waker = Waker::from(Arc::clone(&flag));
            if two.send_queue().poll_ready(&mut TaskContext::from_waker(&waker)).is_ready() {
                continue;
            }
            while buffers.len() < 64 {
                let lent = cq.poll(&mut completions).unwrap();
                buffers.extend(lent.filter_map(|mut completion| completion.take_buffer()));
            }
            lost += u32::from(!flag.0.load(Ordering::SeqCst));
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(lost, 0);
    });
}
