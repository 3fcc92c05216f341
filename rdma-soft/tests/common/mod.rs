//! A small harness over the table of functions: what a C program would write.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "a harness that does as a C program would"
)]

use std::ptr;
use std::time::{Duration, Instant};

use verbs_sys::inline::*;
use verbs_sys::*;

pub fn v() -> &'static Verbs {
    rdma_soft::verbs()
}

pub fn open() -> *mut ibv_context {
    // SAFETY: list, open and free are called as the manual pages say.
    unsafe {
        let list = (v().ibv_get_device_list)(ptr::null_mut());
        let context = (v().ibv_open_device)(*list);
        (v().ibv_free_device_list)(list);
        assert!(!context.is_null(), "{:?}", rdma_soft::last_error());
        context
    }
}

pub fn zeroed<T>() -> T {
    // SAFETY: used for C structures of plain data only.
    unsafe { std::mem::zeroed() }
}

/// What a peer has to know.
#[derive(Debug, Clone, Copy)]
pub struct Address {
    pub gid: [u8; 16],
    pub qp_num: u32,
    pub psn: u32,
    pub va: u64,
    pub rkey: u32,
}

impl Address {
    pub fn to_line(self) -> String {
        let gid: String = self.gid.iter().map(|b| format!("{b:02x}")).collect();
        format!("{gid} {} {} {} {}", self.qp_num, self.psn, self.va, self.rkey)
    }

    pub fn from_line(line: &str) -> Address {
        let words: Vec<&str> = line.split_whitespace().collect();
        let byte = |i: usize| u8::from_str_radix(&words[0][2 * i..2 * i + 2], 16).unwrap();
        Address {
            gid: std::array::from_fn(byte),
            qp_num: words[1].parse().unwrap(),
            psn: words[2].parse().unwrap(),
            va: words[3].parse().unwrap(),
            rkey: words[4].parse().unwrap(),
        }
    }
}

/// How an end is made.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub qp_type: ibv_qp_type,
    pub depth: u32,
    pub size: usize,
    pub mtu: u32,
    pub events: bool,
    pub access: u32,
    pub srq: bool,
    pub timeout: u8,
    pub retry: u8,
    pub rnr_retry: u8,
    pub max_inline: u32,
}

pub const ALL_ACCESS: u32 = 1 | 2 | 4 | 8 | 16;

impl Default for Options {
    fn default() -> Self {
        Options {
            qp_type: ibv_qp_type::IBV_QPT_RC,
            depth: 64,
            size: 1 << 16,
            mtu: 5,
            events: false,
            access: ALL_ACCESS,
            srq: false,
            timeout: 14,
            retry: 6,
            rnr_retry: 7,
            max_inline: 64,
        }
    }
}

/// One queue pair with everything it needs.
pub struct End {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub channel: *mut ibv_comp_channel,
    pub cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub qp: *mut ibv_qp,
    pub mr: *mut ibv_mr,
    pub memory: Vec<u8>,
    pub options: Options,
}

impl End {
    pub fn new(options: Options) -> End {
        let context = open();
        let mut memory = vec![0u8; options.size];
        // SAFETY: objects are created as the manual pages say; the memory outlives its registration.
        unsafe {
            let pd = (v().ibv_alloc_pd)(context);
            assert!(!pd.is_null());
            let mr = (v().ibv_reg_mr)(pd, memory.as_mut_ptr().cast(), memory.len(), options.access as i32);
            assert!(!mr.is_null(), "errno {}", errno());
            let channel =
                if options.events { (v().ibv_create_comp_channel)(context) } else { ptr::null_mut() };
            let cq = (v().ibv_create_cq)(context, (options.depth * 2) as i32, ptr::null_mut(), channel, 0);
            assert!(!cq.is_null());
            let srq = if options.srq {
                let mut init: ibv_srq_init_attr = zeroed();
                init.attr.max_wr = options.depth;
                init.attr.max_sge = 2;
                (v().ibv_create_srq)(pd, &mut init)
            } else {
                ptr::null_mut()
            };
            let mut init: ibv_qp_init_attr = zeroed();
            init.send_cq = cq;
            init.recv_cq = cq;
            init.srq = srq;
            init.qp_type = options.qp_type;
            init.cap = ibv_qp_cap {
                max_send_wr: options.depth,
                max_recv_wr: options.depth,
                max_send_sge: 2,
                max_recv_sge: 2,
                max_inline_data: options.max_inline,
            };
            let qp = (v().ibv_create_qp)(pd, &mut init);
            assert!(!qp.is_null(), "errno {}", errno());
            End { context, pd, channel, cq, srq, qp, mr, memory, options }
        }
    }

    pub fn address(&self) -> Address {
        let mut gid: ibv_gid = zeroed();
        // SAFETY: live objects; a GID is bytes.
        unsafe {
            assert_eq!((v().ibv_query_gid)(self.context, 1, 1, &mut gid), 0);
            Address {
                gid: gid.raw,
                qp_num: (*self.qp).qp_num,
                psn: 0xff_fffe,
                va: (*self.mr).addr.addr() as u64,
                rkey: (*self.mr).rkey,
            }
        }
    }

    pub fn modify(&self, attr: &mut ibv_qp_attr, mask: ibv_qp_attr_mask) -> i32 {
        // SAFETY: live queue pair, valid attributes.
        unsafe { (v().ibv_modify_qp)(self.qp, attr, mask.0 as i32) }
    }

    pub fn to_init(&self) {
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = ibv_qp_state::IBV_QPS_INIT;
        attr.port_num = 1;
        attr.qp_access_flags = self.options.access & 0xe;
        attr.qkey = 0x1111_1111;
        let last = if self.options.qp_type == ibv_qp_type::IBV_QPT_UD {
            ibv_qp_attr_mask::IBV_QP_QKEY
        } else {
            ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS
        };
        let mask = ibv_qp_attr_mask::IBV_QP_STATE
            | ibv_qp_attr_mask::IBV_QP_PKEY_INDEX
            | ibv_qp_attr_mask::IBV_QP_PORT
            | last;
        assert_eq!(self.modify(&mut attr, mask), 0);
    }

    pub fn to_rtr(&self, peer: Address) {
        type M = ibv_qp_attr_mask;
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = ibv_qp_state::IBV_QPS_RTR;
        attr.path_mtu = ibv_mtu(self.options.mtu);
        attr.dest_qp_num = peer.qp_num;
        attr.rq_psn = peer.psn;
        attr.max_dest_rd_atomic = 16;
        attr.min_rnr_timer = 12;
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = 1;
        attr.ah_attr.grh.sgid_index = 1;
        attr.ah_attr.grh.dgid.raw = peer.gid;
        let connected = M::IBV_QP_AV | M::IBV_QP_PATH_MTU | M::IBV_QP_DEST_QPN | M::IBV_QP_RQ_PSN;
        let mask = match self.options.qp_type {
            ibv_qp_type::IBV_QPT_RC => {
                M::IBV_QP_STATE | connected | M::IBV_QP_MAX_DEST_RD_ATOMIC | M::IBV_QP_MIN_RNR_TIMER
            }
            ibv_qp_type::IBV_QPT_UC => M::IBV_QP_STATE | connected,
            _ => M::IBV_QP_STATE,
        };
        assert_eq!(self.modify(&mut attr, mask), 0);
    }

    pub fn to_rts(&self) {
        type M = ibv_qp_attr_mask;
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = ibv_qp_state::IBV_QPS_RTS;
        attr.sq_psn = 0xff_fffe;
        attr.timeout = self.options.timeout;
        attr.retry_cnt = self.options.retry;
        attr.rnr_retry = self.options.rnr_retry;
        attr.max_rd_atomic = 16;
        let mask = if self.options.qp_type == ibv_qp_type::IBV_QPT_RC {
            M::IBV_QP_STATE
                | M::IBV_QP_SQ_PSN
                | M::IBV_QP_TIMEOUT
                | M::IBV_QP_RETRY_CNT
                | M::IBV_QP_RNR_RETRY
                | M::IBV_QP_MAX_QP_RD_ATOMIC
        } else {
            M::IBV_QP_STATE | M::IBV_QP_SQ_PSN
        };
        assert_eq!(self.modify(&mut attr, mask), 0);
    }

    pub fn connect(&self, peer: Address) {
        self.to_init();
        self.to_rtr(peer);
        self.to_rts();
    }

    pub fn sge(&self, offset: usize, len: usize) -> ibv_sge {
        // SAFETY: live region.
        unsafe {
            ibv_sge {
                addr: (*self.mr).addr.addr() as u64 + offset as u64,
                length: u32::try_from(len).unwrap(),
                lkey: (*self.mr).lkey,
            }
        }
    }

    pub fn post_recv(&self, wr_id: u64, offset: usize, len: usize) -> i32 {
        let mut sge = self.sge(offset, len);
        let mut wr = ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: live queue, valid list.
        unsafe {
            if self.srq.is_null() {
                ibv_post_recv(self.qp, &mut wr, &mut bad)
            } else {
                ibv_post_srq_recv(self.srq, &mut wr, &mut bad)
            }
        }
    }

    /// Posts what `set` makes of a signalled request with one element.
    pub fn post(
        &self,
        wr_id: u64,
        opcode: ibv_wr_opcode,
        offset: usize,
        len: usize,
        set: impl FnOnce(&mut ibv_send_wr),
    ) -> i32 {
        let mut sge = self.sge(offset, len);
        let mut wr: ibv_send_wr = zeroed();
        wr.wr_id = wr_id;
        wr.sg_list = &mut sge;
        wr.num_sge = 1;
        wr.opcode = opcode;
        wr.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        set(&mut wr);
        let mut bad = ptr::null_mut();
        // SAFETY: live queue pair, valid list.
        unsafe { ibv_post_send(self.qp, &mut wr, &mut bad) }
    }

    pub fn send(&self, wr_id: u64, offset: usize, len: usize) -> i32 {
        self.post(wr_id, ibv_wr_opcode::IBV_WR_SEND, offset, len, |_| ())
    }

    pub fn rdma(
        &self,
        opcode: ibv_wr_opcode,
        wr_id: u64,
        offset: usize,
        len: usize,
        to: Address,
        at: usize,
    ) -> i32 {
        self.post(wr_id, opcode, offset, len, |wr| {
            wr.wr.rdma.remote_addr = to.va + at as u64;
            wr.wr.rdma.rkey = to.rkey;
        })
    }

    pub fn poll(&self) -> Option<ibv_wc> {
        let mut wc: ibv_wc = zeroed();
        // SAFETY: live queue, room for one.
        match unsafe { ibv_poll_cq(self.cq, 1, &mut wc) } {
            0 => None,
            1 => Some(wc),
            n => panic!("ibv_poll_cq: {n}"),
        }
    }

    /// The next completion, within ten seconds.
    pub fn wait(&self) -> ibv_wc {
        let mut begin = None;
        loop {
            for _ in 0..10_000 {
                if let Some(wc) = self.poll() {
                    return wc;
                }
            }
            let begin = *begin.get_or_insert_with(Instant::now);
            let limit = Duration::from_secs(10);
            assert!(begin.elapsed() < limit, "no completion within ten seconds; {:?}", rdma_soft::counters());
        }
    }

    pub fn wait_success(&self) -> ibv_wc {
        let wc = self.wait();
        assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS, "{:?}", wc.status.name());
        wc
    }

    /// The next completion, sleeping on the channel.
    pub fn wait_event(&self) -> ibv_wc {
        loop {
            if let Some(wc) = self.poll() {
                return wc;
            }
            // SAFETY: live objects.
            unsafe {
                assert_eq!(ibv_req_notify_cq(self.cq, 0), 0);
                if let Some(wc) = self.poll() {
                    return wc;
                }
                let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
                assert_eq!((v().ibv_get_cq_event)(self.channel, &mut cq, &mut context), 0);
                assert_eq!(cq, self.cq);
                (v().ibv_ack_cq_events)(cq, 1);
            }
        }
    }

    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let at = self.memory.as_ptr().wrapping_add(offset);
        // SAFETY: inside of the memory, which the device may write: no reference is made.
        (0..len).map(|i| unsafe { at.add(i).read_volatile() }).collect()
    }

    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.memory[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // SAFETY: each object is destroyed once, children first.
        unsafe {
            assert_eq!((v().ibv_destroy_qp)(self.qp), 0);
            if !self.srq.is_null() {
                assert_eq!((v().ibv_destroy_srq)(self.srq), 0);
            }
            assert_eq!((v().ibv_destroy_cq)(self.cq), 0);
            if !self.channel.is_null() {
                assert_eq!((v().ibv_destroy_comp_channel)(self.channel), 0);
            }
            assert_eq!((v().ibv_dereg_mr)(self.mr), 0);
            assert_eq!((v().ibv_dealloc_pd)(self.pd), 0);
            assert_eq!((v().ibv_close_device)(self.context), 0);
        }
    }
}

/// `fcntl(fd, F_SETFL, O_NONBLOCK)`, beside what is set.
pub fn set_nonblocking(fd: i32) {
    // SAFETY: numbers only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }, 0);
}

/// A multicast group of IPv4 that no other process uses.
pub fn group(number: u8) -> ibv_gid {
    let [.., a, b] = std::process::id().to_be_bytes();
    let mut raw = [0; 16];
    (raw[0], raw[1], raw[10], raw[11]) = (0xff, 0x0e, 0xff, 0xff);
    raw[12..].copy_from_slice(&[239, a, b, number]);
    ibv_gid { raw }
}

/// Two connected ends in this process.
pub fn pair(options: Options) -> (End, End) {
    let (a, b) = (End::new(options), End::new(options));
    a.connect(b.address());
    b.connect(a.address());
    (a, b)
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}
