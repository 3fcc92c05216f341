//! Protection domains, thread domains, parent domains.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::object::{Object, null};
use crate::device::{Handle, load};

/// A protection domain as other objects hold it.
pub(crate) struct Domain {
    /// What memory, queue pairs and address handles are compared by.
    pub(crate) id: u32,
    users: AtomicUsize,
}

/// One use of a protection domain, which cannot be deallocated meanwhile.
pub(crate) struct DomainUse(Arc<Domain>);

impl DomainUse {
    pub(crate) fn new(domain: &Arc<Domain>) -> Self {
        domain.users.fetch_add(1, Ordering::AcqRel);
        DomainUse(Arc::clone(domain))
    }

    /// What the domain is compared by.
    pub(crate) fn id(&self) -> u32 {
        self.0.id
    }
}

impl Drop for DomainUse {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Our part of a protection domain.
pub(crate) struct DomainData {
    pub(crate) device: Arc<Handle>,
    pub(crate) domain: Arc<Domain>,
    /// The domain below a parent domain.
    below: Option<DomainUse>,
    /// The use of a parent domain's thread domain.
    _thread: Option<Counted>,
    _counted: Counted,
}

/// Our part of a thread domain.
struct ThreadData {
    /// Parent domains that have it.
    users: Arc<AtomicUsize>,
    _counted: Counted,
}

pub(crate) type Pd = Object<ibv_pd, DomainData>;
type Td = Object<ibv_td, ThreadData>;

/// # Safety
///
/// `pd` is a live protection domain of this device.
pub(crate) unsafe fn domain<'a>(pd: *mut ibv_pd) -> &'a DomainData {
    // SAFETY: the caller's promise.
    unsafe { Pd::data(pd) }
}

pub(crate) unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    data.domains().insert(id);
    Pd::allocate(
        ibv_pd { context, handle: id },
        DomainData {
            device: Arc::clone(&data.device),
            domain: Arc::new(Domain { id, users: AtomicUsize::new(0) }),
            below: None,
            _thread: None,
            _counted: Counted::new(data),
        },
    )
}

pub(crate) unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: the caller passes a live protection domain.
    let data = unsafe { domain(pd) };
    if load(&data.domain.users) > 0 {
        return libc::EBUSY;
    }
    if data.below.is_none() {
        // SAFETY: a live protection domain's context is live.
        let context = unsafe { (*pd).context };
        // SAFETY: as above.
        unsafe { context_data(context) }.domains().remove(&data.domain.id);
    }
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { Pd::free(pd) });
    0
}

/// `man ibv_alloc_parent_domain`. Allocators are accepted and not used: the device allocates nothing that
/// the program would want elsewhere.
pub(crate) unsafe extern "C" fn alloc_parent_domain(
    context: *mut ibv_context,
    attr: *mut ibv_parent_domain_init_attr,
) -> *mut ibv_pd {
    // SAFETY: the caller passes a valid attribute structure.
    let attr = unsafe { &*attr };
    let known = ibv_parent_domain_init_attr_mask::IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS.0
        | ibv_parent_domain_init_attr_mask::IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT.0;
    if attr.pd.is_null() {
        return null(libc::EINVAL);
    }
    if attr.comp_mask & !known != 0 {
        return null(libc::EOPNOTSUPP);
    }
    // SAFETY: the caller passes live domains in the attributes.
    let foreign_td = !attr.td.is_null() && unsafe { (*attr.td).context } != context;
    // SAFETY: as above.
    if foreign_td || unsafe { (*attr.pd).context } != context {
        return null(libc::EINVAL);
    }
    // SAFETY: as above.
    let below = unsafe { domain(attr.pd) };
    // SAFETY: as above, where there is one.
    let thread = (!attr.td.is_null()).then(|| unsafe { Td::data(attr.td) });
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    Pd::allocate(
        ibv_pd { context, handle: below.domain.id },
        DomainData {
            device: Arc::clone(&data.device),
            // It compares as the domain below, and is in use by itself.
            domain: Arc::new(Domain { id: below.domain.id, users: AtomicUsize::new(0) }),
            below: Some(DomainUse::new(&below.domain)),
            _thread: thread.map(|thread| Counted::by(&thread.users)),
            _counted: Counted::new(data),
        },
    )
}

pub(crate) unsafe extern "C" fn alloc_td(
    context: *mut ibv_context,
    attr: *mut ibv_td_init_attr,
) -> *mut ibv_td {
    // SAFETY: the caller passes a valid attribute structure.
    if unsafe { (*attr).comp_mask } != 0 {
        return null(libc::EOPNOTSUPP);
    }
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    Td::allocate(ibv_td { context }, ThreadData { users: Arc::default(), _counted: Counted::new(data) })
}

pub(crate) unsafe extern "C" fn dealloc_td(td: *mut ibv_td) -> c_int {
    // SAFETY: the caller passes a live thread domain.
    if load(&unsafe { Td::data(td) }.users) > 0 {
        return libc::EBUSY;
    }
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { Td::free(td) });
    0
}
