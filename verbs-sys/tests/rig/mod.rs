//! A device, a completion queue and a queue pair of one test provider, behind functions that read as a script.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::missing_panics_doc, reason = "test code")]

use core::ffi::{CStr, c_int};
use core::ptr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use verbs_sys::inline::{ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_post_srq_recv, ibv_req_notify_cq};
use verbs_sys::*;

pub(crate) use verbs_sys::{
    ibv_qp_state as State, ibv_wc_opcode as Completion, ibv_wc_status as Status, ibv_wr_opcode as Request,
};

pub(crate) const DEPTH: u32 = 4;

/// How to build a [`Rig`].
pub(crate) struct Plan {
    pub(crate) qp_type: ibv_qp_type,
    pub(crate) channel: bool,
    pub(crate) srq: bool,
    pub(crate) cqe: c_int,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan { qp_type: ibv_qp_type::IBV_QPT_RC, channel: false, srq: false, cqe: 16 }
    }
}

/// One of each object; all are live until [`close`](Rig::close).
pub(crate) struct Rig {
    pub(crate) verbs: &'static Verbs,
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) cq: *mut ibv_cq,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) qp: *mut ibv_qp,
}

// SAFETY: verbs may be called from any thread, and the pointers stay valid until `close`.
unsafe impl Send for Rig {}
// SAFETY: as above.
unsafe impl Sync for Rig {}

/// Opens a device by name; null with `errno` set when the provider refuses.
pub(crate) fn open(verbs: &'static Verbs, name: &str) -> *mut ibv_context {
    let mut count = 0;
    // SAFETY: a valid output pointer.
    let list = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
    assert!(!list.is_null() && count > 0);
    let mut found = ptr::null_mut();
    for i in 0..count as usize {
        // SAFETY: the list has `count` entries.
        let device = unsafe { *list.wrapping_add(i) };
        // SAFETY: a device of the list.
        let raw = unsafe { (verbs.ibv_get_device_name)(device) };
        // SAFETY: a name is a C string that lives as long as its device.
        if unsafe { CStr::from_ptr(raw) }.to_str() == Ok(name) {
            found = device;
        }
    }
    assert!(!found.is_null(), "the provider lists {name}");
    // SAFETY: the device is on the list.
    let context = unsafe { (verbs.ibv_open_device)(found) };
    // SAFETY: a list that was not freed before.
    unsafe { (verbs.ibv_free_device_list)(list) };
    context
}

pub(crate) fn sge(length: u32) -> ibv_sge {
    ibv_sge { addr: 0x1000, length, lkey: 0 }
}

/// A send request without buffers.
pub(crate) fn request(wr_id: u64, opcode: Request, flags: ibv_send_flags) -> ibv_send_wr {
    ibv_send_wr { wr_id, opcode, send_flags: flags.0, ..Default::default() }
}

pub(crate) const SIGNALED: ibv_send_flags = ibv_send_flags::IBV_SEND_SIGNALED;
pub(crate) const SILENT: ibv_send_flags = ibv_send_flags(0);

impl Rig {
    pub(crate) fn new(verbs: &'static Verbs, device: &str, plan: &Plan) -> Rig {
        let context = open(verbs, device);
        assert!(!context.is_null());
        // SAFETY: a live context.
        let pd = unsafe { (verbs.ibv_alloc_pd)(context) };
        let channel = if plan.channel {
            // SAFETY: a live context.
            unsafe { (verbs.ibv_create_comp_channel)(context) }
        } else {
            ptr::null_mut()
        };
        // SAFETY: live objects.
        let cq = unsafe { (verbs.ibv_create_cq)(context, plan.cqe, ptr::null_mut(), channel, 0) };
        let cap = ibv_qp_cap {
            max_send_wr: DEPTH,
            max_recv_wr: DEPTH,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut srq = ptr::null_mut();
        if plan.srq {
            let attr = ibv_srq_attr { max_wr: DEPTH, max_sge: 1, srq_limit: 0 };
            let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
            // SAFETY: a live domain, valid attributes.
            srq = unsafe { (verbs.ibv_create_srq)(pd, &raw mut init) };
        }
        let mut init = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: cq,
            recv_cq: cq,
            srq,
            cap,
            qp_type: plan.qp_type,
            sq_sig_all: 0,
        };
        // SAFETY: live objects, valid attributes.
        let qp = unsafe { (verbs.ibv_create_qp)(pd, &raw mut init) };
        assert!(!pd.is_null() && !cq.is_null() && !qp.is_null());
        Rig { verbs, context, pd, channel, cq, srq, qp }
    }

    /// As [`new`](Rig::new), and the pair is in RTS.
    pub(crate) fn ready(verbs: &'static Verbs, device: &str, plan: &Plan) -> Rig {
        let rig = Rig::new(verbs, device, plan);
        for state in [State::IBV_QPS_INIT, State::IBV_QPS_RTR, State::IBV_QPS_RTS] {
            assert_eq!(rig.modify(state), 0, "to {state:?}");
        }
        rig
    }

    /// Commands a state, with all the attributes that an RC transition needs.
    pub(crate) fn modify(&self, to: State) -> c_int {
        use ibv_qp_attr_mask as Mask;
        let mask = match to {
            State::IBV_QPS_INIT => Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS,
            State::IBV_QPS_RTR => {
                Mask::IBV_QP_AV
                    | Mask::IBV_QP_PATH_MTU
                    | Mask::IBV_QP_DEST_QPN
                    | Mask::IBV_QP_RQ_PSN
                    | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
                    | Mask::IBV_QP_MIN_RNR_TIMER
            }
            State::IBV_QPS_RTS => {
                Mask::IBV_QP_SQ_PSN
                    | Mask::IBV_QP_TIMEOUT
                    | Mask::IBV_QP_RETRY_CNT
                    | Mask::IBV_QP_RNR_RETRY
                    | Mask::IBV_QP_MAX_QP_RD_ATOMIC
            }
            _ => Mask(0),
        };
        self.modify_with(to, mask)
    }

    /// Commands a state, naming only the attributes in `mask`.
    pub(crate) fn modify_with(&self, to: State, mask: ibv_qp_attr_mask) -> c_int {
        let mut attr = ibv_qp_attr {
            qp_state: to,
            path_mtu: ibv_mtu::IBV_MTU_1024,
            port_num: 1,
            ah_attr: ibv_ah_attr { is_global: 1, port_num: 1, ..Default::default() },
            ..Default::default()
        };
        attr.ah_attr.grh.sgid_index = 1;
        let mask = (mask | ibv_qp_attr_mask::IBV_QP_STATE).0.cast_signed();
        // SAFETY: a live pair, valid attributes.
        unsafe { (self.verbs.ibv_modify_qp)(self.qp, &raw mut attr, mask) }
    }

    /// The state that the device reports.
    pub(crate) fn state(&self) -> State {
        let mut attr = ibv_qp_attr::default();
        let mut init = ibv_qp_init_attr::default();
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0.cast_signed();
        // SAFETY: a live pair, valid output pointers.
        assert_eq!(unsafe { (self.verbs.ibv_query_qp)(self.qp, &raw mut attr, mask, &raw mut init) }, 0);
        attr.qp_state
    }

    /// Posts one request of `length` bytes: the errno.
    pub(crate) fn send(&self, wr: ibv_send_wr, length: u32) -> c_int {
        self.send_from(wr, sge(length))
    }

    pub(crate) fn send_from(&self, mut wr: ibv_send_wr, mut list: ibv_sge) -> c_int {
        wr.sg_list = &raw mut list;
        wr.num_sge = 1;
        self.post(&mut [wr]).0
    }

    /// Posts a chain: the errno, and the index of the request that was refused.
    pub(crate) fn post(&self, chain: &mut [ibv_send_wr]) -> (c_int, Option<usize>) {
        let first = chain.as_mut_ptr();
        for i in 1..chain.len() {
            // Through the pointer that the provider gets, not through the slice.
            let link = first.wrapping_add(i - 1);
            // SAFETY: within the slice.
            unsafe { (*link).next = first.wrapping_add(i) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: a live pair and a terminated list of valid requests.
        let errno = unsafe { ibv_post_send(self.qp, first, &raw mut bad) };
        let refused = (!bad.is_null()).then(|| (bad.addr() - first.addr()) / size_of::<ibv_send_wr>());
        (errno, refused)
    }

    /// Posts one receive of `length` bytes, to the shared queue where there is one: the errno.
    pub(crate) fn receive(&self, wr_id: u64, length: u32) -> c_int {
        self.receive_into(wr_id, sge(length))
    }

    pub(crate) fn receive_into(&self, wr_id: u64, mut list: ibv_sge) -> c_int {
        let mut wr = ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &raw mut list, num_sge: 1 };
        let mut bad = ptr::null_mut();
        if self.srq.is_null() {
            // SAFETY: a live pair and one valid request.
            unsafe { ibv_post_recv(self.qp, &raw mut wr, &raw mut bad) }
        } else {
            // SAFETY: a live queue and one valid request.
            unsafe { ibv_post_srq_recv(self.srq, &raw mut wr, &raw mut bad) }
        }
    }

    /// One call of `ibv_poll_cq`: what it returned, and the entries it was given room for.
    pub(crate) fn poll_raw<const N: usize>(&self) -> (c_int, [ibv_wc; N]) {
        let mut wc = [ibv_wc::default(); N];
        let room = c_int::try_from(N).expect("a small array");
        // SAFETY: a live queue, and room for what is asked.
        (unsafe { ibv_poll_cq(self.cq, room, wc.as_mut_ptr()) }, wc)
    }

    /// Every completion there is.
    pub(crate) fn poll(&self) -> Vec<ibv_wc> {
        let mut all = Vec::new();
        loop {
            let (count, wc) = self.poll_raw::<4>();
            assert!((0..=4).contains(&count));
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&wc[..count as usize]);
        }
    }

    /// Every completion, as work request and status.
    pub(crate) fn statuses(&self) -> Vec<(u64, Status)> {
        self.poll().iter().map(|wc| (wc.wr_id, wc.status)).collect()
    }

    pub(crate) fn arm(&self, solicited_only: bool) {
        // SAFETY: a live queue.
        assert_eq!(unsafe { ibv_req_notify_cq(self.cq, solicited_only.into()) }, 0);
    }

    /// Whether the channel's descriptor is readable now.
    pub(crate) fn has_event(&self) -> bool {
        // SAFETY: a live channel.
        readable(unsafe { (*self.channel).fd })
    }

    /// Takes one event from the channel; waits for it.
    pub(crate) fn take_event(&self) -> *mut ibv_cq {
        let mut cq = ptr::null_mut();
        let mut user = ptr::null_mut();
        // SAFETY: a live channel, valid output pointers.
        assert_eq!(unsafe { (self.verbs.ibv_get_cq_event)(self.channel, &raw mut cq, &raw mut user) }, 0);
        cq
    }

    pub(crate) fn acknowledge(&self, count: u32) {
        // SAFETY: a live queue.
        unsafe { (self.verbs.ibv_ack_cq_events)(self.cq, count) };
    }

    /// Takes and acknowledges an asynchronous event, if there is one.
    pub(crate) fn async_event(&self) -> Option<ibv_event_type> {
        // SAFETY: a live context.
        if !readable(unsafe { (*self.context).async_fd }) {
            return None;
        }
        // SAFETY: all zeroes is a valid event.
        let mut event: ibv_async_event = unsafe { core::mem::zeroed() };
        // SAFETY: a live context, a valid output pointer.
        assert_eq!(unsafe { (self.verbs.ibv_get_async_event)(self.context, &raw mut event) }, 0);
        // SAFETY: the event that was just taken.
        unsafe { (self.verbs.ibv_ack_async_event)(&raw mut event) };
        Some(event.event_type)
    }

    /// Destroys everything, children first; each step must succeed.
    pub(crate) fn close(self) {
        let verbs = self.verbs;
        // SAFETY: live, and its children are gone; so below.
        assert_eq!(unsafe { (verbs.ibv_destroy_qp)(self.qp) }, 0);
        if !self.srq.is_null() {
            // SAFETY: as above.
            assert_eq!(unsafe { (verbs.ibv_destroy_srq)(self.srq) }, 0);
        }
        // SAFETY: as above.
        assert_eq!(unsafe { (verbs.ibv_destroy_cq)(self.cq) }, 0);
        if !self.channel.is_null() {
            // SAFETY: as above.
            assert_eq!(unsafe { (verbs.ibv_destroy_comp_channel)(self.channel) }, 0);
        }
        // SAFETY: as above.
        assert_eq!(unsafe { (verbs.ibv_dealloc_pd)(self.pd) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { (verbs.ibv_close_device)(self.context) }, 0);
    }
}

/// Asks an epoll descriptor, edge-triggered and used once: the one way that Miri knows.
fn readable(fd: c_int) -> bool {
    // SAFETY: no precondition.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    assert!(epoll >= 0);
    // SAFETY: just created, and nobody else has it.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET).cast_unsigned(), u64: 0 };
    // SAFETY: open descriptors, a valid event.
    assert_eq!(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) }, 0);
    // SAFETY: room for one event.
    unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, 0) == 1 }
}
