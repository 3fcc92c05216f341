//! The loop over the C interface, as a C program has it: what everything else is held against.

use std::ptr;
use std::time::Duration;

use verbs_sys::inline::{ibv_poll_cq, ibv_post_recv, ibv_post_send};
use verbs_sys::*;

use crate::{DEPTH, Operation, SIZE, Which, timed};

const BATCH: i32 = 16;
/// [`SIZE`](crate::SIZE), as verbs has lengths.
const LENGTH: u32 = 64;

/// Live objects of one queue pair, connected to itself, for as long as the process.
struct Objects {
    qp: *mut ibv_qp,
    cq: *mut ibv_cq,
    /// Of a message to send, a message to receive, and what peers reach.
    address: u64,
    lkey: u32,
    rkey: u32,
}

pub(crate) fn run(device: Which, operation: Operation, iterations: u64) -> Duration {
    let objects = set_up(match device {
        Which::Null => null::verbs(),
        Which::Soft => rdma_soft::verbs(),
    });
    timed(|| measured(&objects, operation, iterations))
}

#[inline(never)]
fn measured(objects: &Objects, operation: Operation, iterations: u64) {
    let (output, input, remote) =
        (objects.address, objects.address + SIZE as u64, objects.address + 2 * SIZE as u64);
    let opcode = match operation {
        Operation::Send | Operation::RecvFirst => ibv_wr_opcode::IBV_WR_SEND,
        Operation::Write => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        Operation::Read => ibv_wr_opcode::IBV_WR_RDMA_READ,
        Operation::FetchAdd => ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD,
    };
    let length = if operation == Operation::FetchAdd { 8 } else { LENGTH };
    for i in 0..iterations {
        let mut taken = ibv_sge { addr: output, length, lkey: objects.lkey };
        let mut send = ibv_send_wr {
            wr_id: 2 * i + 1,
            sg_list: &raw mut taken,
            num_sge: 1,
            opcode,
            send_flags: ibv_send_flags::IBV_SEND_SIGNALED.0,
            ..Default::default()
        };
        match operation {
            Operation::Send | Operation::RecvFirst => {
                let mut filled = ibv_sge { addr: input, length: LENGTH, lkey: objects.lkey };
                let mut receive =
                    ibv_recv_wr { wr_id: 2 * i, next: ptr::null_mut(), sg_list: &raw mut filled, num_sge: 1 };
                let mut bad = ptr::null_mut();
                // SAFETY: a live pair and a list of one valid request.
                assert_eq!(unsafe { ibv_post_recv(objects.qp, &raw mut receive, &raw mut bad) }, 0);
            }
            Operation::Write | Operation::Read => {
                send.wr.rdma.remote_addr = remote;
                send.wr.rdma.rkey = objects.rkey;
            }
            Operation::FetchAdd => {
                send.wr.atomic = ibv_send_wr__bindgen_ty_2__bindgen_ty_2 {
                    remote_addr: remote,
                    compare_add: 1,
                    swap: 0,
                    rkey: objects.rkey,
                };
            }
        }
        let mut bad = ptr::null_mut();
        // SAFETY: as above.
        assert_eq!(unsafe { ibv_post_send(objects.qp, &raw mut send, &raw mut bad) }, 0);
        let mut missing = if matches!(operation, Operation::Send | Operation::RecvFirst) { 2 } else { 1 };
        while missing > 0 {
            let mut wc = [const { std::mem::MaybeUninit::<ibv_wc>::uninit() }; BATCH as usize];
            // SAFETY: a live queue, and room for `BATCH` entries.
            let count = unsafe { ibv_poll_cq(objects.cq, BATCH, wc.as_mut_ptr().cast()) };
            let count = usize::try_from(count).expect("no error");
            for wc in &wc[..count] {
                // SAFETY: the provider wrote `count` entries.
                assert_eq!(unsafe { wc.assume_init_ref() }.status, ibv_wc_status::IBV_WC_SUCCESS);
            }
            missing -= count;
        }
    }
}

fn set_up(verbs: &'static Verbs) -> Objects {
    let memory = Box::leak(Box::new([0_u64; 3 * SIZE / 8]));
    let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
        | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
        | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
        | ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC.0;
    let bytes = size_of_val(memory);
    let address = memory.as_mut_ptr();
    // SAFETY: a list that is never freed.
    let devices = unsafe { (verbs.ibv_get_device_list)(ptr::null_mut()) };
    assert!(!devices.is_null(), "a device");
    // SAFETY: the list ends with a null pointer, and has at least that.
    let device = unsafe { *devices };
    // SAFETY: a device of the list.
    let context = unsafe { (verbs.ibv_open_device)(device) };
    assert!(!context.is_null(), "an open device");
    // SAFETY: a live context, as below: nothing is ever destroyed.
    let pd = unsafe { (verbs.ibv_alloc_pd)(context) };
    // SAFETY: a live domain, and memory that lives as long as the process.
    let mr = unsafe { (verbs.ibv_reg_mr)(pd, address.cast(), bytes, access.cast_signed()) };
    // SAFETY: a live context.
    let cq = unsafe { (verbs.ibv_create_cq)(context, 2 * DEPTH as i32, ptr::null_mut(), ptr::null_mut(), 0) };
    let mut init = ibv_qp_init_attr {
        send_cq: cq,
        recv_cq: cq,
        qp_type: ibv_qp_type::IBV_QPT_RC,
        cap: ibv_qp_cap {
            max_send_wr: DEPTH,
            max_recv_wr: DEPTH,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        },
        ..Default::default()
    };
    // SAFETY: a live domain and queue.
    let qp = unsafe { (verbs.ibv_create_qp)(pd, &raw mut init) };
    assert!(!mr.is_null() && !qp.is_null(), "a region and a queue pair");
    connect(verbs, context, qp, access);
    // SAFETY: a live region, whose public fields do not change.
    let ibv_mr { lkey, rkey, .. } = unsafe { &*mr };
    Objects { qp, cq, address: address.expose_provenance() as u64, lkey: *lkey, rkey: *rkey }
}

/// Brings a live queue pair from RESET to RTS, as its own peer.
fn connect(verbs: &Verbs, context: *mut ibv_context, qp: *mut ibv_qp, access: u32) {
    use ibv_qp_attr_mask as Mask;
    // Where both built-in devices have the GID of their IPv4 address.
    const GID_INDEX: u8 = 1;
    let mut gid = ibv_gid { raw: [0; 16] };
    // SAFETY: a live context, and room for the GID.
    assert_eq!(unsafe { (verbs.ibv_query_gid)(context, 1, GID_INDEX.into(), &raw mut gid) }, 0);
    let mut attr = ibv_qp_attr {
        port_num: 1,
        qp_access_flags: access,
        path_mtu: ibv_mtu::IBV_MTU_1024,
        // SAFETY: a live queue pair, whose number does not change.
        dest_qp_num: unsafe { (*qp).qp_num },
        max_dest_rd_atomic: 1,
        max_rd_atomic: 1,
        min_rnr_timer: 12,
        timeout: 14,
        retry_cnt: 6,
        rnr_retry: 7,
        ah_attr: ibv_ah_attr { is_global: 1, port_num: 1, ..Default::default() },
        ..Default::default()
    };
    attr.ah_attr.grh.dgid = gid;
    attr.ah_attr.grh.sgid_index = GID_INDEX;
    attr.ah_attr.grh.hop_limit = 64;
    let init = Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS;
    let rtr = Mask::IBV_QP_AV
        | Mask::IBV_QP_PATH_MTU
        | Mask::IBV_QP_DEST_QPN
        | Mask::IBV_QP_RQ_PSN
        | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
        | Mask::IBV_QP_MIN_RNR_TIMER;
    let rts = Mask::IBV_QP_SQ_PSN
        | Mask::IBV_QP_TIMEOUT
        | Mask::IBV_QP_RETRY_CNT
        | Mask::IBV_QP_RNR_RETRY
        | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
    for (state, mask) in [
        (ibv_qp_state::IBV_QPS_INIT, init),
        (ibv_qp_state::IBV_QPS_RTR, rtr),
        (ibv_qp_state::IBV_QPS_RTS, rts),
    ] {
        attr.qp_state = state;
        let mask = (mask | Mask::IBV_QP_STATE).0.cast_signed();
        // SAFETY: a live queue pair and valid attributes.
        assert_eq!(unsafe { (verbs.ibv_modify_qp)(qp, &raw mut attr, mask) }, 0, "{state:?}");
    }
}
