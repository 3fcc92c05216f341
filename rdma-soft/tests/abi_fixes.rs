//! What the kernel's drivers once got wrong, through the C interface. Each test names the fix.

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

/// What a program writes over a request once it is posted changes nothing: the device has a copy.
/// RDMA/rxe: Fix TOCTOU heap overflow in get_srq_wqe
/// RDMA/rxe: Copy WQE to local buffer in non-SRQ receive path
#[test]
fn requests_are_copied_when_they_are_posted() {
    for srq in [false, true] {
        let (mut a, b) = pair(Options { srq, ..Options::default() });
        let data = pattern(100, 5);
        a.write(0, &data);
        let mut sges = [b.sge(0, 60), b.sge(1000, 60)];
        let mut wr = ibv_recv_wr { wr_id: 7, next: ptr::null_mut(), sg_list: sges.as_mut_ptr(), num_sge: 2 };
        let mut bad = ptr::null_mut();
        let posted = unsafe {
            if srq {
                ibv_post_srq_recv(b.srq, &mut wr, &mut bad)
            } else {
                ibv_post_recv(b.qp, &mut wr, &mut bad)
            }
        };
        assert_eq!(posted, 0);
        unsafe {
            (&raw mut wr.num_sge).write_volatile(1 << 20);
            for sge in &mut sges {
                ptr::from_mut(sge).write_volatile(ibv_sge { addr: 64, length: u32::MAX, lkey: 0 });
            }
        }
        assert_eq!(a.send(1, 0, 100), 0);
        let wc = b.wait_success();
        assert_eq!((wc.wr_id, wc.byte_len), (7, 100));
        assert_eq!([b.read(0, 60), b.read(1000, 40)].concat(), data);
        assert_eq!(b.read(1040, 20), [0; 20]);
        a.wait_success();
    }
}

/// Addresses of peers need not begin where a page does, nor agree with those of the program in their low bits.
/// RDMA/rxe: Fix iova-to-va conversion for MR page sizes != PAGE_SIZE
#[test]
fn an_address_of_choice_leads_to_its_byte() {
    const IOVA: u64 = 0x7_1234_5ff3;
    let (mut a, mut b) = pair(Options::default());
    let mr = unsafe {
        let memory = b.memory.as_mut_ptr().wrapping_add(24).cast();
        v().ibv_reg_mr_iova.unwrap()(b.pd, memory, 20_000, IOVA, ALL_ACCESS as i32)
    };
    assert!(!mr.is_null());
    let to = Address { va: IOVA, rkey: unsafe { (*mr).rkey }, ..b.address() };
    let data = pattern(9000, 3);
    a.write(0, &data);
    for at in [0, 1, 4096, 11_000] {
        b.write(0, &[0; 1 << 16]);
        assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 9000, to, at), 0);
        a.wait_success();
        assert_eq!(b.read(24 + at, 9000), data);
        assert_eq!((b.read(23 + at, 1), b.read(24 + at + 9000, 1)), (vec![0], vec![0]));
    }
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 9000, to, 11_001), 0);
    assert_eq!(a.wait().status, ibv_wc_status::IBV_WC_REM_ACCESS_ERR);
    assert_eq!(unsafe { (v().ibv_dereg_mr)(mr) }, 0);
}

/// A change that is refused changes nothing.
/// RDMA/rxe: validate access flags before swapping the MR's PD
#[test]
fn a_refused_change_of_a_region_leaves_it_as_it_was() {
    let (a, b) = pair(Options::default());
    let other = unsafe { (v().ibv_alloc_pd)(b.context) };
    type Flag = ibv_rereg_mr_flags;
    let flags = Flag::IBV_REREG_MR_CHANGE_PD.0 | Flag::IBV_REREG_MR_CHANGE_ACCESS.0;
    // Remote write without local write, and a right that there is not.
    for access in [2, 1 << 19] {
        let code =
            unsafe { v().ibv_rereg_mr.unwrap()(b.mr, flags as i32, other, ptr::null_mut(), 0, access) };
        assert_ne!(code, 0);
        assert_eq!(unsafe { (*b.mr).pd }, b.pd);
        assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 8, b.address(), 0), 0);
        a.wait_success();
    }
    assert_eq!(unsafe { (v().ibv_dealloc_pd)(other) }, 0, "nobody uses it");
}

/// RDMA/rxe: Fix double free in rxe_srq_from_init
/// RDMA/rxe: Clear all QP fields if creation failed
/// RDMA/rxe: Fix "trying to register non-static key in rxe_qp_do_cleanup" bug
/// RDMA/rxe: Fix slab-use-after-free Read in rxe_queue_cleanup bug
#[test]
fn what_cannot_be_created_leaves_nothing_behind() {
    let end = End::new(Options { srq: true, ..Options::default() });
    unsafe {
        for (max_wr, max_sge) in [(0, 1), (u32::MAX, 1), (8, 1000)] {
            let attr = ibv_srq_attr { max_wr, max_sge, srq_limit: 0 };
            let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
            assert!((v().ibv_create_srq)(end.pd, &mut init).is_null());
            assert_eq!(errno(), libc::EINVAL);
        }
        for depth in [0, -1, i32::MAX] {
            assert!((v().ibv_create_cq)(end.context, depth, ptr::null_mut(), ptr::null_mut(), 0).is_null());
            assert_eq!(errno(), libc::EINVAL);
        }
        let good = ibv_qp_cap {
            max_send_wr: 1,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        for (cap, qp_type, expected) in [
            (ibv_qp_cap { max_send_wr: u32::MAX, ..good }, ibv_qp_type::IBV_QPT_RC, libc::EINVAL),
            (ibv_qp_cap { max_send_sge: u32::MAX, ..good }, ibv_qp_type::IBV_QPT_UC, libc::EINVAL),
            (ibv_qp_cap { max_inline_data: u32::MAX, ..good }, ibv_qp_type::IBV_QPT_UD, libc::EINVAL),
            (good, ibv_qp_type::IBV_QPT_RAW_PACKET, libc::EOPNOTSUPP),
            (good, ibv_qp_type(77), libc::EOPNOTSUPP),
        ] {
            let mut init: ibv_qp_init_attr = zeroed();
            (init.send_cq, init.recv_cq, init.srq) = (end.cq, end.cq, end.srq);
            (init.cap, init.qp_type) = (cap, qp_type);
            assert!((v().ibv_create_qp)(end.pd, &mut init).is_null());
            assert_eq!(errno(), expected);
        }
    }
    // With the end its queues and domain are destroyed, which works when nobody else uses them.
}

/// RDMA/rxe: Fix null deref on srq->rq.queue after resize failure
/// RDMA/rxe: Fix resize_finish() in rxe_queue.c
#[test]
fn a_shared_queue_keeps_its_receives_when_it_is_resized_or_not() {
    let (a, b) = pair(Options { srq: true, depth: 4, ..Options::default() });
    let resize = |depth| {
        let mut attr = ibv_srq_attr { max_wr: depth, max_sge: 0, srq_limit: 0 };
        unsafe { (v().ibv_modify_srq)(b.srq, &mut attr, ibv_srq_attr_mask::IBV_SRQ_MAX_WR.0 as i32) }
    };
    let exchange = |id| {
        assert_eq!(a.send(id, 0, 8), 0);
        assert_eq!(b.wait_success().wr_id, id);
        a.wait_success();
    };
    // So that the ring is somewhere in its middle.
    for id in 0..3 {
        assert_eq!(b.post_recv(id, 0, 100), 0);
        exchange(id);
    }
    (3..7).for_each(|id| assert_eq!(b.post_recv(id, 0, 100), 0));
    assert_eq!(b.post_recv(9, 0, 100), libc::ENOMEM);
    assert_eq!((resize(3), resize(0), resize(u32::MAX)), (libc::EINVAL, libc::EINVAL, libc::EINVAL));
    exchange(3);
    assert_eq!(resize(3), 0);
    assert_eq!(b.post_recv(9, 0, 100), libc::ENOMEM);
    exchange(4);
    assert_eq!(resize(10), 0);
    (7..10).for_each(|id| assert_eq!(b.post_recv(id, 0, 100), 0));
    (5..10).for_each(exchange);
}

/// Packets for a queue pair that is destroyed, in the middle of its messages, touch neither it nor its memory.
/// RDMA/rxe: Flush delayed SKBs while releasing RXE resources
/// RDMA/siw: Fix QP destroy to wait for all references dropped.
#[test]
fn a_queue_pair_may_go_in_the_middle_of_its_traffic() {
    let options = Options { timeout: 8, retry: 1, rnr_retry: 1, ..Options::default() };
    for round in 0..20 {
        let (a, b) = pair(options);
        let to = b.address();
        for id in 0..8 {
            let opcode = [Op::IBV_WR_RDMA_WRITE, Op::IBV_WR_RDMA_READ, Op::IBV_WR_SEND][id as usize % 3];
            assert_eq!(a.rdma(opcode, id, 0, 60_000, to, 0), 0);
        }
        for _ in 0..round * 5 {
            b.poll();
        }
        drop(b);
        let completed: Vec<_> = (0..8).map(|_| a.wait()).collect();
        assert!(completed.iter().map(|wc| wc.wr_id).eq(0..8), "in order, each once");
        let failed =
            completed.iter().position(|wc| wc.status != ibv_wc_status::IBV_WC_SUCCESS).expect("no receive");
        let flushed = &completed[failed + 1..];
        assert!(flushed.iter().all(|wc| wc.status == ibv_wc_status::IBV_WC_WR_FLUSH_ERR));
    }
}
