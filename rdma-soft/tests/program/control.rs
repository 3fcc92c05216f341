//! Objects that come, change and go.

use std::ptr;

use verbs_sys::inline::*;
use verbs_sys::*;

use super::account::Account;
use super::input::Input;
use super::world::{
    Domain, Handle, MOST, Pair, QKEY, Queue, REGION_LEN, SharedQueue, World, memory, pair_type, v, zeroed,
};

/// A group that a queue pair may join: of IPv4 and of this process alone, of IPv6, or none.
fn group(number: u8) -> ibv_gid {
    let [.., a, b] = std::process::id().to_be_bytes();
    let raw = match number % 4 {
        0 | 1 => [0xff, 0x0e, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 239, a, b, number % 4],
        2 => std::net::Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0, 7).octets(),
        _ => std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets(),
    };
    ibv_gid { raw }
}

impl World {
    pub fn create_queue(&mut self, depth: u32, extended: bool) {
        let raw = unsafe {
            if extended {
                let mut attr: ibv_cq_init_attr_ex = zeroed();
                attr.cqe = depth;
                attr.channel = self.channel;
                // All that a completion can tell.
                attr.wc_flags = u64::from(IBV_WC_STANDARD_FLAGS.0)
                    | u64::from(ibv_create_cq_wc_flags::IBV_WC_EX_WITH_COMPLETION_TIMESTAMP.0);
                ibv_create_cq_ex(self.context, &mut attr).cast()
            } else {
                (v().ibv_create_cq)(self.context, depth as i32, ptr::null_mut(), self.channel, 0)
            }
        };
        if !raw.is_null() {
            self.queues.push(Queue { raw, lossy: false, due: 0 });
        }
    }

    pub fn completion_queues(&mut self, input: &mut Input<'_>) {
        let (how, depth) = (input.byte(), u32::from(input.byte() & 0x3f));
        let Some(place) = input.place(self.queues.len()) else { return };
        let raw = self.queues[place].raw;
        match how & 3 {
            0 if self.queues.len() < MOST => self.create_queue(depth, how & 4 != 0),
            1 => unsafe {
                if (v().ibv_resize_cq)(raw, depth as i32) == 0 {
                    let queue = &mut self.queues[place];
                    queue.lossy |= queue.due > depth as usize;
                }
            },
            2 => {
                let used = self.pairs.iter().any(|pair| pair.send_cq == raw || pair.recv_cq == raw);
                self.take_events();
                let code = unsafe { (v().ibv_destroy_cq)(raw) };
                assert_eq!(code, if used { libc::EBUSY } else { 0 });
                if !used {
                    self.queues.remove(place);
                }
            }
            _ => {}
        }
    }

    pub fn create_pair(
        &mut self,
        qp_type: ibv_qp_type,
        domain: usize,
        send: usize,
        receive: usize,
        extended: bool,
        srq: Option<usize>,
    ) {
        let pd = self.domains[domain].raw;
        let mut init: ibv_qp_init_attr_ex = zeroed();
        init.send_cq = self.queues[send].raw;
        init.recv_cq = self.queues[receive].raw;
        init.srq = srq.map_or(ptr::null_mut(), |place| self.shared[place].raw);
        init.qp_type = qp_type;
        init.cap = ibv_qp_cap {
            max_send_wr: 8,
            max_recv_wr: 8,
            max_send_sge: 2,
            max_recv_sge: 2,
            max_inline_data: 64,
        };
        init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0;
        init.pd = pd;
        if extended {
            init.comp_mask |= ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
            init.send_ops_flags = match qp_type {
                ibv_qp_type::IBV_QPT_RC => 0x13ff | 1 << 12,
                ibv_qp_type::IBV_QPT_UC => 0xf,
                _ => 0xc,
            };
        }
        let mut raw = unsafe { ibv_create_qp_ex(self.context, &mut init) };
        if raw.is_null() {
            // Without the operations that this type lacks.
            init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0;
            raw = unsafe { ibv_create_qp_ex(self.context, &mut init) };
        }
        assert!(!raw.is_null(), "errno {}", errno());
        let account = Account::default();
        let (send_cq, recv_cq, srq) = (init.send_cq, init.recv_cq, init.srq);
        self.pairs.push(Pair { raw, pd, send_cq, recv_cq, srq, account, groups: Default::default() });
    }

    pub fn queue_pairs(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        if how & 0x40 == 0 {
            let place = |input: &mut Input<'_>, len| input.place(len);
            let (Some(domain), Some(send), Some(receive)) = (
                place(input, self.domains.len()),
                place(input, self.queues.len()),
                place(input, self.queues.len()),
            ) else {
                return;
            };
            let srq = if how & 0x80 == 0 { None } else { input.place(self.shared.len()) };
            if self.pairs.len() < MOST {
                self.create_pair(pair_type(how), domain, send, receive, how & 4 != 0, srq);
            }
        } else if let Some(place) = input.place(self.pairs.len()) {
            let pair = self.pairs.remove(place);
            self.take_events_of_gone(pair);
        }
    }

    /// Events must be acknowledged before their object goes, so they are taken while it is still there.
    fn take_events_of_gone(&mut self, pair: Pair) {
        self.pairs.push(pair);
        self.take_events();
        if let Some(pair) = self.pairs.pop() {
            self.destroy_pair(pair);
        }
    }

    pub fn destroy_pair(&mut self, mut pair: Pair) {
        unsafe {
            if !pair.groups.is_empty() {
                assert_eq!((v().ibv_destroy_qp)(pair.raw), libc::EBUSY);
            }
            for raw in pair.groups.drain() {
                assert_eq!((v().ibv_detach_mcast)(pair.raw, &ibv_gid { raw }, 0), 0);
            }
            assert_eq!((v().ibv_destroy_qp)(pair.raw), 0);
        }
    }

    fn own_gid(&self, index: i32) -> ibv_gid {
        let mut gid: ibv_gid = zeroed();
        assert_eq!(unsafe { (v().ibv_query_gid)(self.context, 1, index, &mut gid) }, 0);
        gid
    }

    /// Takes a pair to RTS with another as its peer, as far as its state allows.
    pub fn connect_pairs(&mut self, place: usize, peer: usize, how: u8) {
        type M = ibv_qp_attr_mask;
        let (pair, peer) = (&self.pairs[place], &self.pairs[peer]);
        let qp_type = unsafe { (*pair.raw).qp_type };
        let mut attr: ibv_qp_attr = zeroed();
        attr.port_num = 1;
        attr.qp_access_flags = 0xe;
        attr.qkey = QKEY;
        attr.path_mtu = ibv_mtu(1 + u32::from(how & 3));
        attr.dest_qp_num = unsafe { (*peer.raw).qp_num };
        (attr.rq_psn, attr.sq_psn) = (0xff_fffe, 0xff_fffe);
        (attr.max_dest_rd_atomic, attr.max_rd_atomic) = (how >> 2 & 3, how >> 2 & 3);
        (attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry) = (1, 8, 2, 2);
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = 1;
        attr.ah_attr.grh.sgid_index = 1;
        attr.ah_attr.grh.dgid = self.own_gid(1);
        let connected = M::IBV_QP_AV | M::IBV_QP_PATH_MTU | M::IBV_QP_DEST_QPN | M::IBV_QP_RQ_PSN;
        let begin = M::IBV_QP_PKEY_INDEX | M::IBV_QP_PORT;
        let steps = match qp_type {
            ibv_qp_type::IBV_QPT_RC => [
                begin | M::IBV_QP_ACCESS_FLAGS,
                connected | M::IBV_QP_MAX_DEST_RD_ATOMIC | M::IBV_QP_MIN_RNR_TIMER,
                M::IBV_QP_SQ_PSN
                    | M::IBV_QP_TIMEOUT
                    | M::IBV_QP_RETRY_CNT
                    | M::IBV_QP_RNR_RETRY
                    | M::IBV_QP_MAX_QP_RD_ATOMIC,
            ],
            ibv_qp_type::IBV_QPT_UC => [begin | M::IBV_QP_ACCESS_FLAGS, connected, M::IBV_QP_SQ_PSN],
            _ => [begin | M::IBV_QP_QKEY, M::IBV_QP_STATE, M::IBV_QP_SQ_PSN],
        };
        let states = [ibv_qp_state::IBV_QPS_INIT, ibv_qp_state::IBV_QPS_RTR, ibv_qp_state::IBV_QPS_RTS];
        for (state, mask) in states.into_iter().zip(steps) {
            attr.qp_state = state;
            let mask = (M::IBV_QP_STATE | mask).0 as i32;
            if unsafe { (v().ibv_modify_qp)(pair.raw, &mut attr, mask) } != 0 {
                break;
            }
        }
    }

    pub fn connect(&mut self, input: &mut Input<'_>) {
        let (Some(place), Some(peer)) = (input.place(self.pairs.len()), input.place(self.pairs.len())) else {
            return;
        };
        self.connect_pairs(place, peer, input.byte());
    }

    /// Any change of any attributes.
    pub fn modify(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = ibv_qp_state(u32::from(input.byte() % 9));
        attr.cur_qp_state = ibv_qp_state(u32::from(input.byte() % 9));
        attr.path_mtu = ibv_mtu(u32::from(input.byte() % 8));
        attr.qkey = input.word();
        attr.rq_psn = input.word();
        attr.sq_psn = input.word();
        attr.dest_qp_num = input.word();
        attr.qp_access_flags = u32::from(input.byte());
        attr.max_rd_atomic = input.byte();
        attr.max_dest_rd_atomic = input.byte();
        attr.min_rnr_timer = input.byte() & 0x3f;
        attr.timeout = input.byte() & 0x3f;
        attr.retry_cnt = input.byte() & 0xf;
        attr.rnr_retry = input.byte() & 0xf;
        attr.port_num = input.byte() & 3;
        attr.en_sqd_async_notify = input.byte() & 1;
        attr.ah_attr = self.address(input);
        let mask = input.word() & 0x1f_ffff;
        let code = unsafe { (v().ibv_modify_qp)(self.pairs[place].raw, &mut attr, mask as i32) };
        let to_reset =
            mask & ibv_qp_attr_mask::IBV_QP_STATE.0 != 0 && attr.qp_state == ibv_qp_state::IBV_QPS_RESET;
        if code == 0 && to_reset {
            self.pairs[place].account = Account::default();
        }
    }

    /// A change of state alone.
    pub fn change_state(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = input.one_of(&[
            ibv_qp_state::IBV_QPS_SQD,
            ibv_qp_state::IBV_QPS_RTS,
            ibv_qp_state::IBV_QPS_ERR,
            ibv_qp_state::IBV_QPS_RESET,
        ]);
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        let code = unsafe { (v().ibv_modify_qp)(self.pairs[place].raw, &mut attr, mask) };
        if code == 0 && attr.qp_state == ibv_qp_state::IBV_QPS_RESET {
            self.pairs[place].account = Account::default();
        }
    }

    pub fn regions(&mut self, input: &mut Input<'_>) {
        let (how, access) = (input.byte(), u32::from(input.byte() & 0x7f));
        let Some(domain) = input.place(self.domains.len()) else { return };
        let pd = self.domains[domain].raw;
        match how & 3 {
            0 if self.memories.len() < MOST => self.memories.extend(memory(pd, access, 3)),
            1 => {
                let Some(place) = input.place(self.memories.len()) else { return };
                // Refused while a window is bound to it.
                if unsafe { (v().ibv_dereg_mr)(self.memories[place].raw) } == 0 {
                    self.memories.remove(place);
                }
            }
            2 => {
                let Some(place) = input.place(self.memories.len()) else { return };
                let (memory, flags) = (&mut self.memories[place], i32::from(how >> 2 & 7));
                let (addr, len) = (memory.words.as_mut_ptr().cast(), REGION_LEN - usize::from(input.byte()));
                let change = v().ibv_rereg_mr.unwrap();
                if unsafe { change(memory.raw, flags, pd, addr, len, access as i32) } == 0 && flags & 2 != 0 {
                    memory.pd = pd;
                }
            }
            _ => unsafe {
                // Nothing is there, or the range wraps around.
                let (addr, len) =
                    input.one_of(&[(4096, 64), (0, 64), (usize::MAX - 8, 64), (4096, usize::MAX)]);
                assert!((v().ibv_reg_mr)(pd, ptr::without_provenance_mut(addr), len, 1).is_null());
            },
        }
    }

    pub fn windows(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let Some(domain) = input.place(self.domains.len()) else { return };
        let pd = self.domains[domain].raw;
        match how & 3 {
            0 | 1 if self.windows.len() < MOST => {
                let raw = unsafe { ibv_alloc_mw(pd, ibv_mw_type(1 + u32::from(how >> 2 & 1))) };
                self.windows.push(Handle { raw, pd });
            }
            2 => self.bind_window(input),
            _ => {
                let Some(place) = input.place(self.windows.len()) else { return };
                assert_eq!(unsafe { ibv_dealloc_mw(self.windows.remove(place).raw) }, 0);
            }
        }
    }

    fn address(&self, input: &mut Input<'_>) -> ibv_ah_attr {
        let mut attr: ibv_ah_attr = zeroed();
        let how = input.byte();
        attr.is_global = u8::from(how & 0x0f != 0);
        attr.port_num = 1 + u8::from(how & 0xf0 == 0xf0);
        attr.grh.sgid_index = [1, 0, 1, 9][usize::from(how & 3)];
        attr.grh.traffic_class = how;
        attr.grh.dgid = match how >> 2 & 3 {
            0 => self.own_gid(0),
            1 => group(0),
            2 => group(2),
            _ => self.own_gid(1),
        };
        attr
    }

    pub fn address_handles(&mut self, input: &mut Input<'_>) {
        let Some(domain) = input.place(self.domains.len()) else { return };
        let pd = self.domains[domain].raw;
        if self.handles.len() < MOST && input.flag() {
            let mut attr = self.address(input);
            let raw = unsafe { (v().ibv_create_ah)(pd, &mut attr) };
            if !raw.is_null() {
                self.handles.push(Handle { raw, pd });
            }
        } else if let Some(place) = input.place(self.handles.len()) {
            assert_eq!(unsafe { (v().ibv_destroy_ah)(self.handles.remove(place).raw) }, 0);
        }
    }

    pub fn groups(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let gid = group(input.byte());
        let (pair, raw) = (&mut self.pairs[place], unsafe { gid.raw });
        unsafe {
            if input.flag() {
                if (v().ibv_attach_mcast)(pair.raw, &gid, 0) == 0 {
                    pair.groups.insert(raw);
                }
            } else {
                let known = pair.groups.remove(&raw);
                assert_eq!((v().ibv_detach_mcast)(pair.raw, &gid, 0) == 0, known);
            }
        }
    }

    pub fn shared_queues(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let mut attr = ibv_srq_attr {
            max_wr: u32::from(input.byte() & 0x1f),
            max_sge: u32::from(how >> 6),
            srq_limit: u32::from(how >> 3 & 7),
        };
        let Some(domain) = input.place(self.domains.len()) else { return };
        let pd = self.domains[domain].raw;
        if how & 3 == 0 && self.shared.len() < MOST {
            let mut init = ibv_srq_init_attr { srq_context: ptr::null_mut(), attr };
            let raw = unsafe { (v().ibv_create_srq)(pd, &mut init) };
            if !raw.is_null() {
                self.shared.push(SharedQueue { raw, pd, posted: Default::default() });
            }
            return;
        }
        let Some(place) = input.place(self.shared.len()) else { return };
        let raw = self.shared[place].raw;
        if how & 3 == 3 {
            self.take_events();
            let used = self.pairs.iter().any(|pair| pair.srq == raw);
            assert_eq!(unsafe { (v().ibv_destroy_srq)(raw) }, if used { libc::EBUSY } else { 0 });
            if !used {
                self.shared.remove(place);
            }
        } else {
            unsafe {
                (v().ibv_modify_srq)(raw, &mut attr, i32::from(how >> 5));
                assert_eq!((v().ibv_query_srq)(raw, &mut attr), 0);
            }
        }
    }

    pub fn query(&mut self, input: &mut Input<'_>) {
        let mut attr: ibv_qp_attr = zeroed();
        let mut init: ibv_qp_init_attr = zeroed();
        if let Some(place) = input.place(self.pairs.len()) {
            let raw = self.pairs[place].raw;
            assert_eq!(unsafe { (v().ibv_query_qp)(raw, &mut attr, -1, &mut init) }, 0);
            assert!(attr.rq_psn <= 0xff_ffff && attr.sq_psn <= 0xff_ffff);
        }
        let mut gid: ibv_gid = zeroed();
        let index = i32::from(input.byte()) - 1;
        let code = unsafe { (v().ibv_query_gid)(self.context, 1, index, &mut gid) };
        assert_eq!(code == 0, (0..16).contains(&index));
        let mut sges = [zeroed(); 4];
        let Some(memory) = self.memories.first() else { return };
        let (addr, lkey) = unsafe { ((*memory.raw).addr.addr() as u64, (*memory.raw).lkey) };
        sges[0] = ibv_sge { addr: addr + u64::from(input.byte()) * 64, length: 64, lkey };
        let advice = ib_uverbs_advise_mr_advice(u32::from(input.byte() & 3));
        unsafe { ibv_advise_mr(memory.pd, advice, u32::from(input.byte() & 1), sges.as_mut_ptr(), 1) };
    }

    fn is_used(&self, pd: *mut ibv_pd) -> bool {
        let users = (self.pairs.iter().map(|p| p.pd))
            .chain(self.memories.iter().chain([&self.guard]).map(|m| m.pd))
            .chain(self.windows.iter().map(|w| w.pd))
            .chain(self.handles.iter().map(|h| h.pd))
            .chain(self.shared.iter().map(|s| s.pd))
            .chain(self.domains.iter().filter_map(|d| d.below));
        users.into_iter().any(|user| user == pd)
    }

    pub fn domains(&mut self, input: &mut Input<'_>) {
        if self.domains.len() < MOST && input.flag() {
            let raw = unsafe { (v().ibv_alloc_pd)(self.context) };
            self.domains.push(Domain { raw, below: None });
        } else if let Some(place) = input.place(self.domains.len()) {
            let raw = self.domains[place].raw;
            let used = self.is_used(raw);
            assert_eq!(unsafe { (v().ibv_dealloc_pd)(raw) }, if used { libc::EBUSY } else { 0 });
            if !used {
                self.domains.remove(place);
            }
        }
    }
}
