//! Each knob of the evil provider does what it says, and only on its own device.

mod rig;

use core::ptr;

use rig::{Completion, Plan, Request, Rig, SIGNALED, State, Status, open, request};
use verbs_sys::evil::{self, Evil, Slot};
use verbs_sys::inline::{errno, ibv_alloc_mw, ibv_query_device_ex, ibv_query_port_ex};
use verbs_sys::{
    ibv_device_attr_ex, ibv_event_type, ibv_gid, ibv_mw_type, ibv_port_attr, ibv_port_state, ibv_sge,
};

fn ready(evil: &Evil, plan: &Plan) -> Rig {
    Rig::ready(evil::verbs(), evil.name(), plan)
}

fn send(rig: &Rig, wr_id: u64) -> i32 {
    rig.send(request(wr_id, Request::IBV_WR_RDMA_WRITE, SIGNALED), 8)
}

#[test]
fn it_is_honest_until_told_otherwise() {
    let evil = evil::device();
    let rig = ready(evil, &Plan { channel: true, srq: true, ..Plan::default() });
    rig.arm(false);
    assert_eq!(rig.receive(1, 8), 0);
    assert_eq!(rig.send(request(2, Request::IBV_WR_SEND, SIGNALED), 8), 0);
    assert_eq!(rig.statuses(), [(1, Status::IBV_WC_SUCCESS), (2, Status::IBV_WC_SUCCESS)]);
    assert!(rig.has_event());
    assert_eq!(evil.live_objects(), 6);
    rig.close();
    assert_eq!(evil.live_objects(), 0);
}

#[test]
fn faults_strike_as_planned_and_leave_objects_alive() {
    let evil = evil::device();
    let bystander = evil::device();
    let rig = ready(evil, &Plan::default());
    let other = ready(bystander, &Plan::default());
    let mut memory = [0_u8; 8];
    // SAFETY: a live domain; this provider does not touch the memory.
    let mut register = || unsafe { (rig.verbs.ibv_reg_mr)(rig.pd, ptr::from_mut(&mut memory).cast(), 8, 0) };
    evil.reg_mr.fail_times(1, libc::ENOMEM);
    assert!(register().is_null());
    assert_eq!(errno(), libc::ENOMEM);
    let region = register();
    assert!(!region.is_null());
    evil.dereg_mr.fail_times(2, libc::EBUSY);
    // SAFETY: the region is live: the first two calls fail.
    let deregister = || unsafe { (rig.verbs.ibv_dereg_mr)(region) };
    assert_eq!([deregister(), deregister()], [libc::EBUSY; 2]);
    // SAFETY: the region keeps its domain busy.
    assert_eq!(unsafe { (rig.verbs.ibv_dealloc_pd)(rig.pd) }, libc::EBUSY);
    assert_eq!(deregister(), 0);
    assert_eq!(evil.dereg_mr.calls(), 3);

    evil.destroy_qp.fail(libc::EBUSY);
    // SAFETY: the pair is live: the call fails.
    assert_eq!(unsafe { (rig.verbs.ibv_destroy_qp)(rig.qp) }, libc::EBUSY);
    assert_eq!(send(&rig, 1), 0, "the pair is as it was");
    assert_eq!(send(&other, 1), 0);
    evil.destroy_qp.work();
    other.close();
    rig.close();
    assert_eq!(bystander.destroy_qp.calls(), 1);
}

#[test]
fn creation_fails_with_null() {
    let evil = evil::device();
    let rig = ready(evil, &Plan::default());
    evil.create_qp.fail(libc::EINVAL);
    evil.create_cq.fail(0);
    // SAFETY: live objects; the attributes are not read by a call that fails.
    assert!(unsafe { (rig.verbs.ibv_create_qp)(rig.pd, ptr::null_mut()) }.is_null());
    assert_eq!(errno(), libc::EINVAL);
    // SAFETY: a live context.
    let cq = unsafe { (rig.verbs.ibv_create_cq)(rig.context, 1, ptr::null_mut(), ptr::null_mut(), 0) };
    assert!(cq.is_null());
    assert_eq!(errno(), 0);
    rig.close();
    evil.open_device.fail(libc::EACCES);
    assert!(open(evil::verbs(), evil.name()).is_null());
}

#[test]
fn a_transition_fails_and_can_be_tried_again() {
    let evil = evil::device();
    let rig = Rig::new(evil::verbs(), evil.name(), &Plan::default());
    assert_eq!(rig.modify(State::IBV_QPS_INIT), 0);
    evil.modify_qp.fail_times(1, libc::ETIMEDOUT);
    assert_eq!(rig.modify(State::IBV_QPS_RTR), libc::ETIMEDOUT);
    assert_eq!(rig.state(), State::IBV_QPS_INIT);
    assert_eq!(rig.modify(State::IBV_QPS_RTR), 0);
    evil.qp_attr.tell(|attr| attr.qp_state = State(77));
    assert_eq!(rig.state(), State(77));
    rig.close();
}

#[test]
fn a_chain_breaks_in_the_middle() {
    let evil = evil::device();
    let rig = ready(evil, &Plan::default());
    let chain = || [1, 2, 3].map(|id| request(id, Request::IBV_WR_RDMA_WRITE, SIGNALED));
    evil.post_send.fail_after(1, libc::ENOMEM);
    assert_eq!(rig.post(&mut chain()), (libc::ENOMEM, Some(1)));
    assert_eq!(rig.statuses(), [(1, Status::IBV_WC_SUCCESS)]);
    evil.omit_bad_wr(true);
    assert_eq!(rig.post(&mut chain()), (libc::ENOMEM, None));
    evil.post_send.work();
    assert_eq!(rig.post(&mut chain()), (0, None));
    evil.post_recv.fail(libc::EINVAL);
    assert_eq!(rig.receive(1, 1), libc::EINVAL);
    rig.close();
}

#[test]
fn completions_lie_repeat_vanish_and_come_from_nowhere() {
    let evil = evil::device();
    let rig = ready(evil, &Plan::default());
    evil.completion.tell(|wc| {
        wc.status = Status(99);
        wc.opcode = Completion(0xdead);
    });
    evil.repeat(2);
    assert_eq!(send(&rig, 1), 0);
    let wc = rig.poll();
    assert_eq!(wc.len(), 3);
    assert!(wc.iter().all(|wc| (wc.wr_id, wc.status, wc.opcode) == (1, Status(99), Completion(0xdead))));
    evil.repeat(0);
    evil.completion.stop();

    evil.lose(1);
    assert_eq!([send(&rig, 2), send(&rig, 3)], [0; 2]);
    assert_eq!(rig.statuses(), [(3, Status::IBV_WC_SUCCESS)]);

    evil.inject(verbs_sys::ibv_wc { wr_id: 0xffff, qp_num: 7, ..Default::default() });
    assert_eq!(rig.statuses(), [(0xffff, Status::IBV_WC_SUCCESS)]);
    rig.close();
}

#[test]
fn completions_outlive_their_pair() {
    let evil = evil::device();
    let verbs = evil::verbs();
    evil.keep_completions(true);
    let rig = ready(evil, &Plan::default());
    assert_eq!(send(&rig, 1), 0);
    // SAFETY: live; nothing refers to it.
    assert_eq!(unsafe { (verbs.ibv_destroy_qp)(rig.qp) }, 0);
    assert_eq!(rig.statuses(), [(1, Status::IBV_WC_SUCCESS)], "left in the queue, as on rxe");
    evil.replay();
    assert_eq!(rig.statuses(), [(1, Status::IBV_WC_SUCCESS)], "and once more");
    // SAFETY: live, and its pair is gone; so below.
    assert_eq!(unsafe { (verbs.ibv_destroy_cq)(rig.cq) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_dealloc_pd)(rig.pd) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_close_device)(rig.context) }, 0);
}

#[test]
fn polls_fail_and_count_wrongly() {
    let evil = evil::device();
    let rig = ready(evil, &Plan::default());
    assert_eq!(send(&rig, 1), 0);
    evil.poll_cq.fail_times(1, libc::EIO);
    assert_eq!(rig.poll_raw::<2>().0, -libc::EIO);
    evil.poll_count.tell(|count| *count += 1_000_000);
    let (count, wc) = rig.poll_raw::<2>();
    assert_eq!((count, wc[0].wr_id), (1_000_001, 1));
    rig.close();
}

#[test]
fn held_completions_come_with_an_event() {
    let evil = evil::device();
    let rig = ready(evil, &Plan { channel: true, ..Plan::default() });
    evil.hold();
    assert_eq!(send(&rig, 1), 0);
    assert_eq!(rig.statuses(), []);
    evil.release();
    assert_eq!(rig.take_event(), rig.cq);
    assert_eq!(rig.statuses(), [(1, Status::IBV_WC_SUCCESS)]);
    evil.ring_channels();
    assert!(rig.has_event(), "a spurious event");
    rig.acknowledge(1);
    rig.close();
}

#[test]
fn asynchronous_events_of_any_type() {
    let evil = evil::device();
    let rig = ready(evil, &Plan { srq: true, ..Plan::default() });
    for event in [
        ibv_event_type(1234),
        ibv_event_type::IBV_EVENT_QP_FATAL,
        ibv_event_type::IBV_EVENT_CQ_ERR,
        ibv_event_type::IBV_EVENT_SRQ_ERR,
        ibv_event_type::IBV_EVENT_PORT_ERR,
    ] {
        evil.raise(event);
        assert_eq!(rig.async_event(), Some(event));
        assert_eq!(rig.async_event(), None);
    }
    evil.raise(ibv_event_type::IBV_EVENT_QP_FATAL);
    rig.close();
}

#[test]
fn contexts_lack_slots() {
    let evil = evil::device();
    for slot in [Slot::PostSend, Slot::PollCq, Slot::AllocMw, Slot::QueryPort] {
        evil.remove(slot);
    }
    let rig = Rig::new(evil::verbs(), evil.name(), &Plan::default());
    assert_eq!(send(&rig, 1), libc::EOPNOTSUPP);
    assert_eq!(rig.poll_raw::<1>().0, -libc::EOPNOTSUPP);
    // SAFETY: a live domain.
    assert!(unsafe { ibv_alloc_mw(rig.pd, ibv_mw_type::IBV_MW_TYPE_1) }.is_null());
    assert_eq!(errno(), libc::EOPNOTSUPP);
    let mut port = ibv_port_attr::default();
    // SAFETY: a live context, a valid output pointer.
    assert_eq!(unsafe { ibv_query_port_ex(rig.context, 1, &raw mut port) }, None);
    rig.close();
}

#[test]
fn extended_contexts_can_be_missing_or_too_old() {
    for slot in [Slot::ExtendedContext, Slot::ExtendedSlots, Slot::QueryDeviceEx] {
        let evil = evil::device();
        evil.remove(slot);
        let rig = ready(evil, &Plan::default());
        let mut attr = ibv_device_attr_ex::default();
        // SAFETY: a live context, a valid output pointer.
        let result = unsafe { ibv_query_device_ex(rig.context, ptr::null(), &raw mut attr) };
        assert_eq!(result, libc::EOPNOTSUPP, "{slot:?}");
        rig.close();
    }
}

#[test]
fn queries_lie() {
    let evil = evil::device();
    evil.port.tell(|port| port.state = ibv_port_state(42));
    evil.gid.tell(|entry| entry.gid.raw = [9; 16]);
    evil.cqe.tell(|cqe| *cqe = -1);
    evil.qp_cap.tell(|cap| cap.max_send_wr = u32::MAX);
    evil.device_attr.tell(|attr| attr.phys_port_cnt = 255);
    let rig = ready(evil, &Plan::default());
    let mut port = ibv_port_attr::default();
    // SAFETY: a live context, a valid output pointer.
    assert_eq!(unsafe { ibv_query_port_ex(rig.context, 1, &raw mut port) }, Some(0));
    assert_eq!(port.state, ibv_port_state(42));
    let mut gid = ibv_gid { raw: [0; 16] };
    // SAFETY: as above.
    assert_eq!(unsafe { (rig.verbs.ibv_query_gid)(rig.context, 1, 0, &raw mut gid) }, 0);
    // SAFETY: the provider wrote it.
    assert_eq!(unsafe { gid.raw }, [9; 16]);
    // SAFETY: a live queue.
    assert_eq!(unsafe { (*rig.cq).cqe }, -1);
    let mut attr = ibv_device_attr_ex::default();
    // SAFETY: as above.
    assert_eq!(unsafe { ibv_query_device_ex(rig.context, ptr::null(), &raw mut attr) }, 0);
    assert_eq!(attr.orig_attr.phys_port_cnt, 255);
    rig.close();
}

#[test]
fn an_old_library_lacks_the_optional_functions() {
    let old = evil::old_verbs();
    assert!(
        old.ibv_query_gid_ex.is_none()
            && old.ibv_reg_mr_iova2.is_none()
            && old.ibv_get_device_index.is_none()
    );
    let evil = evil::device();
    Rig::ready(old, evil.name(), &Plan::default()).close();
}

#[test]
fn scribbling_touches_what_is_in_flight_and_nothing_else() {
    let evil = evil::device();
    let rig = ready(evil, &Plan::default());
    let mut memory = vec![0_u8; 32];
    let address = memory.as_mut_ptr();
    let access = verbs_sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0.cast_signed();
    // SAFETY: a live domain; the memory outlives the registration.
    let region = unsafe { (rig.verbs.ibv_reg_mr)(rig.pd, address.cast(), 32, access) };
    // SAFETY: a live region.
    let lkey = unsafe { (*region).lkey };
    let part = |at: usize| ibv_sge { addr: (address.expose_provenance() + at) as u64, length: 8, lkey };
    let bytes = |at: usize| -> u8 {
        // SAFETY: within the memory, which nobody writes right now.
        unsafe { *address.wrapping_add(at) }
    };

    assert_eq!(rig.receive_into(1, part(0)), 0);
    assert_eq!(rig.receive_into(2, part(8)), 0);
    assert_eq!(evil.scribble(), 16);
    assert_eq!([bytes(0), bytes(15), bytes(16)], [evil::SCRIBBLE, evil::SCRIBBLE, 0]);
    evil.hold();
    assert_eq!(rig.send_from(request(3, Request::IBV_WR_SEND, SIGNALED), part(16)), 0);
    assert_eq!(evil.scribble(), 24, "a completion that was not delivered ends nothing");
    assert_eq!(bytes(16), 0, "the buffer of a send is only read");
    evil.release();
    assert_eq!(rig.poll().len(), 2);
    assert_eq!(evil.scribble(), 8, "the second receive is left");
    assert_eq!(rig.modify(State::IBV_QPS_RESET), 0);
    assert_eq!(evil.scribble(), 0);

    assert_eq!(rig.modify(State::IBV_QPS_INIT), 0);
    assert_eq!(rig.receive_into(4, part(0)), 0);
    assert_eq!(evil.scribble(), 8);
    // SAFETY: live; a receive still names it.
    assert_eq!(unsafe { (rig.verbs.ibv_dereg_mr)(region) }, 0);
    assert_eq!(evil.scribble(), 0, "no registration, no access");
    rig.close();
}
