//! Protection domains, and what belongs to them: memory regions and windows, address handles.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_uint, c_void};
use core::sync::atomic::{AtomicU32, Ordering};

use super::device::Context;
use super::fail;
use crate::bindings::*;

/// A protection domain.
#[repr(C)]
pub(crate) struct Pd {
    base: UnsafeCell<ibv_pd>,
    /// Objects that refer to it.
    uses: AtomicU32,
}

impl Pd {
    /// # Safety
    ///
    /// `raw` is a live protection domain of this provider.
    pub(crate) unsafe fn from_raw<'a>(raw: *mut ibv_pd) -> &'a Pd {
        // SAFETY: it points to the first field of a `Pd`.
        unsafe { &*raw.cast::<Pd>() }
    }

    pub(crate) fn raw_context(&self) -> *mut ibv_context {
        let base = self.base.get();
        // SAFETY: set at creation and never changed.
        unsafe { (*base).context }
    }

    pub(crate) fn context(&self) -> &Context {
        // SAFETY: a context outlives its objects (`close_device` refuses otherwise).
        unsafe { Context::from_raw(self.raw_context()) }
    }

    /// Counts an object that begins to refer to it.
    pub(crate) fn born(&self) {
        self.uses.fetch_add(1, Ordering::Relaxed);
        self.context().born();
    }

    /// Counts an object that no longer does.
    pub(crate) fn died(&self) {
        self.uses.fetch_sub(1, Ordering::Release);
        self.context().died();
    }
}

pub(crate) unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: the caller passes a live context.
    unsafe { Context::from_raw(context) }.born();
    let base = UnsafeCell::new(ibv_pd { context, handle: 0 });
    Box::into_raw(Box::new(Pd { base, uses: AtomicU32::new(0) })).cast()
}

pub(crate) unsafe extern "C" fn dealloc_pd(raw: *mut ibv_pd) -> c_int {
    // SAFETY: the caller passes a live domain.
    let pd = unsafe { Pd::from_raw(raw) };
    if pd.uses.load(Ordering::Acquire) != 0 {
        return libc::EBUSY;
    }
    pd.context().died();
    // SAFETY: it came from `Box::into_raw` in `alloc_pd`, and nothing refers to it any more.
    drop(unsafe { Box::from_raw(raw.cast::<Pd>()) });
    0
}

/// A new key: an index, and below it the eight bits that are the consumer's.
pub(crate) fn new_key() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed) << 8
}

pub(crate) unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    let remote_writes =
        ibv_access_flags::IBV_ACCESS_REMOTE_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC;
    let access = access.cast_unsigned();
    // As the kernel checks: what a peer may write must be writable locally.
    if access & remote_writes.0 != 0 && access & ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0 == 0 {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller passes a live domain.
    let domain = unsafe { Pd::from_raw(pd) };
    domain.born();
    let key = new_key();
    let context = domain.raw_context();
    Box::into_raw(Box::new(ibv_mr { context, pd, addr, length, handle: 0, lkey: key, rkey: key }))
}

pub(crate) unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's arguments.
    unsafe { reg_mr(pd, addr, length, access) }
}

pub(crate) unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller's arguments.
    unsafe { reg_mr(pd, addr, length, access.cast_signed()) }
}

pub(crate) unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the caller passes a live region, made by `Box::into_raw` in `reg_mr`.
    let mr = unsafe { Box::from_raw(mr) };
    // SAFETY: a domain outlives its regions (`dealloc_pd` refuses otherwise).
    unsafe { Pd::from_raw(mr.pd) }.died();
    0
}

pub(crate) unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, mw_type: ibv_mw_type) -> *mut ibv_mw {
    if !matches!(mw_type, ibv_mw_type::IBV_MW_TYPE_1 | ibv_mw_type::IBV_MW_TYPE_2) {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller passes a live domain.
    let domain = unsafe { Pd::from_raw(pd) };
    domain.born();
    let context = domain.raw_context();
    Box::into_raw(Box::new(ibv_mw { context, pd, rkey: new_key(), handle: 0, type_: mw_type }))
}

pub(crate) unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: the caller passes a live window, made by `Box::into_raw` in `alloc_mw`.
    let mw = unsafe { Box::from_raw(mw) };
    // SAFETY: a domain outlives its windows.
    unsafe { Pd::from_raw(mw.pd) }.died();
    0
}

pub(crate) unsafe extern "C" fn create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: the caller passes valid attributes.
    if !is_valid_path(unsafe { &*attr }) {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller passes a live domain.
    let domain = unsafe { Pd::from_raw(pd) };
    domain.born();
    Box::into_raw(Box::new(ibv_ah { context: domain.raw_context(), pd, handle: 0 }))
}

/// Whether a path can be used on this device's only port: RoCE needs a global route.
pub(crate) fn is_valid_path(attr: &ibv_ah_attr) -> bool {
    attr.port_num <= 1 && attr.is_global != 0 && attr.grh.sgid_index < 2
}

pub(crate) unsafe extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: the caller passes a live handle, made by `Box::into_raw` in `create_ah`.
    let ah = unsafe { Box::from_raw(ah) };
    // SAFETY: a domain outlives its handles.
    unsafe { Pd::from_raw(ah.pd) }.died();
    0
}
