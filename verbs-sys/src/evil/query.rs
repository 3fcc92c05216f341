//! The queries: the null provider's answers, which may be changed on the way.

use core::ffi::c_int;
use core::mem::offset_of;
use core::ptr;

use super::control::{Object, minus_one};
use crate::bindings::*;
use crate::null::{device, qp};

pub(super) unsafe extern "C" fn query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_device.strike() {
        return errno;
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { device::query_device(context, attr) };
    // SAFETY: the base wrote it.
    evil.device_attr.apply(unsafe { &mut *attr });
    result
}

pub(super) unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_device.strike() {
        return errno;
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { device::query_device_ex(context, input, attr, size) };
    if result == 0 {
        // SAFETY: the base wrote at least this first field.
        evil.device_attr.apply(unsafe { &mut *attr.cast::<ibv_device_attr>() });
    }
    result
}

pub(super) unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_port.strike() {
        return errno;
    }
    let mut full = ibv_port_attr::default();
    // SAFETY: a live context and room for the whole structure.
    let result = unsafe { device::query_port(context, port_num, &raw mut full, size_of::<ibv_port_attr>()) };
    if result == 0 {
        evil.port.apply(&mut full);
        let size = size.min(size_of::<ibv_port_attr>());
        // SAFETY: the caller's structure has `size` bytes, and ours has them too.
        unsafe { ptr::copy_nonoverlapping(ptr::from_ref(&full).cast::<u8>(), attr.cast::<u8>(), size) };
    }
    result
}

pub(super) unsafe extern "C" fn query_port_compat(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    // SAFETY: the caller's structure has these bytes.
    unsafe { query_port(context, port_num, attr.cast(), offset_of!(ibv_port_attr, port_cap_flags2)) }
}

pub(super) unsafe extern "C" fn query_gid(
    context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_gid.strike() {
        return minus_one(errno);
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { device::query_gid(context, port_num, index, gid) };
    if result == 0 {
        // SAFETY: the base wrote it.
        let mut entry = ibv_gid_entry { gid: unsafe { *gid }, ..Default::default() };
        evil.gid.apply(&mut entry);
        // SAFETY: the caller passes a valid output pointer.
        unsafe { gid.write(entry.gid) };
    }
    result
}

pub(super) unsafe extern "C" fn query_gid_ex(
    context: *mut ibv_context,
    port_num: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    size: usize,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_gid_ex.strike() {
        return errno;
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { device::query_gid_ex(context, port_num, index, entry, flags, size) };
    if result == 0 {
        // SAFETY: the base wrote it.
        evil.gid.apply(unsafe { &mut *entry });
    }
    result
}

pub(super) unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    flags: u32,
    size: usize,
) -> isize {
    // SAFETY: the caller passes a live context.
    let evil = unsafe { context.evil() };
    if let Some(errno) = evil.query_gid_table.strike() {
        return -(errno as isize);
    }
    // SAFETY: the caller's arguments.
    let mut count = unsafe { device::query_gid_table(context, entries, max, flags, size) };
    for i in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the base wrote `count` entries of `size` bytes each, at least as long as ours.
        let at = unsafe { entries.cast::<u8>().add(i * size) }.cast::<ibv_gid_entry>();
        // SAFETY: as above.
        let mut entry = unsafe { at.read_unaligned() };
        evil.gid.apply(&mut entry);
        // SAFETY: as above.
        unsafe { at.write_unaligned(entry) };
    }
    evil.gid_count.apply(&mut count);
    count
}

pub(super) unsafe extern "C" fn query_qp(
    pair: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller passes a live pair.
    let evil = unsafe { pair.evil() };
    if let Some(errno) = evil.query_qp.strike() {
        return errno;
    }
    // SAFETY: the caller's arguments.
    let result = unsafe { qp::query_qp(pair, attr, mask, init) };
    // SAFETY: the base wrote it.
    evil.qp_attr.apply(unsafe { &mut *attr });
    result
}
