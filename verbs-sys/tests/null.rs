//! The null provider keeps the rules that it states.

mod rig;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rig::{Completion, DEPTH, Plan, Request, Rig, SIGNALED, SILENT, State, Status, request};
use verbs_sys::inline::ibv_query_port_ex;
use verbs_sys::{
    ibv_event_type, ibv_port_attr, ibv_port_state, ibv_qp_attr_mask, ibv_qp_type, ibv_send_flags,
    ibv_wc_flags, null,
};

fn ready(plan: &Plan) -> Rig {
    Rig::ready(null::verbs(), "null0", plan)
}

#[test]
fn send_takes_the_oldest_receive_of_its_own_pair() {
    let rig = ready(&Plan::default());
    assert_eq!(rig.receive(1, 64), 0);
    assert_eq!(rig.receive(2, 100), 0);
    let mut with_imm = request(11, Request::IBV_WR_SEND_WITH_IMM, SIGNALED);
    with_imm.__bindgen_anon_1.imm_data = 0xfeed_f00d;
    assert_eq!(rig.send(request(10, Request::IBV_WR_SEND, SIGNALED), 64), 0);
    assert_eq!(rig.send(with_imm, 7), 0);
    let wc = rig.poll();
    let seen: Vec<_> = wc.iter().map(|wc| (wc.wr_id, wc.opcode, wc.status)).collect();
    let ok = Status::IBV_WC_SUCCESS;
    assert_eq!(
        seen,
        [
            (1, Completion::IBV_WC_RECV, ok),
            (10, Completion::IBV_WC_SEND, ok),
            (2, Completion::IBV_WC_RECV, ok),
            (11, Completion::IBV_WC_SEND, ok)
        ]
    );
    assert_eq!((wc[0].byte_len, wc[0].wc_flags), (64, 0));
    assert_eq!((wc[2].byte_len, wc[2].wc_flags), (7, ibv_wc_flags::IBV_WC_WITH_IMM.0));
    // SAFETY: the flag says which field is set.
    assert_eq!(unsafe { wc[2].__bindgen_anon_1.imm_data }, 0xfeed_f00d);
    rig.close();
}

#[test]
fn one_sided_requests_complete_at_once_with_their_opcode() {
    let rig = ready(&Plan::default());
    for (opcode, expected) in [
        (Request::IBV_WR_RDMA_WRITE, Completion::IBV_WC_RDMA_WRITE),
        (Request::IBV_WR_RDMA_READ, Completion::IBV_WC_RDMA_READ),
        (Request::IBV_WR_ATOMIC_CMP_AND_SWP, Completion::IBV_WC_COMP_SWAP),
        (Request::IBV_WR_ATOMIC_FETCH_AND_ADD, Completion::IBV_WC_FETCH_ADD),
        (Request::IBV_WR_LOCAL_INV, Completion::IBV_WC_LOCAL_INV),
    ] {
        assert_eq!(rig.send(request(1, opcode, SIGNALED), 8), 0);
        assert_eq!(rig.poll()[0].opcode, expected);
    }
    assert_eq!(rig.receive(2, 0), 0);
    assert_eq!(rig.send(request(3, Request::IBV_WR_RDMA_WRITE_WITH_IMM, SIGNALED), 8), 0);
    let wc = rig.poll();
    assert_eq!((wc[0].wr_id, wc[0].opcode), (2, Completion::IBV_WC_RECV_RDMA_WITH_IMM));
    assert_eq!((wc[1].wr_id, wc[1].opcode), (3, Completion::IBV_WC_RDMA_WRITE));
    assert_eq!(rig.send(request(4, Request(99), SIGNALED), 8), libc::EINVAL);
    rig.close();
}

#[test]
fn a_polled_completion_frees_the_slots_before_it() {
    let rig = ready(&Plan::default());
    for i in 0..DEPTH - 1 {
        assert_eq!(rig.send(request(i.into(), Request::IBV_WR_SEND, SILENT), 1), 0);
    }
    assert_eq!(rig.send(request(9, Request::IBV_WR_SEND, SIGNALED), 1), 0);
    assert_eq!(rig.send(request(10, Request::IBV_WR_SEND, SIGNALED), 1), libc::ENOMEM);
    assert_eq!(rig.statuses(), [(9, Status::IBV_WC_SUCCESS)]);
    let mut chain = [request(0, Request::IBV_WR_SEND, SILENT); DEPTH as usize + 1];
    assert_eq!(rig.post(&mut chain), (libc::ENOMEM, Some(DEPTH as usize)));
    rig.close();
}

#[test]
fn a_full_receive_queue_is_enomem() {
    for srq in [false, true] {
        let rig = ready(&Plan { srq, ..Plan::default() });
        for i in 0..DEPTH {
            assert_eq!(rig.receive(i.into(), 8), 0);
        }
        assert_eq!(rig.receive(9, 8), libc::ENOMEM);
        rig.close();
    }
}

#[test]
fn err_flushes_what_was_posted_and_what_comes() {
    let rig = ready(&Plan::default());
    assert_eq!(rig.receive(1, 8), 0);
    assert_eq!(rig.modify(State::IBV_QPS_ERR), 0);
    assert_eq!(rig.receive(2, 8), 0);
    assert_eq!(rig.send(request(3, Request::IBV_WR_SEND, SILENT), 8), 0);
    let flush = Status::IBV_WC_WR_FLUSH_ERR;
    assert_eq!(rig.statuses(), [(1, flush), (2, flush), (3, flush)]);
    rig.close();
}

#[test]
fn a_message_longer_than_its_receive_fails_both_sides() {
    let rig = ready(&Plan::default());
    assert_eq!(rig.receive(1, 8), 0);
    assert_eq!(rig.receive(2, 8), 0);
    assert_eq!(rig.send(request(3, Request::IBV_WR_SEND, SILENT), 9), 0);
    assert_eq!(
        rig.statuses(),
        [
            (1, Status::IBV_WC_LOC_LEN_ERR),
            (3, Status::IBV_WC_REM_INV_REQ_ERR),
            (2, Status::IBV_WC_WR_FLUSH_ERR)
        ]
    );
    assert_eq!(rig.state(), State::IBV_QPS_ERR);
    rig.close();
}

#[test]
fn reset_forgets_everything() {
    let rig = ready(&Plan::default());
    assert_eq!(rig.receive(1, 8), 0);
    for i in 0..DEPTH {
        assert_eq!(rig.send(request(i.into(), Request::IBV_WR_RDMA_WRITE, SIGNALED), 8), 0);
    }
    assert_eq!(rig.modify(State::IBV_QPS_RESET), 0);
    assert_eq!(rig.statuses(), []);
    assert_eq!(rig.receive(1, 8), libc::EINVAL, "no receives in RESET");
    rig.close();
}

#[test]
fn transitions_need_their_attributes() {
    let rig = Rig::new(null::verbs(), "null0", &Plan::default());
    assert_eq!(rig.modify(State::IBV_QPS_RTR), libc::EINVAL, "RESET -> RTR");
    assert_eq!(rig.modify_with(State::IBV_QPS_INIT, ibv_qp_attr_mask::IBV_QP_PORT), libc::EINVAL);
    assert_eq!(rig.modify(State::IBV_QPS_INIT), 0);
    assert_eq!(rig.send(request(0, Request::IBV_WR_SEND, SIGNALED), 1), libc::EINVAL, "no sends in INIT");
    assert_eq!(rig.receive(0, 1), 0, "receives from INIT on");
    assert_eq!(rig.modify(State::IBV_QPS_RTR), 0);
    assert_eq!(rig.modify(State::IBV_QPS_RTS), 0);
    assert_eq!(rig.state(), State::IBV_QPS_RTS);
    rig.close();
}

#[test]
fn ud_adds_its_header_to_the_length() {
    let rig = Rig::new(null::verbs(), "null0", &Plan { qp_type: ibv_qp_type::IBV_QPT_UD, ..Plan::default() });
    use ibv_qp_attr_mask as Mask;
    let init = Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_QKEY;
    assert_eq!(rig.modify_with(State::IBV_QPS_INIT, init), 0);
    assert_eq!(rig.modify_with(State::IBV_QPS_RTR, Mask(0)), 0);
    assert_eq!(rig.modify_with(State::IBV_QPS_RTS, Mask::IBV_QP_SQ_PSN), 0);
    assert_eq!(rig.receive(1, 48), 0);
    assert_eq!(rig.send(request(2, Request::IBV_WR_SEND, SIGNALED), 8), 0);
    let wc = rig.poll();
    assert_eq!((wc[0].byte_len, wc[0].wc_flags), (48, ibv_wc_flags::IBV_WC_GRH.0));
    assert_eq!(rig.send(request(3, Request::IBV_WR_RDMA_WRITE, SIGNALED), 8), libc::EINVAL);
    rig.close();
}

#[test]
fn an_armed_queue_gives_one_event() {
    let rig = ready(&Plan { channel: true, ..Plan::default() });
    let send = || assert_eq!(rig.send(request(1, Request::IBV_WR_SEND, SIGNALED), 1), 0);
    send();
    assert!(!rig.has_event(), "not armed");
    rig.arm(false);
    send();
    send();
    assert!(rig.has_event());
    assert_eq!(rig.take_event(), rig.cq);
    assert!(!rig.has_event(), "one arm, one event");
    rig.acknowledge(1);
    assert_eq!(rig.poll().len(), 3);

    rig.arm(true);
    send();
    assert!(!rig.has_event(), "nothing solicited");
    assert_eq!(rig.receive(2, 8), 0);
    let solicited = SIGNALED | ibv_send_flags::IBV_SEND_SOLICITED;
    assert_eq!(rig.send(request(3, Request::IBV_WR_SEND, solicited), 1), 0);
    assert!(rig.has_event());
    rig.close();
}

#[test]
fn destroying_a_queue_waits_for_acknowledgements() {
    let rig = ready(&Plan { channel: true, ..Plan::default() });
    rig.arm(false);
    assert_eq!(rig.send(request(1, Request::IBV_WR_SEND, SIGNALED), 1), 0);
    assert_eq!(rig.take_event(), rig.cq);
    let acknowledged = AtomicU32::new(0);
    let (verbs, cq) = (rig.verbs, rig.cq.expose_provenance());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            acknowledged.store(1, Ordering::SeqCst);
            // SAFETY: the queue is live: its destroy waits for this call.
            unsafe { (verbs.ibv_ack_cq_events)(core::ptr::with_exposed_provenance_mut(cq), 1) };
        });
        rig.close();
        assert_eq!(acknowledged.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn what_depends_on_an_object_keeps_it_busy() {
    let rig = ready(&Plan { channel: true, srq: true, ..Plan::default() });
    let verbs = rig.verbs;
    // SAFETY: live objects; each call is refused.
    assert_eq!(unsafe { (verbs.ibv_destroy_cq)(rig.cq) }, libc::EBUSY);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_destroy_srq)(rig.srq) }, libc::EBUSY);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_destroy_comp_channel)(rig.channel) }, libc::EBUSY);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_dealloc_pd)(rig.pd) }, libc::EBUSY);
    // SAFETY: as above.
    assert_eq!(unsafe { (verbs.ibv_close_device)(rig.context) }, -1);
    rig.close();
}

#[test]
fn asynchronous_events_of_shared_queue_and_overrun() {
    let rig = ready(&Plan { srq: true, cqe: 1, ..Plan::default() });
    assert_eq!(rig.send(request(1, Request::IBV_WR_SEND, SIGNALED), 1), 0);
    assert_eq!(rig.async_event(), None);
    assert_eq!(rig.send(request(2, Request::IBV_WR_SEND, SIGNALED), 1), 0);
    assert_eq!(rig.async_event(), Some(ibv_event_type::IBV_EVENT_CQ_ERR));
    assert_eq!(rig.modify(State::IBV_QPS_ERR), 0);
    assert_eq!(rig.async_event(), Some(ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED));
    assert_eq!(rig.async_event(), None);
    rig.close();
}

#[test]
fn the_port_is_active_and_ethernet() {
    let rig = ready(&Plan::default());
    let mut port = ibv_port_attr::default();
    // SAFETY: a live context, a valid output pointer.
    assert_eq!(unsafe { ibv_query_port_ex(rig.context, 1, &raw mut port) }, Some(0));
    assert_eq!((port.state, port.link_layer, port.gid_tbl_len), (ibv_port_state::IBV_PORT_ACTIVE, 2, 2));
    let mut gid = verbs_sys::ibv_gid { raw: [0; 16] };
    // SAFETY: as above.
    assert_eq!(unsafe { (rig.verbs.ibv_query_gid)(rig.context, 1, 1, &raw mut gid) }, 0);
    // SAFETY: the provider wrote it; every byte pattern is valid.
    assert_eq!(unsafe { gid.raw }[10..], [0xff, 0xff, 192, 0, 2, 1]);
    // SAFETY: as above.
    assert_eq!(unsafe { (rig.verbs.ibv_query_gid)(rig.context, 1, 2, &raw mut gid) }, -1);
    rig.close();
}

#[test]
fn threads_share_a_pair_and_its_queue() {
    const THREADS: u64 = 4;
    const EACH: u64 = if cfg!(miri) { 20 } else { 2000 };
    let rig = ready(&Plan { cqe: 64, ..Plan::default() });
    let polled = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (rig, polled) = (&rig, &polled);
            scope.spawn(move || {
                let mut sent = 0;
                while sent < EACH {
                    if rig.send(request(thread, Request::IBV_WR_SEND, SIGNALED), 1) == 0 {
                        sent += 1;
                    }
                    let (count, _) = rig.poll_raw::<1>();
                    polled.fetch_add(count.cast_unsigned(), Ordering::Relaxed);
                }
            });
        }
    });
    let rest = u32::try_from(rig.poll().len()).unwrap();
    assert_eq!(u64::from(polled.load(Ordering::Relaxed) + rest), THREADS * EACH);
    rig.close();
}
