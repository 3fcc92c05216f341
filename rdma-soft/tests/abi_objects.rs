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
