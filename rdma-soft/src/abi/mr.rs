//! Memory regions.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::domain::{DomainUse, domain};
use super::object::{Object, null};
use crate::device::{Access, Handle, Paging, RawMemory, Region, RemoveError};

/// Our part of a memory region.
pub(crate) struct MrData {
    device: Arc<Handle>,
    /// Changes with a re-registration.
    domain: Mutex<DomainUse>,
    _counted: Counted,
}

type Mr = Object<ibv_mr, MrData>;

/// What a registration asks for, checked.
///
/// # Safety
///
/// As for [`RawMemory::new`], which is the contract of `ibv_reg_mr`: the memory stays mapped as it is until
/// it is deregistered.
unsafe fn memory(addr: *mut c_void, length: usize, access: Access) -> Result<RawMemory, c_int> {
    // Peers change memory through it, so the device must be able to (clause 11.2.8.2).
    if access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC)
        && !access.contains(Access::LOCAL_WRITE)
    {
        return Err(libc::EINVAL);
    }
    if access.bits() & !Access::all().bits() != 0 {
        return Err(libc::EINVAL);
    }
    // All of the address space at once is an implicit region, which `odp_caps` does not name.
    if length == usize::MAX || addr.addr().checked_add(length).is_none() {
        return Err(libc::EINVAL);
    }
    let paging = if access.contains(Access::ON_DEMAND) { Paging::OnDemand } else { Paging::Mapped };
    if paging == Paging::Mapped {
        crate::sys::check_mapped(addr.addr(), length, access.intersects(Access::CHANGES))?;
    }
    // SAFETY: mapped now, and until the deregistration by the caller's promise; or on demand.
    Ok(unsafe { RawMemory::new(addr.cast(), length, paging) })
}

/// # Safety
///
/// The contract of `ibv_reg_mr_iova2`.
unsafe fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: u32,
) -> Result<*mut ibv_mr, c_int> {
    // SAFETY: the caller passes a live protection domain.
    let data = unsafe { domain(pd) };
    let access = Access::from_bits_retain(access);
    // SAFETY: the caller's promise.
    let memory = unsafe { memory(addr, length, access) }?;
    let start = if access.contains(Access::ZERO_BASED) { 0 } else { iova };
    // Addresses must not wrap around inside of the region.
    start.checked_add(length as u64).ok_or(libc::EINVAL)?;
    let key = data
        .device
        .memory
        .add_region(Region { pd: data.domain.id, start, memory, access })
        .map_err(|_| libc::ENOMEM)?;
    // SAFETY: a live protection domain's context is live.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let counted = Counted::new(unsafe { context_data(context) });
    let c = ibv_mr { context, pd, addr, length, handle: key, lkey: key, rkey: key };
    let domain = Mutex::new(DomainUse::new(&data.domain));
    Ok(Mr::allocate(c, MrData { device: Arc::clone(&data.device), domain, _counted: counted }))
}

pub(crate) unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the same contract; device addresses are the program's own.
    unsafe { register(pd, addr, length, addr.addr() as u64, access.cast_unsigned()) }.unwrap_or_else(null)
}

pub(crate) unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the same contract.
    unsafe { register(pd, addr, length, iova, access.cast_unsigned()) }.unwrap_or_else(null)
}

pub(crate) unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the same contract.
    unsafe { register(pd, addr, length, iova, access) }.unwrap_or_else(null)
}

/// `man ibv_reg_dmabuf_mr`: the memory of another device cannot be reached from here.
pub(crate) unsafe extern "C" fn reg_dmabuf_mr(
    _: *mut ibv_pd,
    _: u64,
    _: usize,
    _: u64,
    _: c_int,
    _: c_int,
) -> *mut ibv_mr {
    null(libc::EOPNOTSUPP)
}

/// `man ibv_alloc_null_mr`: not offered.
pub(crate) unsafe extern "C" fn alloc_null_mr(_: *mut ibv_pd) -> *mut ibv_mr {
    null(libc::EOPNOTSUPP)
}

pub(crate) unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the caller passes a live region.
    let data = unsafe { Mr::data(mr) };
    // SAFETY: as above.
    let key = unsafe { (*mr).handle };
    match data.device.memory.remove_region(key) {
        Ok(()) => {
            // SAFETY: the caller uses it no more, and the device does not either.
            drop(unsafe { Mr::free(mr) });
            0
        }
        Err(RemoveError::Bound) => libc::EBUSY,
        Err(RemoveError::Unknown) => libc::EINVAL,
    }
}

/// `man ibv_rereg_mr`: changes address, access, protection domain, or several of them; the keys stay.
pub(crate) unsafe extern "C" fn rereg_mr(
    mr: *mut ibv_mr,
    flags: c_int,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> c_int {
    const BAD_INPUT: c_int = ibv_rereg_mr_err_code::IBV_REREG_MR_ERR_INPUT.0;
    const COMMAND_FAILED: c_int = ibv_rereg_mr_err_code::IBV_REREG_MR_ERR_CMD.0;
    let flags = ibv_rereg_mr_flags(flags.cast_unsigned());
    let has = |flag: ibv_rereg_mr_flags| flags.0 & flag.0 != 0;
    let translation = has(ibv_rereg_mr_flags::IBV_REREG_MR_CHANGE_TRANSLATION);
    let change_pd = has(ibv_rereg_mr_flags::IBV_REREG_MR_CHANGE_PD);
    let change_access = has(ibv_rereg_mr_flags::IBV_REREG_MR_CHANGE_ACCESS);
    let refuse = |code: c_int, errno: c_int| {
        verbs_sys::inline::set_errno(errno);
        code
    };
    if flags.0 == 0
        || flags.0 & !ibv_rereg_mr_flags::IBV_REREG_MR_FLAGS_SUPPORTED.0 != 0
        || (translation && (length == 0 || addr.is_null()))
        || (change_pd && pd.is_null())
    {
        return refuse(BAD_INPUT, libc::EINVAL);
    }
    // SAFETY: the caller passes a live region.
    let data = unsafe { Mr::data(mr) };
    // SAFETY: as above; it is copied, no reference is kept.
    let ibv_mr { context, handle: key, addr: old_addr, length: old_length, .. } = unsafe { *mr };
    // SAFETY: the caller passes a live protection domain if it is to change.
    if change_pd && unsafe { (*pd).context } != context {
        return refuse(BAD_INPUT, libc::EINVAL);
    }
    let Some(old) = data.device.memory.region(key) else { return refuse(COMMAND_FAILED, libc::EINVAL) };
    let access = if change_access { Access::from_bits_retain(access.cast_unsigned()) } else { old.access };
    let (new_addr, new_length) = if translation { (addr, length) } else { (old_addr, old_length) };
    // SAFETY: the contract of the call: the memory, old or new, stays mapped while it is registered.
    let memory = match unsafe { memory(new_addr, new_length, access) } {
        Ok(memory) => memory,
        Err(errno) => return refuse(COMMAND_FAILED, errno),
    };
    // SAFETY: as above.
    let new_domain = change_pd.then(|| unsafe { domain(pd) });
    let region = Region {
        pd: new_domain.map_or(old.pd, |d| d.domain.id),
        start: if translation { new_addr.addr() as u64 } else { old.start },
        memory,
        access,
    };
    match data.device.memory.change_region(key, region) {
        Ok(()) => {}
        Err(RemoveError::Bound) => return refuse(COMMAND_FAILED, libc::EBUSY),
        Err(RemoveError::Unknown) => return refuse(COMMAND_FAILED, libc::EINVAL),
    }
    if let Some(new) = new_domain {
        *data.domain.lock().unwrap_or_else(PoisonError::into_inner) = DomainUse::new(&new.domain);
        // SAFETY: the structure is live, and this call is the one that changes it.
        unsafe { (*mr).pd = pd };
    }
    if translation {
        // SAFETY: as above.
        unsafe { (*mr).addr = addr };
        // SAFETY: as above.
        unsafe { (*mr).length = length };
    }
    0
}

/// `man ibv_advise_mr`: advice to fetch pages is checked and otherwise not needed, for an access fetches them.
pub(crate) unsafe extern "C" fn advise_mr(
    pd: *mut ibv_pd,
    advice: ib_uverbs_advise_mr_advice,
    flags: u32,
    sg_list: *mut ibv_sge,
    num_sge: u32,
) -> c_int {
    type Advice = ib_uverbs_advise_mr_advice;
    const FLUSH: u32 = ib_uverbs_advise_mr_flag::IB_UVERBS_ADVISE_MR_FLAG_FLUSH.0;
    let write = match advice {
        Advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH
        | Advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT => false,
        Advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE => true,
        _ => return libc::EOPNOTSUPP,
    };
    let Ok(count) = c_int::try_from(num_sge) else { return libc::EINVAL };
    if flags & !FLUSH != 0 || count == 0 {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live protection domain.
    let data = unsafe { domain(pd) };
    // SAFETY: and a valid list of elements.
    let Ok(mut elements) = (unsafe { super::post::sges(sg_list, count) }) else { return libc::EINVAL };
    match elements.all(|sge| data.device.memory.covers(data.domain.id, &sge, write)) {
        true => 0,
        false => libc::ENOENT,
    }
}
