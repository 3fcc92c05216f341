//! The safety bar on a device that misbehaves.

#![cfg(feature = "test-providers")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

use std::time::Duration;

use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::Rc;
use rdma_core::{
    CompletionClock, CompletionQueue, Completions, ConnectOptions, Context, Device, EndpointOptions, Error,
    PostErrorKind, ProtectionDomain, QueuePair, RecvRequest, RegionFlags, RemoteAccess, WindowType,
    WorkRequest,
};
use verbs_sys::evil::{self, Evil, Slot};
use verbs_sys::{ibv_port_state, ibv_wc_opcode, ibv_wc_status};

struct Rig {
    evil: &'static Evil,
    context: Context,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    qp: QueuePair<Rc, Rts>,
}

fn rig() -> Rig {
    let evil = evil::device();
    let context = Device::evil(evil.name()).unwrap().open().unwrap();
    let pd = context.protection_domain().unwrap();
    let cq = context.completion_queue(16).build().unwrap();
    let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(4).max_recv(4).build().unwrap();
    let local = qp.endpoint(&EndpointOptions::default()).unwrap();
    let qp = qp.connect(&local, &local, &ConnectOptions::default()).unwrap();
    Rig { evil, context, pd, cq, qp }
}

impl Rig {
    fn buffer(&self) -> rdma_core::Buffer {
        self.pd.allocate(64).unwrap().into_buffer()
    }
}

/// Point 3: values that no header names come through as themselves.
#[test]
fn point_03_unknown_enum_values_are_values() {
    let rig = rig();
    rig.evil.completion.tell(|wc| {
        wc.status = ibv_wc_status(99);
        wc.opcode = ibv_wc_opcode(12345);
    });
    rig.qp.post_send(rig.buffer()).unwrap();
    let mut completions = Completions::new();
    let mut polled = rig.cq.poll(&mut completions).unwrap();
    let mut completion = polled.next().unwrap();
    let error = completion.result().unwrap_err();
    assert_eq!(error.status().code(), 99);
    assert!(error.to_string().contains("99"), "{error}");
    assert!(completion.take_buffer().is_some());
    rig.evil.port.tell(|port| port.state = ibv_port_state(77));
    assert_eq!(rig.context.port(1).unwrap().state, rdma_core::PortState::Unknown(77));
}

/// Point 4: what the provider lacks is an error that names it.
#[test]
fn point_04_missing_slots_are_errors() {
    let evil = evil::device();
    for slot in [Slot::PollCq, Slot::PostSend, Slot::PostRecv, Slot::AllocMw, Slot::ReqNotifyCq] {
        evil.remove(slot);
    }
    let context = Device::evil(evil.name()).unwrap().open().unwrap();
    let pd = context.protection_domain().unwrap();
    let cq = context.completion_queue(16).build().unwrap();
    assert!(cq.poll(&mut Completions::new()).is_err());
    assert!(cq.dispatch().is_err());
    assert!(matches!(cq.arm(rdma_core::Notify::Any), Err(Error::Unsupported { verb: "ibv_req_notify_cq" })));
    let window = pd.memory_window(rdma_core::WindowType::Two);
    assert!(matches!(window, Err(Error::Unsupported { verb: "ibv_alloc_mw" })), "{window:?}");
    let qp = pd.queue_pair::<Rc>(&cq, &cq).build().unwrap();
    let local = qp.endpoint(&EndpointOptions::default()).unwrap();
    let qp = qp.connect(&local, &local, &ConnectOptions::default()).unwrap();
    let refused = qp.post_send(pd.allocate(8).unwrap().into_buffer()).unwrap_err();
    assert_eq!(refused.request.into_payload().into_buffers().count(), 1);
    let refused = qp.post_recv(pd.allocate(8).unwrap().into_buffer()).unwrap_err();
    assert_eq!(refused.request.into_payload().into_buffers().count(), 1);
    let mut batch = vec![RecvRequest::new(pd.allocate(8).unwrap().into_buffer())];
    assert!(qp.post_recv_batch(&mut batch).is_err());
    assert_eq!(batch.pop().unwrap().into_payload().into_buffers().count(), 1);
    assert_eq!(cq.credits_in_use(), 0);
}

/// Point 6: memory whose deregistration fails is leaked, and said to be.
#[test]
fn point_06_failed_deregistration_leaks() {
    let rig = rig();
    let before = rdma_core::leaks();
    rig.evil.dereg_mr.fail(libc::EBUSY);
    drop(rig.buffer());
    assert!(rdma_core::leaks() > before);
    rig.evil.dereg_mr.work();
}

/// Point 7: a poll that fails frees nothing.
#[test]
fn point_07_failed_polls_are_errors() {
    let rig = rig();
    let operation = rig.qp.start_send(rig.buffer()).unwrap();
    rig.evil.poll_cq.fail(libc::EIO);
    let mut completions = Completions::new();
    assert!(rig.cq.poll(&mut completions).is_err());
    let (error, operation) = operation.wait(Duration::ZERO).unwrap_err();
    assert!(matches!(error, Error::Poll(_)), "{error}");
    rig.evil.poll_cq.work();
    rig.evil.poll_count.tell(|n| *n = 1000);
    assert!(rig.cq.poll(&mut completions).is_err());
    rig.evil.poll_count.stop();
    assert_eq!(rig.cq.credits_in_use(), 1);
    drop(operation);
}

/// Of a pair that is destroyed, what was in flight comes back though its queue cannot be read; then the error is told again.
#[test]
fn point_07_what_a_pair_left_comes_back_from_a_queue_that_fails() {
    let rig = rig();
    rig.qp.post_recv(RecvRequest::new(rig.buffer()).id(5)).unwrap();
    let Rig { cq, qp, evil, .. } = rig;
    evil.poll_cq.fail(libc::EIO);
    drop(qp);
    let mut completions = Completions::new();
    let ids: Vec<u64> = cq.poll(&mut completions).unwrap().map(|c| c.id()).collect();
    assert_eq!(ids, [5]);
    assert!(cq.poll(&mut completions).is_err());
}

/// Point 12: completions that come twice, or from nowhere, are counted and dropped.
#[test]
fn point_12_stray_and_repeated_completions() {
    let rig = rig();
    let mut completions = Completions::new();
    for round in 1..10 {
        rig.evil.repeat(1);
        rig.qp.post_send(WorkRequest::send(rig.buffer()).id(round)).unwrap();
        let ids: Vec<u64> = rig.cq.poll(&mut completions).unwrap().map(|c| c.id()).collect();
        assert_eq!(ids, [round]);
        let more = rig.cq.poll(&mut completions).unwrap().len();
        assert_eq!(more, 0);
    }
    assert!(rig.cq.stray_completions() > 0);
    // Each `wr_id` that a queue, slot or generation could have, and many that none has.
    rig.qp.post_recv(RecvRequest::new(rig.buffer()).id(77)).unwrap();
    rig.evil.replay();
    let _ = rig.cq.poll(&mut completions).unwrap().len();
    assert_eq!(rig.qp.recv_queue().in_flight(), 1);
    drop(rig);
}

/// Point 8, and its like: a post that fails gives everything back, whatever it says.
#[test]
fn point_08_failed_posts_give_the_request_back() {
    let rig = rig();
    let calls = rig.evil.post_send.calls();
    assert_eq!(rig.qp.post_batch(&mut Vec::new()), Ok(0));
    assert_eq!(rig.evil.post_send.calls(), calls, "a batch of nothing does not reach the provider");
    for errno in [libc::EINVAL, libc::EIO, 12345] {
        rig.evil.post_send.fail_times(1, errno);
        let refused = rig.qp.post_send(rig.buffer()).unwrap_err();
        assert!(refused.to_string().contains("ibv_post_send"), "{refused}");
        assert_eq!(refused.request.into_payload().into_buffers().count(), 1);
    }
    // ENOMEM is back-pressure, never an error of its own.
    rig.evil.post_send.fail_times(1, libc::ENOMEM);
    let refused = rig.qp.post_send(rig.buffer()).unwrap_err();
    assert_eq!(refused.kind, rdma_core::PostErrorKind::QueueFull);
    assert_eq!(rig.cq.credits_in_use(), 0);
    // A chain that breaks in the middle.
    rig.evil.post_send.fail_after(2, libc::EINVAL);
    let mut batch: Vec<_> = (0..4).map(|id| WorkRequest::send(rig.buffer()).id(id).unsignaled()).collect();
    assert!(rig.qp.post_batch(&mut batch).is_err());
    assert_eq!(batch.len(), 2);
    rig.evil.post_send.work();
    rig.qp.post_send(WorkRequest::send(rig.buffer()).id(9)).unwrap();
    let mut completions = Completions::new();
    let ids: Vec<u64> = rig.cq.poll(&mut completions).unwrap().map(|c| c.id()).collect();
    assert_eq!(ids, [0, 1, 9]);
    assert_eq!(rig.cq.credits_in_use(), 0);
    // One of receives: plain ones, and one that is a list.
    for is_list in [false, true] {
        rig.evil.post_recv.fail_after(2, libc::EINVAL);
        let request = |id: u64| match is_list && id % 2 == 1 {
            true => RecvRequest::new([rig.buffer()]).id(id),
            false => RecvRequest::new(rig.buffer()).id(id),
        };
        let mut batch: Vec<_> = (0..4).map(request).collect();
        let refused = rig.qp.post_recv_batch(&mut batch).unwrap_err();
        assert!(refused.to_string().contains("ibv_post_recv"), "{refused}");
        assert_eq!(rig.qp.recv_queue().in_flight(), 2);
        rig.evil.post_recv.work();
        assert_eq!(rig.qp.post_recv_batch(&mut batch), Ok(2), "they have their memory still");
        for _ in 0..4 {
            rig.qp.post_send(WorkRequest::send(rig.buffer())).unwrap();
        }
        let mut ids = Vec::new();
        while ids.len() < 4 {
            let received = |c: &rdma_core::Completion<'_>| c.opcode() == rdma_core::Opcode::Recv;
            ids.extend(rig.cq.poll(&mut completions).unwrap().filter(received).map(|c| c.id()));
        }
        assert_eq!(ids, [0, 1, 2, 3]);
    }
}

/// Point 8: of a chain whose post fails without a word of where, the device may have any part: all stays posted until the pair goes.
#[test]
fn point_08_a_chain_that_is_refused_without_a_place() {
    let Rig { evil, pd, cq, qp, .. } = rig();
    let buffer = || pd.allocate(64).unwrap().into_buffer();
    evil.omit_bad_wr(true);
    evil.post_send.fail_after(2, libc::EINVAL);
    evil.post_recv.fail_after(1, libc::EINVAL);
    evil.hold();
    let mut sends: Vec<_> = (0..4).map(|id| WorkRequest::send(buffer()).id(id)).collect();
    let mut receives: Vec<_> = (0..4).map(|id| RecvRequest::new(buffer()).id(10 + id)).collect();
    let refused = [qp.post_batch(&mut sends), qp.post_recv_batch(&mut receives)];
    for refused in refused {
        assert!(matches!(refused, Err(PostErrorKind::Unclear { errno: libc::EINVAL, .. })), "{refused:?}");
    }
    assert!(sends.is_empty() && receives.is_empty());
    assert_eq!((qp.send_queue().in_flight(), qp.recv_queue().in_flight()), (4, 4));
    drop(qp);
    evil.release();
    let mut completions = Completions::new();
    let mut back = Vec::new();
    while back.len() < 8 {
        back.extend(cq.poll(&mut completions).unwrap().map(|mut c| (c.id(), c.take_buffer().is_some())));
    }
    back.sort_unstable();
    assert_eq!(back, [0, 1, 2, 3, 10, 11, 12, 13].map(|id| (id, true)));
    assert_eq!(cq.credits_in_use(), 0);
}

/// A chain of one is that one, whatever the provider says.
#[test]
fn point_08_a_chain_of_one_that_is_refused_without_a_place() {
    let rig = rig();
    rig.evil.omit_bad_wr(true);
    rig.evil.post_send.fail_times(1, libc::EINVAL);
    rig.evil.post_recv.fail_times(1, libc::EINVAL);
    let mut sends = vec![WorkRequest::send(rig.buffer())];
    let mut receives = vec![RecvRequest::new(rig.buffer())];
    for refused in [rig.qp.post_batch(&mut sends), rig.qp.post_recv_batch(&mut receives)] {
        assert!(matches!(refused, Err(PostErrorKind::Verb { .. })), "{refused:?}");
    }
    assert_eq!(sends.pop().unwrap().into_payload().into_buffers().count(), 1);
    assert_eq!(receives.pop().unwrap().into_payload().into_buffers().count(), 1);
    assert_eq!(rig.cq.credits_in_use(), 0);
}

/// Point 1: a destroy that fails leaks the pair, its slots and their buffers.
#[test]
fn point_01_failed_destroy_leaks_what_is_posted() {
    let rig = rig();
    let before = rdma_core::leaks();
    rig.qp.post_recv(rig.buffer()).unwrap();
    rig.evil.destroy_qp.fail(libc::EBUSY);
    let (evil, calls) = (rig.evil, rig.evil.dereg_mr.calls());
    drop(rig);
    assert!(rdma_core::leaks() > before);
    assert_eq!(evil.dereg_mr.calls(), calls, "the posted buffer is still registered");
}

/// Point 1: work in flight that the device holds back, and every handle gone: what the device may still touch is
/// there (a sanitizer sees `scribble` reach freed memory), and in the end every object was destroyed once.
#[test]
fn point_01_the_device_touches_only_what_is_kept() {
    for keeps in [false, true] {
        let rig = rig();
        let evil = rig.evil;
        evil.keep_completions(keeps);
        evil.hold();
        rig.qp.post_recv(rig.buffer()).unwrap();
        drop(rig.qp.start_recv(rig.buffer()).unwrap());
        std::mem::forget(rig.qp.start_recv(rig.buffer()).unwrap());
        let kept = rig.qp.start_recv(rig.buffer()).unwrap().detach();
        assert_eq!(evil.scribble(), 4 * 64);
        let Rig { context, pd, cq, qp, .. } = rig;
        drop((context, pd));
        assert_eq!(evil.scribble(), 4 * 64);
        drop(qp);
        assert_eq!(evil.scribble(), 0, "a destroyed pair touches nothing");
        evil.release();
        assert!(kept.wait(Duration::from_secs(5)).unwrap().result().unwrap_err().is_flush());
        drop(cq);
        // The operation that was forgotten keeps its buffer for ever, and so the region, its domain and the context.
        assert_eq!(evil.live_objects(), 3);
    }
}

/// Point 9: an address handle, a window and a region live until the work request that names them is done.
#[test]
fn point_09_what_a_request_names_is_destroyed_after_it() {
    let rig = rig();
    let shared = rig.pd.share_with(vec![0; 64], RemoteAccess::empty(), RegionFlags::WINDOWS).unwrap();
    let window = rig.pd.memory_window(WindowType::Two).unwrap();
    let (bind, _) = window.bind(&shared.slice(..).unwrap(), RemoteAccess::WRITE).unwrap();
    drop((window, shared));
    rig.evil.hold();
    rig.qp.post_send(bind).unwrap();
    assert_eq!(rig.evil.dealloc_mw.calls() + rig.evil.dereg_mr.calls(), 0);
    rig.evil.release();
    let mut completions = Completions::new();
    assert_eq!(rig.cq.poll(&mut completions).unwrap().len(), 1);
    assert_eq!((rig.evil.dealloc_mw.calls(), rig.evil.dereg_mr.calls()), (1, 1));
}

/// Point 13: completions that are lost all the same, as when a queue overran, free nothing and hang nobody.
#[test]
fn point_13_lost_completions_keep_their_memory() {
    let rig = rig();
    rig.evil.lose(4);
    let operation = rig.qp.start_send(rig.buffer()).unwrap();
    for _ in 0..3 {
        rig.qp.post_send(rig.buffer()).unwrap();
    }
    let (error, operation) = operation.wait(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert_eq!(rig.qp.post_send(rig.buffer()).unwrap_err().kind, PostErrorKind::QueueFull);
    assert_eq!(rig.evil.dereg_mr.calls(), 1, "only the buffer that was refused");
    let operation = operation.detach();
    let evil = rig.evil;
    drop(rig);
    assert!(operation.wait(Duration::from_secs(5)).unwrap().result().unwrap_err().is_flush());
    assert_eq!(evil.live_objects(), 0);
}

/// Point 13: a provider that says it granted fewer entries, or none.
#[test]
fn point_13_a_completion_queue_of_no_entries_takes_no_work() {
    for granted in [0, -1, 3] {
        let rig = rig();
        rig.evil.cqe.tell(move |cqe| *cqe = granted);
        let cq = rig.context.completion_queue(3).build().unwrap();
        let qp = rig.pd.queue_pair::<Rc>(&cq, &cq).build().unwrap();
        let local = qp.endpoint(&EndpointOptions::default()).unwrap();
        let qp = qp.connect(&local, &local, &ConnectOptions::default()).unwrap();
        let room = if granted == 0 { 0 } else { 3 };
        for _ in 0..room {
            qp.post_recv(rig.buffer()).unwrap();
        }
        assert_eq!(qp.post_recv(rig.buffer()).unwrap_err().kind, PostErrorKind::QueueFull);
        assert_eq!(qp.post_send(rig.buffer()).unwrap_err().kind, PostErrorKind::QueueFull);
    }
}

/// Point 6, and its like: a change of access that fails gives the region back, which is deregistered once.
#[test]
fn point_06_a_failed_change_of_access_gives_the_region_back() {
    let rig = rig();
    let shared = rig.pd.share(vec![7; 64], RemoteAccess::READ).unwrap();
    rig.evil.rereg_mr.fail_times(1, libc::EIO);
    let (error, shared) = shared.change_access(RemoteAccess::WRITE).unwrap_err();
    assert!(error.to_string().contains("ibv_rereg_mr"), "{error}");
    assert_eq!(shared.access(), RemoteAccess::READ);
    let shared = shared.change_access(RemoteAccess::WRITE).unwrap();
    assert_eq!(shared.access(), RemoteAccess::WRITE);
    drop(shared);
    assert_eq!(rig.evil.dereg_mr.calls(), 1);
}

/// Point 4: completions with timestamps where the provider has no extended queues.
#[test]
fn point_04_no_timestamps_without_extended_queues() {
    let rig = rig();
    let refused = rig.context.completion_queue(4).timestamps(CompletionClock::Device).build();
    assert!(matches!(refused, Err(Error::Unsupported { verb: "ibv_create_cq_ex" })), "{refused:?}");
    assert!(matches!(rig.context.clock(), Err(Error::Unsupported { verb: "ibv_query_rt_values_ex" })));
}
