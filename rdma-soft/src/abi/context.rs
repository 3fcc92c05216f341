//! Devices and contexts: list, open, close.

use std::collections::BTreeSet;
use std::ffi::{c_char, c_int};
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use verbs_sys::inline::ABI_EXTENDED;
use verbs_sys::*;

use super::object::{Object, null, zeroed};
use super::{cq, cq_ex, domain, mr, mw, post, qp, query, srq};
use crate::device::{self, AsyncEvents, Handle, eui64};

/// Name of the device, as `ibv_devices` lists it.
pub(crate) const NAME: &str = "soft0";
/// Completion vectors: one thread serves all.
const COMPLETION_VECTORS: c_int = 1;

/// Our part of a context.
pub(crate) struct ContextData {
    pub(crate) device: Arc<Handle>,
    pub(crate) async_events: Arc<AsyncEvents>,
    /// Objects that were created on it and live.
    pub(crate) objects: Arc<AtomicUsize>,
    /// What its protection domains are compared by.
    domains: Mutex<BTreeSet<u32>>,
}

impl ContextData {
    pub(crate) fn domains(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Context = Object<verbs_context, ContextData>;

/// Our part of the context that a program holds.
///
/// # Safety
///
/// `context` is a live context of this device.
pub(crate) unsafe fn context_data<'a>(context: *mut ibv_context) -> &'a ContextData {
    let verbs = context.wrapping_byte_sub(offset_of!(verbs_context, context)).cast();
    // SAFETY: `open_device` gave out the address of the `context` field of such an object, which lives by
    // the caller's promise.
    unsafe { Context::data(verbs) }
}

/// The one device. Real allocations have room behind the structure, which providers look at.
#[repr(C)]
struct Listed {
    device: ibv_device,
    room: [u64; 16],
}

struct Pointer(*mut ibv_device);
// SAFETY: what it points to is never freed and never written after it was made.
unsafe impl Send for Pointer {}
// SAFETY: as above.
unsafe impl Sync for Pointer {}

fn the_device() -> *mut ibv_device {
    static DEVICE: OnceLock<Pointer> = OnceLock::new();
    let make = || {
        let mut device: ibv_device = zeroed();
        device.node_type = ibv_node_type::IBV_NODE_CA;
        device.transport_type = ibv_transport_type::IBV_TRANSPORT_IB;
        for name in [&mut device.name, &mut device.dev_name] {
            for (to, from) in name.iter_mut().zip(NAME.bytes()) {
                *to = from as c_char;
            }
        }
        Pointer(Box::into_raw(Box::new(Listed { device, room: [0; 16] })).cast())
    };
    DEVICE.get_or_init(make).0
}

/// `man ibv_get_device_list`. No socket is opened: that is for who opens the device.
pub(crate) unsafe extern "C" fn get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let list = Box::new([the_device(), ptr::null_mut()]);
    if !count.is_null() {
        // SAFETY: the caller passes null or a pointer that is valid for writes.
        unsafe { *count = 1 };
    }
    Box::into_raw(list).cast()
}

pub(crate) unsafe extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    if !list.is_null() {
        // SAFETY: a list comes from `get_device_list`, as a box of two pointers, and is freed once.
        drop(unsafe { Box::from_raw(list.cast::<[*mut ibv_device; 2]>()) });
    }
}

pub(crate) unsafe extern "C" fn get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the device is the one of the list, which lives for ever; no reference is made.
    unsafe { (&raw const (*device).name).cast() }
}

pub(crate) unsafe extern "C" fn get_device_guid(_device: *mut ibv_device) -> __be64 {
    // The address, hence the GUID, is known once the device is open; before that the one it would have on
    // the first loopback address stands for it.
    let address = device::current().map_or([127, 0, 0, 1].into(), |device| device.address);
    u64::from_ne_bytes(eui64(device::mac_of(address)))
}

pub(crate) unsafe extern "C" fn get_device_index(_device: *mut ibv_device) -> c_int {
    0
}

pub(crate) unsafe extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    if device != the_device() {
        return null(libc::EINVAL);
    }
    let opened = device::open();
    crate::set_open_error(opened.as_ref().err());
    let handle = match opened {
        Ok(handle) => handle,
        Err(e) => return null(e.errno()),
    };
    let async_events = match AsyncEvents::new() {
        Ok(events) => Arc::new(events),
        Err(e) => return null(e.raw_os_error().unwrap_or(libc::EMFILE)),
    };
    let verbs = tables(device, async_events.fd());
    let data =
        ContextData { device: handle, async_events, objects: Arc::default(), domains: Mutex::default() };
    let verbs = Context::allocate(verbs, data);
    verbs.wrapping_byte_add(offset_of!(verbs_context, context)).cast()
}

fn tables(device: *mut ibv_device, async_fd: c_int) -> verbs_context {
    let mut verbs: verbs_context = zeroed();
    verbs.sz = size_of::<verbs_context>();
    verbs.query_port = Some(query::query_port_ex);
    verbs.query_device_ex = Some(query::query_device_ex);
    verbs.query_rt_values = Some(query::query_rt_values);
    verbs.advise_mr = Some(mr::advise_mr);
    verbs.alloc_null_mr = Some(mr::alloc_null_mr);
    verbs.create_cq_ex = Some(cq_ex::create_cq_ex);
    verbs.modify_cq = Some(cq::modify_cq);
    verbs.create_qp_ex = Some(qp::create_qp_ex);
    verbs.create_srq_ex = Some(srq::create_srq_ex);
    verbs.get_srq_num = Some(srq::get_srq_num);
    verbs.alloc_parent_domain = Some(domain::alloc_parent_domain);
    verbs.alloc_td = Some(domain::alloc_td);
    verbs.dealloc_td = Some(domain::dealloc_td);
    let context = &mut verbs.context;
    context.device = device;
    // Programs duplicate it to share a context, which then fails in words; it has to be a descriptor.
    context.cmd_fd = async_fd;
    context.async_fd = async_fd;
    context.num_comp_vectors = COMPLETION_VECTORS;
    context.abi_compat = ABI_EXTENDED;
    context.ops = ibv_context_ops {
        poll_cq: Some(cq::poll_cq),
        req_notify_cq: Some(cq::req_notify_cq),
        post_send: Some(post::post_send),
        post_recv: Some(post::post_recv),
        post_srq_recv: Some(srq::post_srq_recv),
        alloc_mw: Some(mw::alloc_mw),
        bind_mw: Some(mw::bind_mw),
        dealloc_mw: Some(mw::dealloc_mw),
        ..ibv_context_ops::default()
    };
    verbs
}

/// `man ibv_close_device`. The kernel destroys what the program left behind. Here the program has the memory
/// of it, so that the objects stay, with what they need, until they are destroyed; but none works any more.
pub(crate) unsafe extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    if data.objects.load(Ordering::Acquire) > 0 {
        data.device.withdraw(&data.async_events, &data.domains());
        return 0;
    }
    let verbs = context.wrapping_byte_sub(offset_of!(verbs_context, context)).cast();
    // SAFETY: made by `open_device`; the caller uses it no more.
    drop(unsafe { Context::free(verbs) });
    0
}

/// Counts something, an object of a context for instance, for as long as it lives.
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(crate) fn new(context: &ContextData) -> Self {
        Counted::by(&context.objects)
    }

    pub(crate) fn by(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Counted(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
