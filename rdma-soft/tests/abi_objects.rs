//! Which objects belong together: those of a context, of a protection domain, and those that others use.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::mem::ManuallyDrop;
use std::ptr;

use common::*;
use verbs_sys::inline::*;
use verbs_sys::*;

type Op = ibv_wr_opcode;
type Status = ibv_wc_status;

/// An end whose context is closed while its objects are there; they are destroyed with this.
struct Closed(ManuallyDrop<End>);

impl Closed {
    fn new(end: End) -> Self {
        assert_eq!(unsafe { (v().ibv_close_device)(end.context) }, 0);
        Closed(ManuallyDrop::new(end))
    }

    fn destroy(self) {
        unsafe {
            assert_eq!((v().ibv_destroy_qp)(self.0.qp), 0);
            assert_eq!((v().ibv_destroy_cq)(self.0.cq), 0);
            assert_eq!((v().ibv_dereg_mr)(self.0.mr), 0);
            assert_eq!((v().ibv_dealloc_pd)(self.0.pd), 0);
        }
    }
}

#[test]
fn nothing_of_a_closed_context_is_reached() {
    let (mut a, b) = pair(Options { timeout: 8, retry: 1, ..Options::default() });
    a.write(0, &[7; 8]);
    let to = b.address();
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 8, to, 0), 0);
    a.wait_success();
    assert_eq!(b.read(0, 16), [[7; 8], [0; 8]].concat());
    let window = unsafe { ibv_alloc_mw(b.pd, ibv_mw_type::IBV_MW_TYPE_1) };
    let b = Closed::new(b);
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 2, 0, 8, to, 8), 0);
    assert_eq!(a.wait().status, Status::IBV_WC_RETRY_EXC_ERR);
    assert_eq!(b.0.read(0, 16), [[7; 8], [0; 8]].concat());
    assert_eq!(b.0.send(1, 0, 8), libc::EINVAL);
    assert_eq!(
        unsafe { (v().ibv_dealloc_pd)(b.0.pd) },
        libc::EBUSY,
        "its objects are there until they are destroyed"
    );
    assert_eq!(unsafe { ibv_dealloc_mw(window) }, 0);
    b.destroy();
}

#[test]
fn other_contexts_work_on_when_one_is_closed() {
    let (a, b) = pair(Options::default());
    Closed::new(End::new(Options::default())).destroy();
    assert_eq!(a.rdma(Op::IBV_WR_RDMA_WRITE, 1, 0, 8, b.address(), 0), 0);
    a.wait_success();
}

#[test]
fn a_closed_context_leaves_its_multicast_groups() {
    let gid = group(9);
    let end = End::new(Options { qp_type: ibv_qp_type::IBV_QPT_UD, ..Options::default() });
    assert_eq!(unsafe { (v().ibv_attach_mcast)(end.qp, &gid, 0) }, 0);
    Closed::new(end).destroy();
}

fn address_handle(pd: *mut ibv_pd, to: Address) -> *mut ibv_ah {
    let mut attr: ibv_ah_attr = zeroed();
    (attr.is_global, attr.port_num, attr.grh.sgid_index) = (1, 1, 1);
    attr.grh.dgid.raw = to.gid;
    let ah = unsafe { (v().ibv_create_ah)(pd, &mut attr) };
    assert!(!ah.is_null());
    ah
}

/// Puts a datagram queue pair with `ibv_wr_send` in the place of the one that `end` has.
fn with_built_requests(end: &mut End) {
    let mut init: ibv_qp_init_attr_ex = zeroed();
    (init.send_cq, init.recv_cq, init.pd) = (end.cq, end.cq, end.pd);
    init.qp_type = ibv_qp_type::IBV_QPT_UD;
    init.cap = ibv_qp_cap { max_send_wr: 8, max_recv_wr: 8, max_send_sge: 1, max_recv_sge: 1, ..zeroed() };
    init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
        | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
    init.send_ops_flags = ibv_qp_create_send_ops_flags::IBV_QP_EX_WITH_SEND.0.into();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(end.qp), 0);
        end.qp = ibv_create_qp_ex(end.context, &mut init);
    }
    assert!(!end.qp.is_null(), "errno {}", errno());
}

/// `rxe_get_av` of the kernel's Soft-RoCE.
#[test]
fn an_address_handle_serves_queue_pairs_of_its_domain() {
    let ud = Options { qp_type: ibv_qp_type::IBV_QPT_UD, ..Options::default() };
    for built in [false, true] {
        let (mut a, b) = (End::new(ud), End::new(ud));
        if built {
            with_built_requests(&mut a);
        }
        a.connect(b.address());
        b.connect(a.address());
        let to = b.address();
        let send = |ah| unsafe {
            if !built {
                return a.post(1, Op::IBV_WR_SEND, 0, 8, |wr| {
                    (wr.wr.ud.ah, wr.wr.ud.remote_qpn, wr.wr.ud.remote_qkey) = (ah, to.qp_num, 0x1111_1111);
                });
            }
            let (qp, sge) = (v().ibv_qp_to_qp_ex.unwrap()(a.qp), a.sge(0, 8));
            (*qp).wr_start.unwrap()(qp);
            (*qp).wr_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
            (*qp).wr_send.unwrap()(qp);
            (*qp).wr_set_ud_addr.unwrap()(qp, ah, to.qp_num, 0x1111_1111);
            (*qp).wr_set_sge.unwrap()(qp, sge.lkey, sge.addr, sge.length);
            (*qp).wr_complete.unwrap()(qp)
        };
        assert_eq!((b.post_recv(1, 0, 100), b.post_recv(2, 0, 100)), (0, 0));
        unsafe {
            let other = (v().ibv_alloc_pd)(a.context);
            let mut attr = ibv_parent_domain_init_attr { pd: a.pd, ..zeroed() };
            let parent = ibv_alloc_parent_domain(a.context, &mut attr);
            let [own, same, foreign] = [a.pd, parent, other].map(|pd| address_handle(pd, to));
            for ah in [own, same] {
                assert_eq!(send(ah), 0);
                a.wait_success();
                b.wait_success();
            }
            assert_eq!(send(foreign), 0);
            assert_eq!(a.wait().status, Status::IBV_WC_LOC_QP_OP_ERR);
            for ah in [own, same, foreign] {
                assert_eq!((v().ibv_destroy_ah)(ah), 0);
            }
            for pd in [parent, other] {
                assert_eq!((v().ibv_dealloc_pd)(pd), 0);
            }
        }
    }
}

#[test]
fn domains_in_use_are_not_deallocated() {
    let end = End::new(Options::default());
    unsafe {
        let td = ibv_alloc_td(end.context, &mut zeroed());
        let mut attr = ibv_parent_domain_init_attr { pd: end.pd, td, ..zeroed() };
        let parent = ibv_alloc_parent_domain(end.context, &mut attr);
        assert!(!parent.is_null(), "errno {}", errno());
        assert_eq!(ibv_dealloc_td(td), libc::EBUSY);
        let mr = (v().ibv_reg_mr)(parent, end.memory.as_ptr().cast_mut().cast(), 8, 1);
        assert!(!mr.is_null(), "errno {}", errno());
        assert_eq!((v().ibv_dealloc_pd)(parent), libc::EBUSY);
        assert_eq!((v().ibv_dereg_mr)(mr), 0);
        assert_eq!((v().ibv_dealloc_pd)(parent), 0);
        assert_eq!(ibv_dealloc_td(td), 0);
    }
}

/// The kernel looks for what an object is made of in the context that it is made on.
#[test]
fn objects_of_different_contexts_do_not_mix() {
    let ends = [(); 2].map(|()| End::new(Options { srq: true, events: true, ..Options::default() }));
    let [a, b] = &ends;
    let refused = |is_null: bool, what: &str| assert_eq!((is_null, errno()), (true, libc::EINVAL), "{what}");
    unsafe {
        let mut own: ibv_qp_init_attr = zeroed();
        (own.send_cq, own.recv_cq, own.srq, own.qp_type) = (a.cq, a.cq, a.srq, ibv_qp_type::IBV_QPT_RC);
        let create = |mut init| (v().ibv_create_qp)(a.pd, &mut init).is_null();
        refused(create(ibv_qp_init_attr { send_cq: b.cq, ..own }), "send queue");
        refused(create(ibv_qp_init_attr { recv_cq: b.cq, ..own }), "receive queue");
        refused(create(ibv_qp_init_attr { srq: b.srq, ..own }), "shared receive queue");
        let mut init: ibv_qp_init_attr_ex = zeroed();
        (init.send_cq, init.recv_cq, init.pd, init.qp_type) = (a.cq, a.cq, b.pd, own.qp_type);
        init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0;
        refused(ibv_create_qp_ex(a.context, &mut init).is_null(), "protection domain");

        let cq = (v().ibv_create_cq)(a.context, 8, ptr::null_mut(), b.channel, 0);
        refused(cq.is_null(), "completion channel");

        let mut init: ibv_srq_init_attr_ex = zeroed();
        (init.attr.max_wr, init.attr.max_sge, init.pd) = (8, 1, b.pd);
        init.comp_mask = ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_PD.0;
        let verbs = verbs_get_ctx(a.context).unwrap();
        refused(
            (*verbs).create_srq_ex.unwrap()(a.context, &mut init).is_null(),
            "protection domain of a shared queue",
        );

        let td = ibv_alloc_td(b.context, &mut zeroed());
        for mut attr in [
            ibv_parent_domain_init_attr { pd: b.pd, ..zeroed() },
            ibv_parent_domain_init_attr { pd: a.pd, td, ..zeroed() },
        ] {
            refused(ibv_alloc_parent_domain(a.context, &mut attr).is_null(), "domain of a parent domain");
        }
        assert_eq!(ibv_dealloc_td(td), 0);

        let flags = ibv_rereg_mr_flags::IBV_REREG_MR_CHANGE_PD.0 as i32;
        let code = v().ibv_rereg_mr.unwrap()(a.mr, flags, b.pd, ptr::null_mut(), 0, 0);
        assert_eq!(code, ibv_rereg_mr_err_code::IBV_REREG_MR_ERR_INPUT.0);
        assert_eq!((errno(), (*a.mr).pd), (libc::EINVAL, a.pd));
    }
}
