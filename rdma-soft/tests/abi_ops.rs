//! One-sided operations, datagrams, shared receive queues, windows, errors and events through the C interface.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::ptr;

use common::*;
use verbs_sys::inline::*;
use verbs_sys::*;

type Op = ibv_wr_opcode;
type Status = ibv_wc_status;

fn word(end: &End, offset: usize) -> u64 {
    u64::from_ne_bytes(end.read(offset, 8).try_into().unwrap())
}

#[test]
fn a_read_fetches_what_is_there() {
    let (a, mut b) = pair(Options { size: 1 << 20, ..Options::default() });
    let data = pattern(300_001, 9);
    b.write(64, &data);
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_READ, 5, 128, data.len(), b.address(), 64), 0);
    let wc = a.wait_success();
    assert_eq!((wc.wr_id, wc.opcode), (5, ibv_wc_opcode::IBV_WC_RDMA_READ));
    assert_eq!(a.read(128, data.len()), data);
}

#[test]
fn atomics_return_what_was_there() {
    let (a, mut b) = pair(Options::default());
    b.write(64, &7u64.to_ne_bytes());
    let to = b.address();
    let atomic = |opcode, compare_add, swap| {
        let posted = a.post(1, opcode, 0, 8, |wr| {
            wr.wr.atomic.remote_addr = to.va + 64;
            wr.wr.atomic.rkey = to.rkey;
            wr.wr.atomic.compare_add = compare_add;
            wr.wr.atomic.swap = swap;
        });
        assert_eq!(posted, 0);
        a.wait_success();
        word(&a, 0)
    };
    assert_eq!(atomic(Op::IBV_WR_ATOMIC_FETCH_AND_ADD, 5, 0), 7);
    assert_eq!(atomic(Op::IBV_WR_ATOMIC_CMP_AND_SWP, 12, 100), 12);
    assert_eq!(atomic(Op::IBV_WR_ATOMIC_CMP_AND_SWP, 12, 200), 100);
    assert_eq!(word(&b, 64), 100);
}

/// A queue pair with ATOMIC WRITE in the place of the one that `end` has.
fn with_atomic_write(end: &mut End) {
    let mut init: ibv_qp_init_attr_ex = zeroed();
    (init.send_cq, init.recv_cq, init.pd) = (end.cq, end.cq, end.pd);
    init.qp_type = ibv_qp_type::IBV_QPT_RC;
    init.cap = ibv_qp_cap { max_send_wr: 8, max_recv_wr: 8, max_send_sge: 1, ..zeroed() };
    init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
    init.send_ops_flags = ibv_qp_create_send_ops_flags::IBV_QP_EX_WITH_ATOMIC_WRITE.0.into();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(end.qp), 0);
        end.qp = ibv_create_qp_ex(end.context, &mut init);
    }
    assert!(!end.qp.is_null(), "errno {}", errno());
}

#[test]
fn atomic_writes_store_eight_bytes() {
    let mut attr: ibv_device_attr_ex = zeroed();
    let (mut a, b) = (End::new(Options::default()), End::new(Options::default()));
    with_atomic_write(&mut a);
    a.connect(b.address());
    b.connect(a.address());
    assert_eq!(unsafe { ibv_query_device_ex(a.context, ptr::null(), &mut attr) }, 0);
    assert_ne!(attr.device_cap_flags_ex & 1 << 40, 0, "IB_UVERBS_DEVICE_ATOMIC_WRITE");
    let to = b.address();
    let qp = unsafe { (v().ibv_qp_to_qp_ex.unwrap())(a.qp) };
    let extended = |at: u64, value: &[u8; 8]| unsafe {
        (*qp).wr_start.unwrap()(qp);
        (*qp).wr_id = 9;
        (*qp).wr_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        (*qp).wr_atomic_write.unwrap()(qp, to.rkey, to.va + at, value.as_ptr().cast());
        assert_eq!((*qp).wr_complete.unwrap()(qp), 0);
    };
    extended(64, b"as a one");
    let wc = a.wait_success();
    assert_eq!((wc.wr_id, wc.opcode), (9, ibv_wc_opcode::IBV_WC_ATOMIC_WRITE));
    assert_eq!(b.read(56, 24), b"\0\0\0\0\0\0\0\0as a one\0\0\0\0\0\0\0\0");
    // From registered memory, as any other write.
    a.write(8, b"gathered");
    assert_eq!(a.rdma(Op::IBV_WR_ATOMIC_WRITE, 1, 8, 8, to, 72), 0);
    assert_eq!(a.wait_success().opcode, ibv_wc_opcode::IBV_WC_ATOMIC_WRITE);
    assert_eq!(b.read(64, 16), b"as a onegathered");
    extended(68, b"not here");
    assert_eq!(a.wait().status, Status::IBV_WC_REM_INV_REQ_ERR);
    assert_eq!(b.read(64, 16), b"as a onegathered");
}

/// `man ibv_wr_complete`: all that was built is posted, or nothing.
#[test]
fn requests_that_are_built_together_are_taken_together() {
    let mut init: ibv_qp_init_attr_ex = zeroed();
    let (mut a, b) = (End::new(Options::default()), End::new(Options::default()));
    (init.send_cq, init.recv_cq, init.pd) = (a.cq, a.cq, a.pd);
    init.qp_type = ibv_qp_type::IBV_QPT_RC;
    init.cap = ibv_qp_cap { max_send_wr: 2, max_recv_wr: 8, max_send_sge: 2, max_inline_data: 8, ..zeroed() };
    init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
    init.send_ops_flags = ibv_qp_create_send_ops_flags::IBV_QP_EX_WITH_RDMA_WRITE.0.into();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(a.qp), 0);
        a.qp = ibv_create_qp_ex(a.context, &mut init);
    }
    a.connect(b.address());
    b.connect(a.address());
    let (to, sges) = (b.address(), [a.sge(0, 1); 3]);
    let qp = unsafe { (v().ibv_qp_to_qp_ex.unwrap())(a.qp) };
    let build = |writes: u64, elements: usize, inline: usize| unsafe {
        (*qp).wr_start.unwrap()(qp);
        for n in 1..=writes {
            (*qp).wr_id = n;
            (*qp).wr_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
            (*qp).wr_rdma_write.unwrap()(qp, to.rkey, to.va);
            (*qp).wr_set_sge.unwrap()(qp, sges[0].lkey, sges[0].addr, 1);
        }
        // The last one differs.
        (*qp).wr_set_sge_list.unwrap()(qp, elements, sges.as_ptr());
        if inline > 0 {
            (*qp).wr_set_inline_data.unwrap()(qp, a.memory.as_ptr().cast_mut().cast(), inline);
        }
        (*qp).wr_complete.unwrap()(qp)
    };
    assert_eq!(build(2, 3, 0), libc::EINVAL, "too many elements");
    assert_eq!(build(2, 1, 9), libc::EINVAL, "too much inline data");
    assert_eq!(build(3, 1, 0), libc::ENOMEM, "more than the queue holds");
    assert_eq!(build(2, 2, 8), 0);
    assert_eq!((a.wait_success().wr_id, a.wait_success().wr_id), (1, 2));
    assert!(a.poll().is_none(), "nothing of what was refused");
}

#[test]
fn remote_accesses_are_checked() {
    // What the peer's queue pair does not allow is no valid request to it; what its region does not allow, or
    // does not hold, is a wrong access.
    let (invalid, wrong) = (Status::IBV_WC_REM_INV_REQ_ERR, Status::IBV_WC_REM_ACCESS_ERR);
    // (what the peer grants, operation, offset at the peer, change of the key, outcome)
    let cases = [
        (1 | 4, Op::IBV_WR_RDMA_WRITE, 0, 0, invalid),
        (1 | 2, Op::IBV_WR_RDMA_READ, 0, 0, invalid),
        (ALL_ACCESS, Op::IBV_WR_RDMA_WRITE, (1 << 16) - 7, 0, wrong),
        (ALL_ACCESS, Op::IBV_WR_RDMA_READ, 0, 1, wrong),
        (ALL_ACCESS, Op::IBV_WR_RDMA_WRITE, 0, 0x100, wrong),
    ];
    for (access, opcode, at, key, outcome) in cases {
        let (a, b) = pair(Options { access, ..Options::default() });
        let to = Address { rkey: b.address().rkey ^ key, ..b.address() };
        assert_eq!(a.rdma(opcode, 1, 0, 8, to, at), 0);
        assert_eq!(a.wait().status, outcome, "{access} {opcode:?}");
        assert_eq!(b.read(0, 8), [0; 8]);
        // What is posted to the failed pair is flushed.
        assert_eq!(a.send(2, 0, 8), 0);
        assert_eq!(a.wait().status, Status::IBV_WC_WR_FLUSH_ERR);
    }
}

#[test]
fn wrong_requests_get_the_errno_of_hardware() {
    let end = End::new(Options { depth: 2, ..Options::default() });
    assert_eq!(end.send(1, 0, 8), libc::EINVAL, "in RESET");
    assert_eq!(end.post_recv(1, 0, 8), libc::EINVAL, "in RESET");
    end.to_init();
    assert_eq!(end.send(1, 0, 8), libc::EINVAL, "in INIT");
    assert_eq!((end.post_recv(1, 0, 8), end.post_recv(2, 0, 8)), (0, 0));
    assert_eq!(end.post_recv(3, 0, 8), libc::ENOMEM, "full");
    let (a, _b) = pair(Options { depth: 2, ..Options::default() });
    let too_many = a.post(1, Op::IBV_WR_SEND, 0, 8, |wr| wr.num_sge = 3);
    assert_eq!(too_many, libc::EINVAL);
    let too_long = a.post(1, Op::IBV_WR_SEND, 0, 65, |wr| wr.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0);
    assert_eq!(too_long, libc::EINVAL);
    // No receive is posted: they stay in the queue.
    assert_eq!((a.send(1, 0, 8), a.send(2, 0, 8)), (0, 0));
    assert_eq!(a.send(3, 0, 8), libc::ENOMEM);
}

#[test]
fn a_local_key_that_is_wrong_completes_with_a_protection_error() {
    let (a, b) = pair(Options::default());
    assert_eq!(b.post_recv(1, 0, 8), 0);
    let mut sge = a.sge(0, 8);
    sge.lkey ^= 0x100;
    assert_eq!(a.post(1, Op::IBV_WR_SEND, 0, 8, |wr| wr.sg_list = &mut sge), 0);
    assert_eq!(a.wait().status, Status::IBV_WC_LOC_PROT_ERR);
}

/// `man ibv_query_port`: `max_msg_sz`.
#[test]
fn a_message_is_as_long_as_the_port_says_and_no_longer() {
    let longest = {
        let context = open();
        let mut attr: ibv_port_attr = zeroed();
        unsafe {
            assert_eq!(ibv_query_port_ex(context, 1, &mut attr), Some(0));
            assert_eq!((v().ibv_close_device)(context), 0);
        }
        attr.max_msg_sz
    };
    // The key shows that the memory was looked for.
    for (length, expected) in
        [(longest, Status::IBV_WC_LOC_PROT_ERR), (longest + 1, Status::IBV_WC_LOC_LEN_ERR)]
    {
        let (a, b) = pair(Options::default());
        let mut sge = ibv_sge { length, lkey: 0, ..a.sge(0, 8) };
        assert_eq!(
            a.post(1, Op::IBV_WR_RDMA_WRITE, 0, 8, |wr| {
                wr.sg_list = &mut sge;
                wr.wr.rdma.remote_addr = b.address().va;
                wr.wr.rdma.rkey = b.address().rkey;
            }),
            0
        );
        assert_eq!(a.wait().status, expected, "{length} bytes");
    }
}

#[test]
fn a_receiver_that_never_comes_ends_in_an_error() {
    let (a, _b) = pair(Options { rnr_retry: 1, ..Options::default() });
    assert_eq!(a.send(1, 0, 8), 0);
    assert_eq!(a.wait().status, Status::IBV_WC_RNR_RETRY_EXC_ERR);
    let a = End::new(Options { timeout: 8, retry: 1, ..Options::default() });
    let nobody = Address { qp_num: a.address().qp_num ^ 1, ..a.address() };
    a.connect(nobody);
    assert_eq!(a.send(1, 0, 8), 0);
    assert_eq!(a.wait().status, Status::IBV_WC_RETRY_EXC_ERR);
}

#[test]
fn a_message_too_long_for_its_receive_fails_both() {
    let (a, b) = pair(Options::default());
    assert_eq!(b.post_recv(1, 0, 16), 0);
    assert_eq!(a.send(2, 0, 17), 0);
    assert_eq!(b.wait().status, Status::IBV_WC_LOC_LEN_ERR);
    assert_eq!(a.wait().status, Status::IBV_WC_REM_INV_REQ_ERR);
}

#[test]
fn unreliable_connections_send_and_write() {
    let (mut a, b) = pair(Options { qp_type: ibv_qp_type::IBV_QPT_UC, ..Options::default() });
    let data = pattern(10_000, 1);
    a.write(0, &data);
    assert_eq!(b.post_recv(1, 0, 20_000), 0);
    assert_eq!(a.send(2, 0, data.len()), 0);
    a.wait_success();
    assert_eq!(b.wait_success().byte_len, 10_000);
    assert_eq!(b.read(0, data.len()), data);
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 3, 0, data.len(), b.address(), 20_001), 0);
    a.wait_success();
    b.poll();
    assert_eq!(b.read(20_001, data.len()), data);
}

#[test]
fn datagrams_carry_their_sender() {
    let (mut a, mut b) = pair(Options { qp_type: ibv_qp_type::IBV_QPT_UD, ..Options::default() });
    a.write(0, b"hello");
    b.write(4096, b"answer");
    assert_eq!((b.post_recv(1, 0, 1000), a.post_recv(1, 8192, 1000)), (0, 0));
    let mut attr: ibv_ah_attr = zeroed();
    attr.is_global = 1;
    attr.port_num = 1;
    attr.grh.sgid_index = 1;
    attr.grh.dgid.raw = b.address().gid;
    let ah = unsafe { (v().ibv_create_ah)(a.pd, &mut attr) };
    assert!(!ah.is_null());
    let send = |from: &End, offset, len, ah, qpn| {
        from.post(2, Op::IBV_WR_SEND, offset, len, |wr| {
            wr.wr.ud.ah = ah;
            wr.wr.ud.remote_qpn = qpn;
            wr.wr.ud.remote_qkey = 0x1111_1111;
        })
    };
    assert_eq!(send(&a, 0, 5, ah, b.address().qp_num), 0);
    a.wait_success();
    let mut wc = b.wait_success();
    assert_eq!((wc.byte_len, wc.src_qp), (45, a.address().qp_num));
    assert_eq!(wc.wc_flags & ibv_wc_flags::IBV_WC_GRH.0, ibv_wc_flags::IBV_WC_GRH.0);
    assert_eq!(b.read(40, 5), b"hello");
    // The way back, from the route header.
    let grh = b.memory.as_mut_ptr().cast();
    let back = unsafe { v().ibv_create_ah_from_wc.unwrap()(b.pd, &mut wc, grh, 1) };
    assert!(!back.is_null());
    assert_eq!(send(&b, 4096, 6, back, wc.src_qp), 0);
    b.wait_success();
    a.wait_success();
    assert_eq!(a.read(8192 + 40, 6), b"answer");
    unsafe {
        assert_eq!((v().ibv_dealloc_pd)(a.pd), libc::EBUSY);
        assert_eq!((v().ibv_destroy_ah)(ah), 0);
        assert_eq!((v().ibv_destroy_ah)(back), 0);
    }
}

#[test]
fn a_shared_receive_queue_serves_its_pairs_and_warns() {
    let (a, b) = pair(Options { srq: true, ..Options::default() });
    for i in 0..3 {
        assert_eq!(b.post_recv(i, 0, 100), 0);
    }
    let mut attr = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: 3 };
    unsafe {
        assert_eq!((v().ibv_modify_srq)(b.srq, &mut attr, ibv_srq_attr_mask::IBV_SRQ_LIMIT.0 as i32), 0);
        assert_eq!(a.send(1, 0, 8), 0);
        assert_eq!(b.wait_success().wr_id, 0);
        let mut event: ibv_async_event = zeroed();
        assert_eq!((v().ibv_get_async_event)(b.context, &mut event), 0);
        assert_eq!(event.event_type, ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED);
        assert_eq!(event.element.srq, b.srq);
        (v().ibv_ack_async_event)(&mut event);
        assert_eq!((v().ibv_destroy_srq)(b.srq), libc::EBUSY);
    }
}

/// `man ibv_create_srq`: the limit is irrelevant there.
#[test]
fn a_shared_receive_queue_begins_without_a_limit() {
    let end = End::new(Options::default());
    let attr = ibv_srq_attr { max_wr: 8, max_sge: 1, srq_limit: 9 };
    let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
    unsafe {
        let srq = (v().ibv_create_srq)(end.pd, &mut init);
        assert!(!srq.is_null(), "errno {}", errno());
        let mut attr: ibv_srq_attr = zeroed();
        assert_eq!((v().ibv_query_srq)(srq, &mut attr), 0);
        assert_eq!((attr.max_wr, attr.max_sge, attr.srq_limit), (8, 1, 0));
        assert_eq!((v().ibv_destroy_srq)(srq), 0);
    }
}

#[test]
fn windows_open_and_close() {
    let (mut a, b) = pair(Options::default());
    a.write(0, b"through the window");
    let mw = unsafe { ibv_alloc_mw(b.pd, ibv_mw_type::IBV_MW_TYPE_2) };
    assert!(!mw.is_null());
    let rkey = ibv_inc_rkey(unsafe { (*mw).rkey });
    let bound = b.post(1, Op::IBV_WR_BIND_MW, 0, 0, |wr| {
        wr.num_sge = 0;
        let bind = unsafe { &mut wr.__bindgen_anon_2.bind_mw };
        bind.mw = mw;
        bind.rkey = rkey;
        bind.bind_info.mr = b.mr;
        bind.bind_info.addr = b.address().va + 100;
        bind.bind_info.length = 18;
        bind.bind_info.mw_access_flags = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
    });
    assert_eq!(bound, 0);
    assert_eq!(b.wait_success().opcode, ibv_wc_opcode::IBV_WC_BIND_MW);
    unsafe { assert_eq!((v().ibv_dereg_mr)(b.mr), libc::EBUSY) };
    let window = Address { rkey, ..b.address() };
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 18, window, 100), 0);
    a.wait_success();
    assert_eq!(b.read(100, 18), b"through the window");
    assert_eq!(
        b.post(2, Op::IBV_WR_LOCAL_INV, 0, 0, |wr| {
            wr.num_sge = 0;
            wr.__bindgen_anon_1.invalidate_rkey = rkey;
        }),
        0
    );
    b.wait_success();
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 18, window, 100), 0);
    assert_eq!(a.wait().status, Status::IBV_WC_REM_ACCESS_ERR);
    unsafe { assert_eq!(ibv_dealloc_mw(mw), 0) };
}

/// `man ibv_bind_mw`, `man ibv_post_send`: each type of window is bound in its own way.
#[test]
fn a_window_is_bound_as_its_type_says() {
    let mut end = End::new(Options::default());
    let mut init: ibv_qp_init_attr_ex = zeroed();
    (init.send_cq, init.recv_cq, init.pd) = (end.cq, end.cq, end.pd);
    init.qp_type = ibv_qp_type::IBV_QPT_RC;
    init.cap = ibv_qp_cap { max_send_wr: 8, max_recv_wr: 8, ..zeroed() };
    init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
    init.send_ops_flags = ibv_qp_create_send_ops_flags::IBV_QP_EX_WITH_BIND_MW.0.into();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(end.qp), 0);
        end.qp = ibv_create_qp_ex(end.context, &mut init);
        assert!(!end.qp.is_null(), "errno {}", errno());
        end.connect(end.address());
        let qp = v().ibv_qp_to_qp_ex.unwrap()(end.qp);
        let info = ibv_mw_bind_info { mr: end.mr, addr: end.address().va, length: 8, mw_access_flags: 0 };
        let types = [ibv_mw_type::IBV_MW_TYPE_1, ibv_mw_type::IBV_MW_TYPE_2];
        let [one, two] = types.map(|mw_type| ibv_alloc_mw(end.pd, mw_type));
        let post = |mw: *mut ibv_mw| {
            end.post(1, Op::IBV_WR_BIND_MW, 0, 0, |wr| {
                wr.num_sge = 0;
                let bind = &mut wr.__bindgen_anon_2.bind_mw;
                (bind.mw, bind.rkey, bind.bind_info) = (mw, (*mw).rkey ^ 1, info);
            })
        };
        let build = |mw: *mut ibv_mw| {
            (*qp).wr_start.unwrap()(qp);
            (*qp).wr_bind_mw.unwrap()(qp, mw, (*mw).rkey ^ 1, &info);
            (*qp).wr_complete.unwrap()(qp)
        };
        let bind = |mw| {
            let mut bind = ibv_mw_bind { wr_id: 1, send_flags: 0, bind_info: info };
            (*end.context).ops.bind_mw.unwrap()(end.qp, mw, &mut bind)
        };
        assert_eq!((post(one), build(one), bind(two)), (libc::EINVAL, libc::EINVAL, libc::EINVAL));
        assert_eq!(bind(one), 0);
        assert_eq!(post(two), 0);
        assert_eq!(end.wait_success().opcode, ibv_wc_opcode::IBV_WC_BIND_MW);
        for mw in [one, two] {
            assert_eq!(ibv_dealloc_mw(mw), 0);
        }
    }
}

#[test]
fn draining_a_send_queue_says_so() {
    let (a, b) = pair(Options::default());
    assert_eq!(b.post_recv(1, 0, 100), 0);
    assert_eq!(a.send(1, 0, 8), 0);
    a.wait_success();
    let mut attr: ibv_qp_attr = zeroed();
    attr.qp_state = ibv_qp_state::IBV_QPS_SQD;
    attr.en_sqd_async_notify = 1;
    assert_eq!(
        a.modify(&mut attr, ibv_qp_attr_mask::IBV_QP_STATE | ibv_qp_attr_mask::IBV_QP_EN_SQD_ASYNC_NOTIFY),
        0
    );
    let mut event: ibv_async_event = zeroed();
    unsafe {
        assert_eq!((v().ibv_get_async_event)(a.context, &mut event), 0);
        assert_eq!(event.event_type, ibv_event_type::IBV_EVENT_SQ_DRAINED);
        (v().ibv_ack_async_event)(&mut event);
    }
}

#[test]
fn draining_again_says_so_only_if_asked_again() {
    type M = ibv_qp_attr_mask;
    let (a, _b) = pair(Options::default());
    let mut attr: ibv_qp_attr = zeroed();
    let mut event: ibv_async_event = zeroed();
    unsafe {
        let fd = (*a.context).async_fd;
        let flags = libc::fcntl(fd, libc::F_GETFL);
        assert_eq!(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK), 0);
        for notify in [true, false, true] {
            attr.qp_state = ibv_qp_state::IBV_QPS_SQD;
            attr.en_sqd_async_notify = 1;
            let asked = if notify { M::IBV_QP_EN_SQD_ASYNC_NOTIFY } else { ibv_qp_attr_mask(0) };
            assert_eq!(a.modify(&mut attr, M::IBV_QP_STATE | asked), 0);
            let said = (v().ibv_get_async_event)(a.context, &mut event) == 0;
            assert_eq!(said, notify);
            if said {
                (v().ibv_ack_async_event)(&mut event);
            }
            attr.qp_state = ibv_qp_state::IBV_QPS_RTS;
            assert_eq!(a.modify(&mut attr, M::IBV_QP_STATE), 0);
        }
    }
}

#[test]
fn solicited_events_come_for_solicited_messages_only() {
    let (a, b) = pair(Options { events: true, ..Options::default() });
    assert_eq!((b.post_recv(1, 0, 100), b.post_recv(2, 0, 100)), (0, 0));
    unsafe {
        let flags = libc::fcntl((*b.channel).fd, libc::F_GETFL);
        assert_eq!(libc::fcntl((*b.channel).fd, libc::F_SETFL, flags | libc::O_NONBLOCK), 0);
        assert_eq!(ibv_req_notify_cq(b.cq, 1), 0);
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        let mut event = || (v().ibv_get_cq_event)(b.channel, &mut cq, &mut context);
        assert_eq!(a.send(1, 0, 8), 0);
        a.wait_success();
        assert_eq!((event(), errno()), (-1, libc::EAGAIN));
        assert_eq!(
            a.post(2, Op::IBV_WR_SEND, 0, 8, |wr| wr.send_flags |= ibv_send_flags::IBV_SEND_SOLICITED.0),
            0
        );
        a.wait_success();
        assert_eq!(event(), 0);
        (v().ibv_ack_cq_events)(b.cq, 1);
    }
    assert_eq!((b.wait_success().wr_id, b.wait_success().wr_id), (1, 2));
}

#[test]
fn objects_in_use_are_not_destroyed() {
    let (a, _b) = pair(Options { events: true, ..Options::default() });
    unsafe {
        assert_eq!((v().ibv_destroy_cq)(a.cq), libc::EBUSY);
        assert_eq!((v().ibv_destroy_comp_channel)(a.channel), libc::EBUSY);
        assert_eq!((v().ibv_dealloc_pd)(a.pd), libc::EBUSY);
    }
}

/// RDMA/rxe: Fix memleak in rxe_mem_init_user
/// RDMA/rxe: Set pd early in mr alloc routines
#[test]
fn memory_that_is_not_there_is_not_registered() {
    let end = End::new(Options::default());
    unsafe {
        let nothing = (v().ibv_reg_mr)(end.pd, ptr::without_provenance_mut(4096), 4096, 1);
        assert!(nothing.is_null());
        assert_eq!(errno(), libc::EFAULT);
        let everything = (v().ibv_reg_mr)(end.pd, ptr::null_mut(), usize::MAX, 1 | 1 << 6);
        assert!(everything.is_null(), "an implicit region on demand");
        assert_eq!(errno(), libc::EINVAL);
        let constant = c"not writable";
        let read_only = (v().ibv_reg_mr)(end.pd, constant.as_ptr().cast_mut().cast(), 12, 1);
        assert!(read_only.is_null());
        let without_local_write = (v().ibv_reg_mr)(end.pd, end.memory.as_ptr().cast_mut().cast(), 12, 2);
        assert!(without_local_write.is_null());
        assert_eq!(errno(), libc::EINVAL);
    }
}

/// A target that never calls the library is served by the background thread.
#[test]
fn a_passive_target_is_served() {
    let (mut a, b) = pair(Options::default());
    a.write(0, &[9; 8]);
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 8, b.address(), 0), 0);
    let begin = std::time::Instant::now();
    while b.read(0, 8) != [9; 8] {
        assert!(begin.elapsed().as_secs() < 5);
    }
    // And so is a sender that never polls.
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 2, 0, 60_000, b.address(), 0), 0);
    while b.read(7, 1) == [9] && b.read(59_999, 1) != a.read(59_999, 1) {
        assert!(begin.elapsed().as_secs() < 5);
    }
}
