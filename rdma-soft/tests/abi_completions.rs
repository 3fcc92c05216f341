//! Completion queues that are too small, and events that wait for company, through the C interface.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::collections::HashSet;
use std::ptr;
use std::time::{Duration, Instant};

use common::*;
use verbs_sys::inline::*;
use verbs_sys::*;

fn async_event(end: &End) -> (ibv_event_type, *mut ibv_qp) {
    let mut event: ibv_async_event = zeroed();
    unsafe {
        assert_eq!((v().ibv_get_async_event)(end.context, &mut event), 0);
        (v().ibv_ack_async_event)(&mut event);
        (event.event_type, event.element.qp)
    }
}

fn state(qp: *mut ibv_qp) -> ibv_qp_state {
    let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) = (zeroed(), zeroed());
    assert_eq!(unsafe { (v().ibv_query_qp)(qp, &mut attr, -1, &mut init) }, 0);
    attr.qp_state
}

/// Sends that the receiver's queue of two has no room for; returns once they have completed at the sender.
fn overrun(a: &End, b: &End) {
    for i in 0..3 {
        assert_eq!(b.post_recv(i, 0, 100), 0);
        assert_eq!(a.send(i, 0, 8), 0);
    }
    for _ in 0..3 {
        a.wait_success();
    }
}

/// Clause 11.6.3.1: the queue can be used no more, and every queue pair that uses it fails.
/// RDMA/rxe: Fix rxe_cq_post
#[test]
fn an_overrun_fails_the_queue_and_its_pairs() {
    let options = Options { timeout: 8, retry: 1, ..Options::default() };
    let (a, b) = pair(options);
    // A second queue pair on the same queue, connected to nobody in particular.
    let other = unsafe {
        let mut init: ibv_qp_init_attr = zeroed();
        (init.send_cq, init.recv_cq, init.qp_type) = (b.cq, b.cq, ibv_qp_type::IBV_QPT_UD);
        init.cap =
            ibv_qp_cap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, ..zeroed() };
        (v().ibv_create_qp)(b.pd, &mut init)
    };
    let mut attr: ibv_qp_attr = zeroed();
    (attr.qp_state, attr.port_num) = (ibv_qp_state::IBV_QPS_INIT, 1);
    let mask = ibv_qp_attr_mask::IBV_QP_STATE
        | ibv_qp_attr_mask::IBV_QP_PKEY_INDEX
        | ibv_qp_attr_mask::IBV_QP_PORT
        | ibv_qp_attr_mask::IBV_QP_QKEY;
    assert_eq!(unsafe { (v().ibv_modify_qp)(other, &mut attr, mask.0 as i32) }, 0);
    unsafe { assert_eq!((v().ibv_resize_cq)(b.cq, 2), 0) };
    overrun(&a, &b);

    let (event, element) = async_event(&b);
    assert_eq!((event, element.cast()), (ibv_event_type::IBV_EVENT_CQ_ERR, b.cq));
    let failed: HashSet<_> = (0..2).map(|_| async_event(&b)).collect();
    let fatal = ibv_event_type::IBV_EVENT_QP_FATAL;
    assert_eq!(failed, HashSet::from([(fatal, b.qp), (fatal, other)]));
    assert_eq!((state(b.qp), state(other)), (ibv_qp_state::IBV_QPS_ERR, ibv_qp_state::IBV_QPS_ERR));

    // What waited is there, and nothing comes after it.
    assert_eq!((b.wait_success().wr_id, b.wait_success().wr_id), (0, 1));
    assert_eq!(b.send(7, 0, 8), 0);
    assert!((0..1000).all(|_| b.poll().is_none()));
    unsafe { assert_eq!((v().ibv_resize_cq)(b.cq, 100), libc::EINVAL) };
    // The peer finds nobody any more; its own queue is whole.
    assert_eq!(a.send(8, 0, 8), 0);
    assert_eq!(a.wait().status, ibv_wc_status::IBV_WC_RETRY_EXC_ERR);
    // The event is told once.
    set_nonblocking(unsafe { (*b.context).async_fd });
    let mut event: ibv_async_event = zeroed();
    assert_eq!(unsafe { (v().ibv_get_async_event)(b.context, &mut event) }, -1);
    assert_eq!(unsafe { (v().ibv_destroy_qp)(other) }, 0);
}

/// `IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN`: the latest stay, and nothing fails.
#[test]
fn an_overrun_that_is_ignored_forgets_the_oldest() {
    let (a, mut b) = (End::new(Options::default()), End::new(Options::default()));
    let mut init: ibv_cq_init_attr_ex = zeroed();
    init.cqe = 2;
    init.comp_mask = ibv_cq_init_attr_mask::IBV_CQ_INIT_ATTR_MASK_FLAGS.0;
    init.flags = ibv_create_cq_attr_flags::IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN.0;
    let mut qp_init: ibv_qp_init_attr = zeroed();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(b.qp), 0);
        assert_eq!((v().ibv_destroy_cq)(b.cq), 0);
        b.cq = ibv_create_cq_ex(b.context, &mut init).cast();
        (qp_init.send_cq, qp_init.recv_cq, qp_init.qp_type) = (b.cq, b.cq, ibv_qp_type::IBV_QPT_RC);
        qp_init.cap =
            ibv_qp_cap { max_send_wr: 8, max_recv_wr: 8, max_send_sge: 1, max_recv_sge: 1, ..zeroed() };
        b.qp = (v().ibv_create_qp)(b.pd, &mut qp_init);
    }
    assert!(!b.qp.is_null());
    a.connect(b.address());
    b.connect(a.address());
    overrun(&a, &b);
    assert_eq!((b.wait_success().wr_id, b.wait_success().wr_id), (1, 2));
    assert_eq!(state(b.qp), ibv_qp_state::IBV_QPS_RTS);
}

fn moderate(cq: *mut ibv_cq, cq_count: u16, cq_period: u16) -> i32 {
    let mask = ibv_cq_attr_mask::IBV_CQ_ATTR_MODERATE.0;
    let mut attr = ibv_modify_cq_attr { attr_mask: mask, moderate: ibv_moderate_cq { cq_count, cq_period } };
    unsafe { ibv_modify_cq(cq, &mut attr) }
}

/// Whether the channel has an event of the queue, which is taken then.
fn has_event(end: &End) -> bool {
    let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
    let code = unsafe { (v().ibv_get_cq_event)(end.channel, &mut cq, &mut context) };
    if code == 0 {
        unsafe { (v().ibv_ack_cq_events)(cq, 1) };
    }
    code == 0
}

#[test]
fn a_moderated_event_waits_for_its_count() {
    let (a, b) = pair(Options { events: true, ..Options::default() });
    set_nonblocking(unsafe { (*b.channel).fd });
    // As long as there is no limit of time that a slow machine could run into.
    let mut caps: ibv_device_attr_ex = zeroed();
    assert_eq!(unsafe { ibv_query_device_ex(b.context, ptr::null(), &mut caps) }, 0);
    let (most, longest) = (caps.cq_mod_caps.max_cq_count, caps.cq_mod_caps.max_cq_period);
    assert!(most >= 64 && longest >= 1000);
    assert_eq!(moderate(b.cq, most + 1, 1), libc::EINVAL);
    assert_eq!(moderate(b.cq, 1, longest + 1), libc::EINVAL);
    let mut unknown = ibv_modify_cq_attr { attr_mask: 2, ..zeroed() };
    assert_eq!(unsafe { ibv_modify_cq(b.cq, &mut unknown) }, libc::EOPNOTSUPP);

    // Several messages at once, so that the last is here long before the time is over: one event for all.
    for _ in 0..20 {
        assert_eq!(moderate(b.cq, 3, longest), 0);
        assert_eq!(unsafe { ibv_req_notify_cq(b.cq, 0) }, 0);
        let begin = Instant::now();
        for i in 0..2 {
            assert_eq!(b.post_recv(i, 0, 100), 0);
            assert_eq!(a.send(i, 0, 8), 0);
        }
        a.wait_success();
        a.wait_success();
        let early = has_event(&b);
        let in_time = begin.elapsed() < Duration::from_micros(longest.into());
        assert!(!early || !in_time, "two of three");
        assert_eq!(b.post_recv(2, 0, 100), 0);
        assert_eq!(a.send(2, 0, 8), 0);
        a.wait_success();
        assert!(early || has_event(&b), "three of three");
        assert_eq!([0; 3].map(|_| b.wait_success().wr_id), [0, 1, 2]);
        assert!(!has_event(&b));
    }
    assert_eq!(moderate(b.cq, 0, 0), 0);
    assert_eq!(unsafe { ibv_req_notify_cq(b.cq, 0) }, 0);
    assert_eq!(b.post_recv(1, 0, 100), 0);
    assert_eq!(a.send(1, 0, 8), 0);
    a.wait_success();
    assert!(has_event(&b), "without moderation the first is enough");
    b.wait_success();
}

/// A lone completion is announced when its time is over, with or without a limit by the program.
#[test]
fn a_moderated_event_does_not_wait_for_ever() {
    for period in [0, 500] {
        let (a, b) = pair(Options { events: true, ..Options::default() });
        assert_eq!(moderate(b.cq, 100, period), 0);
        assert_eq!(unsafe { ibv_req_notify_cq(b.cq, 0) }, 0);
        assert_eq!(b.post_recv(1, 0, 100), 0);
        assert_eq!(a.send(1, 0, 8), 0);
        let begin = Instant::now();
        a.wait_success();
        // Sleeps on the channel.
        assert!(has_event(&b));
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert_eq!(b.wait_success().wr_id, 1);
    }
}
