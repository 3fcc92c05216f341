//! One device list of two providers: the soft device first, then the system's.

use core::ffi::c_int;
use std::ptr;

use verbs_sys::{Verbs, ibv_device};

use crate::dispatch;

/// What stands in memory before the list that a program gets, so that freeing it can free the providers' own lists.
const HIDDEN: usize = 3;

/// The devices of one provider: its list, to be freed by it, and the number of entries.
///
/// # Safety
///
/// `verbs` is a provider's table.
unsafe fn list(verbs: &Verbs) -> (*mut *mut ibv_device, usize) {
    let mut count: c_int = 0;
    // SAFETY: a provider's function with a valid output pointer.
    let list = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
    (list, if list.is_null() { 0 } else { usize::try_from(count).unwrap_or(0) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device {
    // SAFETY: both are providers' tables.
    let (soft, soft_count) = unsafe { list(rdma_soft::verbs()) };
    let (system, system_count) = match dispatch::system() {
        // SAFETY: as above. The system's library fails with ENOSYS where the kernel has no RDMA: no devices then.
        Some(verbs) => unsafe { list(verbs) },
        None => (ptr::null_mut(), 0),
    };
    let count = soft_count + system_count;
    let mut all: Vec<*mut ibv_device> = Vec::with_capacity(HIDDEN + count + 1);
    all.push(ptr::without_provenance_mut(HIDDEN + count + 1));
    all.push(soft.cast());
    all.push(system.cast());
    for (list, length) in [(soft, soft_count), (system, system_count)] {
        for index in 0..length {
            // SAFETY: the provider said that its list has `length` entries.
            let entry = unsafe { list.add(index) };
            // SAFETY: as above.
            all.push(unsafe { *entry });
        }
    }
    all.push(ptr::null_mut());
    if !num_devices.is_null() {
        // SAFETY: the caller's output pointer; an int holds the count, which came from ints.
        unsafe { *num_devices = c_int::try_from(count).unwrap_or(c_int::MAX) };
    }
    let all = Box::into_raw(all.into_boxed_slice()).cast::<*mut ibv_device>();
    // SAFETY: the allocation holds HIDDEN entries and at least one more.
    unsafe { all.add(HIDDEN) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: `list` came from `ibv_get_device_list`, so HIDDEN entries stand before it.
    let all = unsafe { list.sub(HIDDEN) };
    // SAFETY: the first hidden entry is the length of the allocation.
    let length = unsafe { *all }.addr();
    // SAFETY: pointer and length are those of the boxed slice made there; it is freed once, by contract.
    let all = unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(all, length)) };
    // SAFETY: the provider's own list, freed once.
    unsafe { (rdma_soft::verbs().ibv_free_device_list)(all[1].cast()) };
    if let (Some(verbs), false) = (dispatch::system(), all[2].is_null()) {
        // SAFETY: as above.
        unsafe { (verbs.ibv_free_device_list)(all[2].cast()) };
    }
}
