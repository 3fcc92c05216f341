//! The loop of `c-loop.c`, over the functions of verbs-sys: what the seam itself costs.
//!
//! usage: raw ITERATIONS

use core::ptr;
use std::process::ExitCode;

use verbs_sys::inline::{ibv_poll_cq, ibv_post_recv, ibv_post_send};
use verbs_sys::*;

const SIZE: u32 = 64;
const DEPTH: u32 = 64;
const BATCH: usize = 16;

/// # Safety
///
/// Live objects; the region covers two messages.
#[inline(never)]
unsafe fn measured(qp: *mut ibv_qp, cq: *mut ibv_cq, mr: &ibv_mr, iterations: u64) -> u64 {
    let start = mr.addr.expose_provenance() as u64;
    let mut received = 0;
    for i in 0..iterations {
        let mut input = ibv_sge { addr: start, length: SIZE, lkey: mr.lkey };
        let mut output = ibv_sge { addr: start + u64::from(SIZE), length: SIZE, lkey: mr.lkey };
        let mut receive =
            ibv_recv_wr { wr_id: 2 * i, next: ptr::null_mut(), sg_list: &raw mut input, num_sge: 1 };
        let mut send = ibv_send_wr {
            wr_id: 2 * i + 1,
            sg_list: &raw mut output,
            num_sge: 1,
            opcode: ibv_wr_opcode::IBV_WR_SEND,
            send_flags: ibv_send_flags::IBV_SEND_SIGNALED.0,
            ..Default::default()
        };
        let mut bad_receive = ptr::null_mut();
        let mut bad_send = ptr::null_mut();
        // SAFETY: a live pair and a list of one valid request.
        assert_eq!(unsafe { ibv_post_recv(qp, &raw mut receive, &raw mut bad_receive) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { ibv_post_send(qp, &raw mut send, &raw mut bad_send) }, 0);
        let mut completed = 0;
        while completed < 2 {
            let mut wc = [const { core::mem::MaybeUninit::<ibv_wc>::uninit() }; BATCH];
            // SAFETY: a live queue, and room for `BATCH` entries.
            let count = unsafe { ibv_poll_cq(cq, BATCH as i32, wc.as_mut_ptr().cast()) };
            assert!(count >= 0);
            for wc in &wc[..count as usize] {
                // SAFETY: the provider wrote `count` entries.
                let wc = unsafe { wc.assume_init_ref() };
                assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
                if wc.opcode == ibv_wc_opcode::IBV_WC_RECV {
                    received += u64::from(wc.byte_len);
                }
            }
            completed += count;
        }
    }
    received
}

fn main() -> ExitCode {
    let iterations = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1000);
    let verbs = Verbs::load().expect("the null provider stands in for libibverbs");
    let mut memory = [0_u8; 2 * SIZE as usize];
    let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0.cast_signed();
    let cap = ibv_qp_cap {
        max_send_wr: DEPTH,
        max_recv_wr: DEPTH,
        max_send_sge: 1,
        max_recv_sge: 1,
        max_inline_data: 0,
    };
    // SAFETY: each call has live objects and valid attributes; the memory outlives the loop, and the
    // process ends with its objects.
    let received = unsafe {
        let devices = (verbs.ibv_get_device_list)(ptr::null_mut());
        assert!(!devices.is_null() && !(*devices).is_null());
        let context = (verbs.ibv_open_device)(*devices);
        let pd = (verbs.ibv_alloc_pd)(context);
        let mr = (verbs.ibv_reg_mr)(pd, memory.as_mut_ptr().cast(), memory.len(), access);
        let cq = (verbs.ibv_create_cq)(context, 2 * DEPTH as i32, ptr::null_mut(), ptr::null_mut(), 0);
        let mut init = ibv_qp_init_attr {
            send_cq: cq,
            recv_cq: cq,
            qp_type: ibv_qp_type::IBV_QPT_RC,
            cap,
            ..Default::default()
        };
        let qp = (verbs.ibv_create_qp)(pd, &raw mut init);
        assert!(!mr.is_null() && !cq.is_null() && !qp.is_null());
        connect(verbs, qp);
        measured(qp, cq, &*mr, iterations)
    };
    println!("{received} bytes received");
    if received == iterations * u64::from(SIZE) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// # Safety
///
/// `qp` is live and in RESET.
unsafe fn connect(verbs: &Verbs, qp: *mut ibv_qp) {
    use ibv_qp_attr_mask as Mask;
    let mut attr = ibv_qp_attr {
        port_num: 1,
        path_mtu: ibv_mtu::IBV_MTU_1024,
        ah_attr: ibv_ah_attr { is_global: 1, port_num: 1, ..Default::default() },
        ..Default::default()
    };
    attr.ah_attr.grh.sgid_index = 1;
    for (state, mask) in [
        (ibv_qp_state::IBV_QPS_INIT, Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS),
        (
            ibv_qp_state::IBV_QPS_RTR,
            Mask::IBV_QP_AV
                | Mask::IBV_QP_PATH_MTU
                | Mask::IBV_QP_DEST_QPN
                | Mask::IBV_QP_RQ_PSN
                | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | Mask::IBV_QP_MIN_RNR_TIMER,
        ),
        (
            ibv_qp_state::IBV_QPS_RTS,
            Mask::IBV_QP_SQ_PSN
                | Mask::IBV_QP_TIMEOUT
                | Mask::IBV_QP_RETRY_CNT
                | Mask::IBV_QP_RNR_RETRY
                | Mask::IBV_QP_MAX_QP_RD_ATOMIC,
        ),
    ] {
        attr.qp_state = state;
        let mask = (mask | Mask::IBV_QP_STATE).0.cast_signed();
        // SAFETY: the caller's promise, and valid attributes.
        assert_eq!(unsafe { (verbs.ibv_modify_qp)(qp, &raw mut attr, mask) }, 0, "{state:?}");
    }
}
