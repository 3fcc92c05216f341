//! Work requests of all kinds, right and wrong.

use std::ptr;

use verbs_sys::inline::*;
use verbs_sys::*;

use super::account::RECEIVE;
use super::input::Input;
use super::world::{QKEY, REGION_LEN, World, zeroed};

/// Lengths around packets, path MTUs and regions.
const LENGTHS: [u32; 16] = [8, 0, 1, 7, 8, 64, 255, 256, 1000, 1024, 1025, 2048, 4096, 4097, 7000, 8193];

const OPCODES: [ibv_wr_opcode; 16] = [
    ibv_wr_opcode::IBV_WR_SEND,
    ibv_wr_opcode::IBV_WR_RDMA_WRITE,
    ibv_wr_opcode::IBV_WR_RDMA_READ,
    ibv_wr_opcode::IBV_WR_SEND_WITH_IMM,
    ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
    ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP,
    ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD,
    ibv_wr_opcode::IBV_WR_ATOMIC_WRITE,
    ibv_wr_opcode::IBV_WR_SEND_WITH_INV,
    ibv_wr_opcode::IBV_WR_LOCAL_INV,
    ibv_wr_opcode::IBV_WR_BIND_MW,
    ibv_wr_opcode::IBV_WR_SEND,
    ibv_wr_opcode::IBV_WR_RDMA_WRITE,
    ibv_wr_opcode::IBV_WR_RDMA_READ,
    ibv_wr_opcode::IBV_WR_TSO,
    ibv_wr_opcode(999),
];

/// One most often; two are what queues here take, and no queue takes 33 or less than none.
fn number_of_elements(input: &mut Input<'_>) -> i32 {
    match input.byte() {
        0..0xe0 => 1,
        0xe0..0xf0 => 2,
        0xf0..0xf8 => 0,
        0xf8..0xfc => 3,
        0xfc | 0xfd => 33,
        _ => -1,
    }
}

impl World {
    /// A region of the program, or the guard.
    fn region(&self, input: &mut Input<'_>) -> *mut ibv_mr {
        let choice = input.byte();
        if choice >= 0xf0 || self.memories.is_empty() {
            return self.guard.raw;
        }
        self.memories[usize::from(choice) % self.memories.len()].raw
    }

    /// An element: most often inside of a region, sometimes beyond it or with a key of nobody.
    fn sge(&self, input: &mut Input<'_>) -> ibv_sge {
        let mr = self.region(input);
        let (place, kind) = (u64::from(input.byte()) * 4, input.byte());
        let length = LENGTHS[usize::from(kind & 15)];
        let (start, lkey) = unsafe { ((*mr).addr.addr() as u64, (*mr).lkey) };
        match kind {
            0xfc => ibv_sge { addr: start.wrapping_sub(place), length, lkey },
            0xfd => ibv_sge { addr: start + place, length: input.word(), lkey },
            0xfe => ibv_sge { addr: u64::MAX - place, length, lkey },
            0xff => ibv_sge { addr: start, length, lkey: lkey ^ input.word() },
            _ => ibv_sge { addr: start + place, length, lkey },
        }
    }

    /// Memory that can be read: what inline data needs.
    fn readable(&self, input: &mut Input<'_>) -> ibv_sge {
        let mr = self.region(input);
        let place = usize::from(input.byte()) * 16;
        let length = LENGTHS[usize::from(input.byte() & 15)].min((REGION_LEN - place) as u32);
        unsafe { ibv_sge { addr: ((*mr).addr.addr() + place) as u64, length, lkey: 0 } }
    }

    /// Address and key at the peer.
    fn remote(&self, input: &mut Input<'_>) -> (u64, u32) {
        let mr = self.region(input);
        let (place, kind) = (u64::from(input.byte()) * 8, input.byte());
        let (start, rkey) = unsafe { ((*mr).addr.addr() as u64, (*mr).rkey) };
        match kind {
            0xfb => (start + place + 1, rkey),
            0xfc => (start.wrapping_sub(place), rkey),
            0xfd => (u64::MAX - place, rkey),
            0xfe => (start, rkey ^ input.word()),
            0xe0..0xf0 => (start + place, self.window_key(input)),
            _ => (start + place, rkey),
        }
    }

    fn window_key(&self, input: &mut Input<'_>) -> u32 {
        let place = input.place(self.windows.len());
        place.map_or(input.word(), |place| unsafe { (*self.windows[place].raw).rkey })
    }

    fn bind_info(&self, input: &mut Input<'_>) -> ibv_mw_bind_info {
        let mr = self.region(input);
        let (place, length) = (u64::from(input.byte()) * 16, LENGTHS[usize::from(input.byte() & 15)]);
        ibv_mw_bind_info {
            mr,
            addr: unsafe { (*mr).addr.addr() as u64 } + place,
            length: length.into(),
            mw_access_flags: u32::from(input.byte() & 0x3f),
        }
    }

    fn send_request(&self, wr_id: u64, sges: &mut [ibv_sge; 4], input: &mut Input<'_>) -> ibv_send_wr {
        let mut wr: ibv_send_wr = zeroed();
        wr.wr_id = wr_id;
        wr.opcode = input.one_of(&OPCODES);
        let flags = input.byte();
        // Zero is a signalled request with one element.
        wr.send_flags = u32::from(flags & 0x1f) ^ ibv_send_flags::IBV_SEND_SIGNALED.0;
        wr.num_sge = number_of_elements(input);
        let inline = wr.send_flags & ibv_send_flags::IBV_SEND_INLINE.0 != 0;
        for sge in sges.iter_mut().take(wr.num_sge.clamp(0, 4) as usize) {
            *sge = if inline { self.readable(input) } else { self.sge(input) };
        }
        wr.sg_list = sges.as_mut_ptr();
        let (va, key) = self.remote(input);
        wr.__bindgen_anon_1.imm_data = key;
        match wr.opcode {
            ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP | ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD => {
                wr.wr.atomic.remote_addr = va;
                wr.wr.atomic.rkey = key;
                wr.wr.atomic.compare_add = input.word().into();
            }
            ibv_wr_opcode::IBV_WR_BIND_MW => unsafe {
                let window = input.place(self.windows.len()).map(|place| self.windows[place].raw);
                wr.__bindgen_anon_2.bind_mw.mw = window.unwrap_or(ptr::null_mut());
                wr.__bindgen_anon_2.bind_mw.rkey = window.map_or(key, |mw| ibv_inc_rkey((*mw).rkey));
                wr.__bindgen_anon_2.bind_mw.bind_info = self.bind_info(input);
            },
            _ => {
                wr.wr.rdma.remote_addr = va;
                wr.wr.rdma.rkey = key;
            }
        }
        wr
    }

    /// Address handle and queue pair of a datagram.
    fn datagram(&self, input: &mut Input<'_>) -> (*mut ibv_ah, u32, u32) {
        let ah = input.place(self.handles.len()).map_or(ptr::null_mut(), |place| self.handles[place].raw);
        let to = input.byte();
        let number =
            self.pairs.get(usize::from(to & 3)).map_or(u32::from(to), |p| unsafe { (*p.raw).qp_num });
        let key = [QKEY, QKEY, 1 << 31, 7][usize::from(to >> 2 & 3)];
        (ah, if to & 0x80 != 0 { 0xff_ffff } else { number }, key)
    }

    /// A list of up to four requests: what was taken is accounted for.
    pub fn post_send(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let count = usize::from(input.byte() % 4) + 1;
        let mut sges = [[zeroed::<ibv_sge>(); 4]; 4];
        let mut requests: Vec<ibv_send_wr> = Vec::new();
        let raw = self.pairs[place].raw;
        for sges in sges.iter_mut().take(count) {
            let id = self.id();
            let mut wr = self.send_request(id, sges, input);
            if unsafe { (*raw).qp_type } == ibv_qp_type::IBV_QPT_UD {
                let (ah, remote_qpn, remote_qkey) = self.datagram(input);
                wr.wr.ud.ah = ah;
                wr.wr.ud.remote_qpn = remote_qpn;
                wr.wr.ud.remote_qkey = remote_qkey;
            }
            requests.push(wr);
        }
        let first = requests.as_mut_ptr();
        for n in 1..count {
            requests[n - 1].next = first.wrapping_add(n);
        }
        let mut bad = ptr::null_mut();
        let code = unsafe { ibv_post_send(raw, first, &mut bad) };
        let taken = if code == 0 { count } else { (bad.addr() - first.addr()) / size_of::<ibv_send_wr>() };
        assert!(code == 0 || taken < count, "the bad request is one of the list");
        for wr in &requests[..taken] {
            self.posted(place, wr.wr_id, wr.send_flags);
        }
    }

    fn posted(&mut self, place: usize, wr_id: u64, flags: u32) {
        self.pairs[place].account.sent(wr_id, flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0);
        let cq = self.pairs[place].send_cq;
        self.expect_completion(cq);
    }

    fn receive_request(&mut self, sges: &mut [ibv_sge; 4], input: &mut Input<'_>) -> ibv_recv_wr {
        let wr_id = self.id() | RECEIVE;
        let num_sge = number_of_elements(input);
        for sge in sges.iter_mut().take(num_sge.clamp(0, 4) as usize) {
            *sge = self.sge(input);
        }
        ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: sges.as_mut_ptr(), num_sge }
    }

    pub fn post_receive(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let mut sges = [zeroed(); 4];
        let mut wr = self.receive_request(&mut sges, input);
        let mut bad = ptr::null_mut();
        if unsafe { ibv_post_recv(self.pairs[place].raw, &mut wr, &mut bad) } == 0 {
            self.pairs[place].account.received(wr.wr_id);
            let cq = self.pairs[place].recv_cq;
            self.expect_completion(cq);
        } else {
            assert_eq!(bad, &raw mut wr);
        }
    }

    pub fn post_shared_receive(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.shared.len()) else { return };
        let mut sges = [zeroed(); 4];
        let mut wr = self.receive_request(&mut sges, input);
        let mut bad = ptr::null_mut();
        let raw = self.shared[place].raw;
        if unsafe { ibv_post_srq_recv(raw, &mut wr, &mut bad) } == 0 {
            self.shared[place].posted.insert(wr.wr_id);
            // It may complete on any of them.
            let queues = self.pairs.iter().filter(|pair| pair.srq == raw).map(|pair| pair.recv_cq);
            for cq in queues.collect::<Vec<_>>() {
                self.expect_completion(cq);
            }
        }
    }

    /// Requests built by calls; all of them are taken or none.
    pub fn build(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.pairs.len()) else { return };
        let qp = unsafe { rdma_soft::verbs().ibv_qp_to_qp_ex.unwrap()(self.pairs[place].raw) };
        if qp.is_null() {
            return;
        }
        let mut built = Vec::new();
        unsafe { (*qp).wr_start.unwrap()(qp) };
        for _ in 0..=input.byte() % 4 {
            let (id, flags) = (self.id(), u32::from(input.byte() & 7) ^ ibv_send_flags::IBV_SEND_SIGNALED.0);
            if self.build_one(qp, id, flags, input) {
                built.push((id, flags));
            }
        }
        if input.byte() == 0xff {
            unsafe { (*qp).wr_abort.unwrap()(qp) };
            return;
        }
        if unsafe { (*qp).wr_complete.unwrap()(qp) } == 0 {
            for (id, flags) in built {
                self.posted(place, id, flags);
            }
        }
    }

    /// One call that begins a request, unless the queue pair lacks it, and some that say where its data is.
    fn build_one(&self, qp: *mut ibv_qp_ex, id: u64, flags: u32, input: &mut Input<'_>) -> bool {
        let (va, key) = self.remote(input);
        let value = [7u8; 8];
        let began = unsafe {
            (*qp).wr_id = id;
            (*qp).wr_flags = flags;
            let q = &*qp;
            match input.byte() % 10 {
                0 => q.wr_send.map(|f| f(qp)),
                1 => q.wr_send_imm.map(|f| f(qp, key)),
                2 => q.wr_send_inv.map(|f| f(qp, key)),
                3 => q.wr_rdma_write.map(|f| f(qp, key, va)),
                4 => q.wr_rdma_write_imm.map(|f| f(qp, key, va, 5)),
                5 => q.wr_rdma_read.map(|f| f(qp, key, va)),
                6 => q.wr_atomic_cmp_swp.map(|f| f(qp, key, va, 1, 2)),
                7 => q.wr_atomic_fetch_add.map(|f| f(qp, key, va, 1)),
                8 => q.wr_atomic_write.map(|f| f(qp, key, va, value.as_ptr().cast())),
                _ => q.wr_local_inv.map(|f| f(qp, key)),
            }
        };
        let list = [self.sge(input), self.sge(input), self.sge(input)];
        let inline = self.readable(input);
        let (ah, number, qkey) = self.datagram(input);
        unsafe {
            match input.byte() % 8 {
                0..=2 => (*qp).wr_set_sge.unwrap()(qp, list[0].lkey, list[0].addr, list[0].length),
                3 => (*qp).wr_set_sge_list.unwrap()(qp, 2, list.as_ptr()),
                4 => (*qp).wr_set_sge_list.unwrap()(qp, 3, list.as_ptr()),
                5 => {
                    let addr = ptr::with_exposed_provenance_mut(inline.addr as usize);
                    (*qp).wr_set_inline_data.unwrap()(qp, addr, inline.length as usize);
                }
                _ => {}
            }
            if (*qp).qp_base.qp_type == ibv_qp_type::IBV_QPT_UD {
                (*qp).wr_set_ud_addr.unwrap()(qp, ah, number, qkey);
            }
        }
        began.is_some()
    }

    /// Binds a type 1 window by its own verb.
    pub fn bind_window(&mut self, input: &mut Input<'_>) {
        let (Some(place), Some(window)) = (input.place(self.pairs.len()), input.place(self.windows.len()))
        else {
            return;
        };
        let wr_id = self.id();
        let flags = u32::from(input.byte() & 7);
        let mut bind = ibv_mw_bind { wr_id, send_flags: flags, bind_info: self.bind_info(input) };
        let code = unsafe { ibv_bind_mw(self.pairs[place].raw, self.windows[window].raw, &mut bind) };
        if code == 0 {
            self.posted(place, wr_id, flags);
        }
    }
}
