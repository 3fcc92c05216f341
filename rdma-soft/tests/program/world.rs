//! The objects of a program, its beginning and its end.

use std::collections::HashSet;
use std::ptr;
use std::sync::OnceLock;

use verbs_sys::inline::*;
use verbs_sys::*;

use super::account::{Account, RECEIVE};
use super::input::Input;

pub const REGION_LEN: usize = 8192;
pub const GUARD: u64 = 0xa5a5_a5a5_a5a5_a5a5;
pub const QKEY: u32 = 0x1111_1111;
/// Objects of a kind at most.
pub const MOST: usize = 4;

pub fn v() -> &'static Verbs {
    rdma_soft::verbs()
}

pub fn zeroed<T>() -> T {
    // SAFETY: used for C structures of plain data only.
    unsafe { std::mem::zeroed() }
}

pub struct Domain {
    pub raw: *mut ibv_pd,
    /// The domain below a parent domain.
    pub below: Option<*mut ibv_pd>,
}

pub struct Queue {
    pub raw: *mut ibv_cq,
    /// More completions were due than it has room for: some may be lost, and its queue pairs have failed.
    pub lossy: bool,
    pub due: usize,
}

pub struct SharedQueue {
    pub raw: *mut ibv_srq,
    pub pd: *mut ibv_pd,
    pub posted: HashSet<u64>,
}

pub struct Pair {
    pub raw: *mut ibv_qp,
    pub pd: *mut ibv_pd,
    pub send_cq: *mut ibv_cq,
    pub recv_cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub account: Account,
    pub groups: HashSet<[u8; 16]>,
}

pub struct Memory {
    pub raw: *mut ibv_mr,
    pub pd: *mut ibv_pd,
    /// Freed with it, so that a late access shows.
    pub words: Box<[u64]>,
}

pub struct Handle<T> {
    pub raw: *mut T,
    pub pd: *mut ibv_pd,
}

pub struct World {
    pub context: *mut ibv_context,
    pub channel: *mut ibv_comp_channel,
    pub domains: Vec<Domain>,
    pub queues: Vec<Queue>,
    pub shared: Vec<SharedQueue>,
    pub pairs: Vec<Pair>,
    pub memories: Vec<Memory>,
    /// Registered without a right to write: nobody changes it.
    pub guard: Memory,
    pub windows: Vec<Handle<ibv_mw>>,
    pub handles: Vec<Handle<ibv_ah>>,
    pub next_id: u64,
}

/// One context for all programs of this process, its events not blocking.
fn context() -> *mut ibv_context {
    static CONTEXT: OnceLock<usize> = OnceLock::new();
    let address = CONTEXT.get_or_init(|| unsafe {
        let list = (v().ibv_get_device_list)(ptr::null_mut());
        let context = (v().ibv_open_device)(*list);
        (v().ibv_free_device_list)(list);
        assert!(!context.is_null(), "{:?}", rdma_soft::last_error());
        set_nonblocking((*context).async_fd);
        context.expose_provenance()
    });
    ptr::with_exposed_provenance_mut(*address)
}

fn set_nonblocking(fd: i32) {
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        assert_eq!(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK), 0);
    }
}

pub fn memory(pd: *mut ibv_pd, access: u32, word: u64) -> Option<Memory> {
    let mut words = vec![word; REGION_LEN / 8].into_boxed_slice();
    let raw = unsafe { (v().ibv_reg_mr)(pd, words.as_mut_ptr().cast(), REGION_LEN, access as i32) };
    (!raw.is_null()).then_some(Memory { raw, pd, words })
}

impl World {
    /// Two connected queue pairs of the type that the first byte says, with memory.
    pub fn new(input: &mut Input<'_>) -> Self {
        let context = context();
        let (pd, channel) = unsafe { ((v().ibv_alloc_pd)(context), (v().ibv_create_comp_channel)(context)) };
        assert!(!pd.is_null() && !channel.is_null());
        set_nonblocking(unsafe { (*channel).fd });
        let mut world = World {
            context,
            channel,
            domains: vec![Domain { raw: pd, below: None }],
            queues: Vec::new(),
            shared: Vec::new(),
            pairs: Vec::new(),
            memories: Vec::new(),
            guard: memory(pd, 0, GUARD).unwrap(),
            windows: Vec::new(),
            handles: Vec::new(),
            next_id: 0,
        };
        world.memories.extend(memory(pd, 0x1f, 1));
        world.memories.extend(memory(pd, 0x1f, 2));
        let how = input.byte();
        world.create_queue(64, how & 0x10 != 0);
        for _ in 0..2 {
            world.create_pair(pair_type(how), 0, 0, 0, how & 0x20 != 0, None);
        }
        world.connect_pairs(0, 1, how >> 2);
        world.connect_pairs(1, 0, how >> 2);
        world
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub fn queue(&mut self, raw: *mut ibv_cq) -> &mut Queue {
        self.queues.iter_mut().find(|queue| queue.raw == raw).expect("a queue of this program")
    }

    /// One more completion may come: if the queue has no room for it, some may get lost.
    pub fn expect_completion(&mut self, cq: *mut ibv_cq) {
        let queue = self.queue(cq);
        queue.due += 1;
        queue.lossy |= queue.due > unsafe { (*queue.raw).cqe } as usize;
    }

    /// Takes a completion into account.
    pub fn account(&mut self, cq: *mut ibv_cq, wr_id: u64, status: ibv_wc_status, qp_num: u32) {
        let lost = self.queue(cq).lossy;
        let success = status == ibv_wc_status::IBV_WC_SUCCESS;
        let pair = self.pairs.iter_mut().find(|pair| unsafe { (*pair.raw).qp_num } == qp_num);
        let pair = pair.expect("completions of a queue pair end with it");
        if wr_id & RECEIVE == 0 {
            assert_eq!(pair.send_cq, cq);
            return pair.account.complete_send(wr_id, success, lost);
        }
        assert_eq!(pair.recv_cq, cq);
        if pair.srq.is_null() {
            return pair.account.complete_receive(wr_id, lost);
        }
        let srq = pair.srq;
        let shared = self.shared.iter_mut().find(|shared| shared.raw == srq).expect("it is in use");
        assert!(shared.posted.remove(&wr_id), "receive {wr_id} completed twice or was never posted");
    }

    /// Polls all queues dry.
    pub fn drain(&mut self) {
        for raw in self.queues.iter().map(|queue| queue.raw).collect::<Vec<_>>() {
            while self.poll_some(raw, 16) != 0 {}
        }
    }

    /// Fails all queue pairs, accounts for every request, and destroys all objects, each once and with success.
    pub fn finish(mut self) {
        for pair in &self.pairs {
            let mut attr: ibv_qp_attr = zeroed();
            attr.qp_state = ibv_qp_state::IBV_QPS_ERR;
            let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
            assert_eq!(unsafe { (v().ibv_modify_qp)(pair.raw, &mut attr, mask) }, 0);
        }
        self.drain();
        self.take_events();
        for pair in std::mem::take(&mut self.pairs) {
            let lost = [pair.send_cq, pair.recv_cq].iter().any(|cq| self.queue(*cq).lossy);
            if !lost {
                pair.account.assert_settled();
            }
            self.destroy_pair(pair);
        }
        self.take_events();
        unsafe {
            for handle in &self.handles {
                assert_eq!((v().ibv_destroy_ah)(handle.raw), 0);
            }
            for window in &self.windows {
                assert_eq!(ibv_dealloc_mw(window.raw), 0);
            }
            for memory in self.memories.iter().chain([&self.guard]) {
                assert_eq!((v().ibv_dereg_mr)(memory.raw), 0);
            }
            for shared in &self.shared {
                assert_eq!((v().ibv_destroy_srq)(shared.raw), 0);
            }
            for queue in &self.queues {
                assert_eq!((v().ibv_destroy_cq)(queue.raw), 0);
            }
            assert_eq!((v().ibv_destroy_comp_channel)(self.channel), 0);
            for domain in self.domains.iter().rev() {
                assert_eq!((v().ibv_dealloc_pd)(domain.raw), 0);
            }
        }
        assert!(self.guard.words.iter().all(|word| *word == GUARD), "the guard was written to");
    }
}

pub fn pair_type(byte: u8) -> ibv_qp_type {
    [ibv_qp_type::IBV_QPT_RC, ibv_qp_type::IBV_QPT_UC, ibv_qp_type::IBV_QPT_UD, ibv_qp_type::IBV_QPT_RC]
        [usize::from(byte & 3)]
}
