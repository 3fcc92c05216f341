//! The evil provider: devices that misbehave, each as its own test says.
//!
//! What a device does is what the [null provider](crate::null) does, until a test turns one of
//! its knobs. Every test makes a device of its own, so that tests can run at the same time:
//!
//! ```
//! use verbs_sys::{evil, ibv_wc_status};
//!
//! let device = evil::device();
//! device.dereg_mr.fail(libc::EBUSY);
//! device.completion.tell(|wc| wc.status = ibv_wc_status(99));
//! // ... open `device.name()` from `evil::verbs()` and see what the code under test makes of it.
//! assert_eq!(device.dereg_mr.calls(), 0);
//! ```
//!
//! Three kinds of knobs are fields: a [`Fault`] makes a verb fail, a [`Lie`] changes an answer,
//! and [`Slot`]s are removed from a context before it is opened. What is no answer to a call is a
//! method: [`inject`](Evil::inject) and the like. All are safe, and take effect at once on every
//! context of the device.
//!
//! The memory safety of the provider itself never depends on the knobs: what it reads and writes
//! on behalf of a caller stays within what the call allows. What it *claims* may be anything.

mod control;
mod data;
mod dma;
mod knob;
mod live;
mod query;

use core::ffi::{CStr, c_int};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::bindings::*;
use crate::null;

pub use control::{old_verbs, verbs};
pub use knob::{Fault, Lie};

use dma::Dma;
use live::Live;

/// The byte that [`Evil::scribble`] writes.
pub const SCRIBBLE: u8 = 0xee;

/// A function pointer that a context can lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is the slot of that name")]
#[non_exhaustive]
pub enum Slot {
    AllocMw,
    BindMw,
    DeallocMw,
    PollCq,
    ReqNotifyCq,
    PostSrqRecv,
    PostSend,
    PostRecv,
    /// Of the extended context.
    QueryPort,
    /// Of the extended context.
    QueryDeviceEx,
    /// The extended context itself: `abi_compat` does not announce one.
    ExtendedContext,
    /// All of the extended context but its size, as of a library that is too old for it.
    ExtendedSlots,
}

macro_rules! faults {
    ($($name:ident)*) => {
        /// A device that misbehaves, and the knobs to make it.
        ///
        /// `repr(C)`: a pointer to its first field is a pointer to it.
        #[repr(C)]
        pub struct Evil {
            device: null::device::Device,
            live: Mutex<Live>,
            dma: Mutex<Dma>,
            removed: Mutex<Vec<Slot>>,
            /// Completions that no work request asked for.
            strays: Mutex<VecDeque<ibv_wc>>,
            /// Completions that were delivered, for `replay`.
            delivered: Mutex<Vec<ibv_wc>>,
            held: AtomicBool,
            lose: AtomicU32,
            repeats: AtomicU32,
            omits_bad_wr: AtomicBool,
            /// Each completion, as it is polled.
            pub completion: Lie<ibv_wc>,
            /// The number that `poll_cq` returns; the array is filled as the true number says.
            pub poll_count: Lie<c_int>,
            /// The answer of `query_device` and `query_device_ex`.
            pub device_attr: Lie<ibv_device_attr>,
            /// The answer of `query_port`.
            pub port: Lie<ibv_port_attr>,
            /// The answers of `query_gid`, `query_gid_ex` and `query_gid_table`.
            pub gid: Lie<ibv_gid_entry>,
            /// The number of entries that `query_gid_table` returns.
            pub gid_count: Lie<isize>,
            /// The answer of `query_qp`.
            pub qp_attr: Lie<ibv_qp_attr>,
            /// The capacities that `create_qp` grants.
            pub qp_cap: Lie<ibv_qp_cap>,
            /// The number of entries that `create_cq` grants.
            pub cqe: Lie<c_int>,
            /// The capacities that `create_srq` grants.
            pub srq_attr: Lie<ibv_srq_attr>,
            $(#[doc = concat!("Failures of `ibv_", stringify!($name), "`.")] pub $name: Fault,)*
        }

        impl Evil {
            fn new(name: &str, index: u32) -> Evil {
                Evil {
                    device: null::device::Device::new(name, index),
                    live: Mutex::default(),
                    dma: Mutex::default(),
                    removed: Mutex::default(),
                    strays: Mutex::default(),
                    delivered: Mutex::default(),
                    held: AtomicBool::default(),
                    lose: AtomicU32::default(),
                    repeats: AtomicU32::default(),
                    omits_bad_wr: AtomicBool::default(),
                    completion: Lie::default(),
                    poll_count: Lie::default(),
                    device_attr: Lie::default(),
                    port: Lie::default(),
                    gid: Lie::default(),
                    gid_count: Lie::default(),
                    qp_attr: Lie::default(),
                    qp_cap: Lie::default(),
                    cqe: Lie::default(),
                    srq_attr: Lie::default(),
                    $($name: Fault::default(),)*
                }
            }
        }
    };
}

faults! {
    open_device close_device query_device query_port query_gid query_gid_ex query_gid_table query_pkey
    alloc_pd dealloc_pd reg_mr rereg_mr dereg_mr alloc_mw dealloc_mw bind_mw create_ah destroy_ah
    create_comp_channel destroy_comp_channel create_cq resize_cq destroy_cq get_cq_event req_notify_cq poll_cq
    create_srq modify_srq query_srq destroy_srq post_srq_recv
    create_qp modify_qp query_qp destroy_qp post_send post_recv attach_mcast detach_mcast
    get_async_event
}

static DEVICES: Mutex<Vec<&'static Evil>> = Mutex::new(Vec::new());

/// A new device, named `evil0`, `evil1` and so on; it stays on the provider's list for ever.
#[must_use]
pub fn device() -> &'static Evil {
    let mut devices = DEVICES.lock();
    let index = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let evil: &'static Evil = Box::leak(Box::new(Evil::new(&format!("evil{index}"), index)));
    devices.push(evil);
    evil
}

impl core::fmt::Debug for Evil {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Evil").field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Evil {
    /// The device's name, to open it by.
    #[must_use]
    pub fn name(&self) -> &str {
        // SAFETY: a device of the base provider.
        let name = unsafe { null::device::get_device_name(self.device.as_raw()) };
        // SAFETY: the base provider wrote a C string, which lives as long as the device.
        unsafe { CStr::from_ptr(name) }.to_str().unwrap_or_default()
    }

    /// Contexts opened from now on lack the slot.
    pub fn remove(&self, slot: Slot) {
        self.removed.lock().push(slot);
    }

    fn lacks(&self, slot: Slot) -> bool {
        self.removed.lock().contains(&slot)
    }

    /// The next poll of any queue gives this completion first, whatever it says.
    pub fn inject(&self, completion: ibv_wc) {
        self.strays.lock().push_back(completion);
    }

    /// The next polls of any queue give again all completions that were delivered so far, with
    /// their work requests, pairs and contents of then.
    pub fn replay(&self) {
        let delivered = self.delivered.lock();
        self.strays.lock().extend(delivered.iter());
    }

    /// Every completion is delivered so many times more. 0: once, as it should be.
    pub fn repeat(&self, more: u32) {
        self.repeats.store(more, Ordering::Relaxed);
    }

    /// The next completions that are polled vanish, as when a queue overran.
    pub fn lose(&self, count: u32) {
        self.lose.store(count, Ordering::Relaxed);
    }

    /// No queue gives a completion until [`release`](Evil::release): work requests stay in flight.
    pub fn hold(&self) {
        self.held.store(true, Ordering::Relaxed);
    }

    /// Ends [`hold`](Evil::hold), with an event for every queue that has a channel.
    pub fn release(&self) {
        self.held.store(false, Ordering::Relaxed);
        self.ring_channels();
    }

    /// Touches all memory that the device may touch now: overwrites the buffers of receives, reads
    /// and atomics with [`SCRIBBLE`], reads those of sends and writes, as far as their work request
    /// has no delivered completion, its queue exists, and their region is registered. The number
    /// of bytes.
    ///
    /// Under Miri or a sanitizer this finds memory that was freed, moved or lent out too early.
    /// Safe because whoever posted the work requests promised that the memory may be used so.
    pub fn scribble(&self) -> u64 {
        let dma = self.dma.lock();
        // SAFETY: the contract of `ibv_post_send` and `ibv_post_recv`, upheld by their callers.
        unsafe { dma.touch() }
    }

    /// Adds an event for every queue that has a channel, armed or not, with or without completions.
    pub fn ring_channels(&self) {
        self.live.lock().ring_channels();
    }

    /// Whether a posting verb that fails leaves `bad_wr` as it was.
    pub fn omit_bad_wr(&self, omits: bool) {
        self.omits_bad_wr.store(omits, Ordering::Relaxed);
    }

    /// Whether a queue pair that is reset or destroyed leaves its completions in their queue, as
    /// rxe does.
    pub fn keep_completions(&self, keeps: bool) {
        self.device.keeps_completions.store(keeps, Ordering::Relaxed);
    }

    /// Raises an asynchronous event: for every queue pair, completion queue or shared receive
    /// queue if the type is about those, else once per open context, for port 1.
    pub fn raise(&self, event_type: ibv_event_type) {
        self.live.lock().raise(event_type);
    }

    /// How many objects of this device exist, contexts included: 0 after everything was destroyed.
    #[must_use]
    pub fn live_objects(&self) -> u32 {
        self.device.live_objects()
    }
}
