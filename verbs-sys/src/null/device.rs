//! The device, its context and their queries.

use core::cell::UnsafeCell;
use core::ffi::{c_char, c_int};
use core::mem::{MaybeUninit, offset_of, size_of};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::net::Ipv4Addr;
use std::sync::OnceLock;

use super::event::EventQueue;
use super::{cq, fail, memory, post};
use crate::bindings::*;
use crate::inline::{ABI_EXTENDED, set_errno};

/// Limits that the device states and checks.
pub(crate) const MAX_QUEUE: u32 = 1 << 15;
pub(crate) const MAX_CQE: u32 = 1 << 20;
pub(crate) const MAX_SGE: u32 = 32;
pub(crate) const MAX_INLINE: u32 = 512;
pub(crate) const MAX_MESSAGE: u32 = 1 << 31;

/// The address of GID index 1, from the block that is reserved for documentation.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PKEY: u16 = 0xffff;

/// A device, never freed. `repr(C)`: a pointer to its first field is a pointer to it.
#[repr(C)]
pub(crate) struct Device {
    base: UnsafeCell<ibv_device>,
    /// Providers look behind the public structure; real allocations have room there.
    _room: [u64; 16],
    index: u32,
    /// Contexts, and objects of contexts.
    live: AtomicU32,
    /// A queue pair that is reset or destroyed leaves its completions behind, as on rxe.
    pub(crate) keeps_completions: AtomicBool,
}

impl Device {
    pub(crate) fn new(name: &str, index: u32) -> Device {
        let mut base = ibv_device {
            _ops: _ibv_device_ops { _dummy1: None, _dummy2: None },
            node_type: ibv_node_type::IBV_NODE_CA,
            transport_type: ibv_transport_type::IBV_TRANSPORT_IB,
            name: [0; 64],
            dev_name: [0; 64],
            dev_path: [0; 256],
            ibdev_path: [0; 256],
        };
        copy_name(&mut base.name, name);
        copy_name(&mut base.dev_name, name);
        Device {
            base: UnsafeCell::new(base),
            _room: [0; 16],
            index,
            live: AtomicU32::new(0),
            keeps_completions: AtomicBool::new(false),
        }
    }

    /// # Safety
    ///
    /// `raw` came from [`as_raw`](Device::as_raw).
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_device) -> &'a Device {
        // SAFETY: devices are never freed, and `base` is the first field.
        unsafe { &*raw.cast::<Device>() }
    }

    pub(crate) fn as_raw(&self) -> *mut ibv_device {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// How many objects of this device exist.
    pub(crate) fn live_objects(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }
}

// SAFETY: `base` is written before the device is shared and only read afterwards; the rest is atomic.
unsafe impl Sync for Device {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Device {}

fn copy_name(to: &mut [c_char], name: &str) {
    for (slot, byte) in to.iter_mut().zip(name.bytes()) {
        *slot = byte as c_char;
    }
}

/// An open device.
#[repr(C)]
pub(crate) struct Context {
    verbs: UnsafeCell<verbs_context>,
    pub(crate) async_events: EventQueue<ibv_async_event>,
    /// Objects that refer to this context.
    objects: AtomicU32,
}

impl Context {
    /// # Safety
    ///
    /// `raw` is a live context of this provider.
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_context) -> &'a Context {
        // SAFETY: it was made from the whole allocation, whose first field is the `verbs_context`.
        let start = unsafe { raw.cast::<u8>().sub(offset_of!(verbs_context, context)) };
        // SAFETY: and that allocation is a live `Context`.
        unsafe { &*start.cast::<Context>() }
    }

    pub(crate) fn device(&self) -> &'static Device {
        let verbs = self.verbs.get();
        // SAFETY: the context is live and its device pointer never changes.
        let raw = unsafe { (*verbs).context.device };
        // SAFETY: `open_device` set it to a device of this provider.
        unsafe { Device::from_raw(raw) }
    }

    /// Counts an object that was created.
    pub(crate) fn born(&self) {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.device().live.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an object that was destroyed.
    pub(crate) fn died(&self) {
        self.objects.fetch_sub(1, Ordering::Release);
        self.device().live.fetch_sub(1, Ordering::Relaxed);
    }
}

fn null0() -> &'static Device {
    static NULL0: OnceLock<Device> = OnceLock::new();
    NULL0.get_or_init(|| Device::new("null0", 0))
}

/// A null-terminated list as `ibv_get_device_list` returns.
///
/// # Safety
///
/// `count` is null or valid for writes.
pub(crate) unsafe fn device_list(devices: &[*mut ibv_device], count: *mut c_int) -> *mut *mut ibv_device {
    // SAFETY: no precondition; the memory is zeroed, so that the list ends with a null pointer.
    let list =
        unsafe { libc::calloc(devices.len() + 1, size_of::<*mut ibv_device>()) }.cast::<*mut ibv_device>();
    if list.is_null() {
        return fail(libc::ENOMEM);
    }
    // SAFETY: there is room for one more than `devices.len()`, and the memory is new.
    unsafe { ptr::copy_nonoverlapping(devices.as_ptr(), list, devices.len()) };
    if !count.is_null() {
        // SAFETY: the caller's promise.
        unsafe { count.write(c_int::try_from(devices.len()).unwrap_or(c_int::MAX)) };
    }
    list
}

pub(crate) unsafe extern "C" fn get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    // SAFETY: the caller passes null or a valid pointer.
    unsafe { device_list(&[null0().as_raw()], count) }
}

pub(crate) unsafe extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: the caller passes a list from `device_list`, which took it from `calloc`.
    unsafe { libc::free(list.cast()) }
}

pub(crate) unsafe extern "C" fn get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the caller passes a device of this provider, which lives for ever.
    unsafe { &raw const (*device).name }.cast()
}

pub(crate) unsafe extern "C" fn get_device_guid(device: *mut ibv_device) -> __be64 {
    // SAFETY: the caller passes a device of this provider.
    guid(unsafe { Device::from_raw(device) })
}

fn guid(device: &Device) -> __be64 {
    (0x0200_5eff_fe00_0000_u64 | u64::from(device.index)).to_be()
}

pub(crate) unsafe extern "C" fn get_device_index(device: *mut ibv_device) -> c_int {
    // SAFETY: the caller passes a device of this provider.
    c_int::try_from(unsafe { Device::from_raw(device) }.index).unwrap_or(-1)
}

pub(crate) unsafe extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    let async_events = match EventQueue::new() {
        Ok(events) => events,
        Err(error) => return fail(error.raw_os_error().unwrap_or(libc::EMFILE)),
    };
    // SAFETY: all zeroes is a valid `verbs_context`: empty slots, null pointers, an unlocked mutex.
    let mut verbs = unsafe { MaybeUninit::<verbs_context>::zeroed().assume_init() };
    verbs.query_port = Some(query_port);
    verbs.query_device_ex = Some(query_device_ex);
    verbs.sz = size_of::<verbs_context>();
    verbs.context.device = device;
    verbs.context.cmd_fd = -1;
    verbs.context.async_fd = async_events.raw_fd();
    verbs.context.num_comp_vectors = 1;
    verbs.context.abi_compat = ABI_EXTENDED;
    let ops = &mut verbs.context.ops;
    ops.alloc_mw = Some(memory::alloc_mw);
    ops.bind_mw = Some(post::bind_mw);
    ops.dealloc_mw = Some(memory::dealloc_mw);
    ops.poll_cq = Some(cq::poll_cq);
    ops.req_notify_cq = Some(cq::req_notify_cq);
    ops.post_srq_recv = Some(post::post_srq_recv);
    ops.post_send = Some(post::post_send);
    ops.post_recv = Some(post::post_recv);
    let context = Box::into_raw(Box::new(Context {
        verbs: UnsafeCell::new(verbs),
        async_events,
        objects: AtomicU32::new(0),
    }));
    // SAFETY: the caller passes a device of this provider.
    unsafe { Device::from_raw(device) }.live.fetch_add(1, Ordering::Relaxed);
    // SAFETY: stays within the allocation: the context is the last field of the first field.
    unsafe { context.cast::<u8>().add(offset_of!(verbs_context, context)) }.cast()
}

/// Closes the context; `EBUSY` while objects refer to it, where a real library would leave them dangling.
pub(crate) unsafe extern "C" fn close_device(raw: *mut ibv_context) -> c_int {
    // SAFETY: the caller passes a live context.
    let context = unsafe { Context::from_raw(raw) };
    if context.objects.load(Ordering::Acquire) != 0 {
        set_errno(libc::EBUSY);
        return -1;
    }
    context.device().live.fetch_sub(1, Ordering::Relaxed);
    // SAFETY: as in `from_raw`.
    let start = unsafe { raw.cast::<u8>().sub(offset_of!(verbs_context, context)) };
    // SAFETY: it came from `Box::into_raw` in `open_device`, and nothing refers to it any more.
    drop(unsafe { Box::from_raw(start.cast::<Context>()) });
    0
}

pub(crate) unsafe extern "C" fn query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller passes a live context.
    let device = unsafe { Context::from_raw(context) }.device();
    // SAFETY: the caller passes a valid output pointer.
    unsafe { attr.write(device_attr(device)) };
    0
}

fn device_attr(device: &Device) -> ibv_device_attr {
    let many = 1 << 16;
    let mut attr = ibv_device_attr {
        node_guid: guid(device),
        sys_image_guid: guid(device),
        max_mr_size: u64::MAX,
        page_size_cap: 0xffff_f000,
        max_qp: many,
        max_qp_wr: MAX_QUEUE.cast_signed(),
        device_cap_flags: (ibv_device_cap_flags::IBV_DEVICE_RC_RNR_NAK_GEN
            | ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW
            | ibv_device_cap_flags::IBV_DEVICE_MEM_MGT_EXTENSIONS)
            .0,
        max_sge: MAX_SGE.cast_signed(),
        max_sge_rd: MAX_SGE.cast_signed(),
        max_cq: many,
        max_cqe: MAX_CQE.cast_signed(),
        max_mr: many,
        max_pd: many,
        max_qp_rd_atom: 128,
        max_res_rd_atom: 128 * many,
        max_qp_init_rd_atom: 128,
        atomic_cap: ibv_atomic_cap::IBV_ATOMIC_HCA,
        max_mw: many,
        max_mcast_grp: many,
        max_mcast_qp_attach: many,
        max_total_mcast_qp_attach: many,
        max_ah: many,
        max_srq: many,
        max_srq_wr: MAX_QUEUE.cast_signed(),
        max_srq_sge: MAX_SGE.cast_signed(),
        max_pkeys: 1,
        phys_port_cnt: 1,
        ..Default::default()
    };
    copy_name(&mut attr.fw_ver, env!("CARGO_PKG_VERSION"));
    attr
}

pub(crate) unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    _input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let device = unsafe { Context::from_raw(context) }.device();
    let full =
        ibv_device_attr_ex { orig_attr: device_attr(device), phys_port_cnt_ex: 1, ..Default::default() };
    if size < size_of::<ibv_device_attr>() {
        return libc::EINVAL;
    }
    let size = size.min(size_of::<ibv_device_attr_ex>());
    // SAFETY: the caller's structure has at least `size` bytes, and ours has them too.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(&full).cast::<u8>(), attr.cast::<u8>(), size) };
    0
}

fn port_attr() -> ibv_port_attr {
    ibv_port_attr {
        state: ibv_port_state::IBV_PORT_ACTIVE,
        max_mtu: ibv_mtu::IBV_MTU_4096,
        active_mtu: ibv_mtu::IBV_MTU_4096,
        gid_tbl_len: 2,
        port_cap_flags: ibv_port_cap_flags::IBV_PORT_CM_SUP.0 | ibv_port_cap_flags::IBV_PORT_IP_BASED_GIDS.0,
        max_msg_sz: MAX_MESSAGE,
        pkey_tbl_len: 1,
        max_vl_num: 1,
        active_width: 1,
        active_speed: 1,
        phys_state: 5,
        link_layer: 2, // IBV_LINK_LAYER_ETHERNET, whose type is wider than the field
        ..Default::default()
    }
}

pub(crate) unsafe extern "C" fn query_port(
    _context: *mut ibv_context,
    port_num: u8,
    attr: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    if port_num != 1 {
        return libc::EINVAL;
    }
    let full = port_attr();
    let size = size.min(size_of::<ibv_port_attr>());
    // SAFETY: the caller's structure has at least `size` bytes, and ours has them too.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(&full).cast::<u8>(), attr.cast::<u8>(), size) };
    0
}

pub(crate) unsafe extern "C" fn query_port_compat(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    // The exported function's structure ends before `port_cap_flags2` was added to it.
    // SAFETY: the caller's structure has these bytes.
    unsafe { query_port(context, port_num, attr.cast(), offset_of!(ibv_port_attr, port_cap_flags2)) }
}

fn gid_entry(port_num: u32, index: u32) -> Option<ibv_gid_entry> {
    let address = ADDRESS.to_ipv6_mapped().octets();
    let raw = match (port_num, index) {
        (1, 0) => [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x02, 0x00, 0x5e, 0xff, 0xfe, 0, 0, 1],
        (1, 1) => address,
        _ => return None,
    };
    Some(ibv_gid_entry {
        gid: ibv_gid { raw },
        gid_index: index,
        port_num,
        gid_type: ibv_gid_type::IBV_GID_TYPE_ROCE_V2.0,
        ndev_ifindex: 1,
    })
}

pub(crate) unsafe extern "C" fn query_gid(
    _context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    let Some(entry) = u32::try_from(index).ok().and_then(|index| gid_entry(port_num.into(), index)) else {
        set_errno(libc::EINVAL);
        return -1;
    };
    // SAFETY: the caller passes a valid output pointer.
    unsafe { gid.write(entry.gid) };
    0
}

pub(crate) unsafe extern "C" fn query_gid_ex(
    _context: *mut ibv_context,
    port_num: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    size: usize,
) -> c_int {
    let Some(found) = gid_entry(port_num, index) else { return libc::EINVAL };
    if flags != 0 || size < size_of::<ibv_gid_entry>() {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a valid output pointer for `size` bytes.
    unsafe { entry.write(found) };
    0
}

pub(crate) unsafe extern "C" fn query_gid_table(
    _context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    flags: u32,
    size: usize,
) -> isize {
    if flags != 0 || size < size_of::<ibv_gid_entry>() {
        return -(libc::EINVAL as isize);
    }
    let mut count = 0;
    for entry in (0..).map_while(|index| gid_entry(1, index)).take(max) {
        // SAFETY: the caller's array has `max` entries of `size` bytes each.
        let at = unsafe { entries.cast::<u8>().add(count * size) };
        // SAFETY: as above; it need not be aligned beyond what `size` gives.
        unsafe { at.cast::<ibv_gid_entry>().write_unaligned(entry) };
        count += 1;
    }
    count.cast_signed()
}

pub(crate) unsafe extern "C" fn query_pkey(
    _context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    pkey: *mut __be16,
) -> c_int {
    if port_num != 1 || index != 0 {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: the caller passes a valid output pointer.
    unsafe { pkey.write(PKEY.to_be()) };
    0
}

pub(crate) unsafe extern "C" fn get_pkey_index(
    _context: *mut ibv_context,
    port_num: u8,
    pkey: __be16,
) -> c_int {
    if port_num == 1 && pkey == PKEY.to_be() {
        return 0;
    }
    set_errno(libc::EINVAL);
    -1
}
