//! Memory windows: remote access to a part of a region, given and taken without registering.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use verbs_sys::{ibv_mw, ibv_mw_type, inline};

use crate::inflight::{Keep, Kept};
use crate::mr::{RegionFlags, RemoteAccess, RemoteSlice, SharedRegion, SharedSlice};
use crate::pd::{PdInner, ProtectionDomain};
use crate::qp::transport::Connected;
use crate::qp::{QpInner, WorkRequest};
use crate::{Error, leak};

/// A live memory window.
#[derive(Debug)]
pub(crate) struct WindowInner {
    pub(crate) pd: Arc<PdInner>,
    bound: Mutex<Bound>,
}

/// What a window is bound to, as far as was asked for.
#[derive(Debug)]
struct Bound {
    /// The window, until it is freed: when it is dropped, or with the pair that it is bound on.
    ptr: Option<NonNull<ibv_mw>>,
    /// The key of the last bind that was asked for.
    rkey: u32,
    /// The key of the last bind that was posted.
    posted: u32,
    /// The pair that the last bind of type 2 was posted on: the address of the provider's object.
    pair: Option<NonZeroUsize>,
    /// A region must not be deregistered while a window is bound to it: all that the window may be
    /// bound to stay until it is bound anew or gone.
    regions: Vec<SharedRegion>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until it is taken out (S-1).
unsafe impl Send for WindowInner {}
// SAFETY: as above.
unsafe impl Sync for WindowInner {}

impl WindowInner {
    /// The window for a bind; `None` when it is gone.
    pub(crate) fn ptr(&self) -> Option<NonNull<ibv_mw>> {
        self.bound.lock().ptr
    }

    /// The window for a bind to `rkey` that is about to be posted on `pair`; `None` when it is gone.
    pub(crate) fn post_on(self: &Arc<Self>, pair: &QpInner, rkey: u32) -> Option<NonNull<ibv_mw>> {
        let mut bound = self.bound.lock();
        let ptr = bound.ptr?;
        if bound.posted != rkey {
            // SAFETY: live, as it is still there.
            let current = unsafe { &raw mut (*ptr.as_ptr()).rkey };
            // SAFETY: live and aligned; Rust only accesses it atomically once the window can be posted. Providers read it as the
            // key that the bind replaces.
            let current = unsafe { AtomicU32::from_ptr(current) };
            current.store(bound.posted, Ordering::Relaxed);
            bound.posted = rkey;
        }
        let address = pair.ptr.addr();
        if bound.pair != Some(address) {
            bound.pair = Some(address);
            let mut windows = pair.windows.lock();
            windows.retain(|window| {
                window.strong_count() > 0 && !std::ptr::eq(window.as_ptr(), &raw const **self)
            });
            windows.push(Arc::downgrade(self));
        }
        Some(ptr)
    }

    /// Frees the window if its last bind was posted on `pair`, which is about to be destroyed.
    pub(crate) fn go_with(&self, pair: NonZeroUsize) {
        let mut bound = self.bound.lock();
        if bound.pair == Some(pair) {
            self.free(&mut bound);
        }
    }

    fn free(&self, bound: &mut Bound) {
        let Some(ptr) = bound.ptr.take() else { return };
        let regions = std::mem::take(&mut bound.regions);
        // SAFETY: taken out, so freed once; a bind in flight on a pair holds an Arc, or the pair is in ERR (S-2).
        let code = unsafe { inline::ibv_dealloc_mw(ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_dealloc_mw", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.pd));
            // Peers may still reach what it is bound to.
            std::mem::forget(regions);
        }
    }
}

impl Drop for WindowInner {
    fn drop(&mut self) {
        let mut bound = self.bound.lock();
        self.free(&mut bound);
    }
}

/// The type of a memory window (IBTA vol. 1, 10.6.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowType {
    /// Bound by [`QueuePair::bind_window`](crate::QueuePair::bind_window) (the verb `ibv_bind_mw`).
    One,
    /// Bound by a work request of [`MemoryWindow::bind`]; invalidated by work requests, the owner's or a
    /// peer's.
    Two,
}

/// A memory window (`man ibv_alloc_mw`): a remote key for a part of a [`SharedRegion`], which is
/// bound and invalidated faster than memory is registered. The region must have been registered with
/// [`RegionFlags::WINDOWS`].
///
/// Regions that it was bound to stay registered until the window is gone. A window of type 2 belongs to the queue pair that
/// it is bound on: when that pair is destroyed the window goes with it, its key is void, and it cannot be bound again.
#[derive(Debug, Clone)]
pub struct MemoryWindow {
    pub(crate) inner: Arc<WindowInner>,
    kind: WindowType,
}

/// A bind, checked and described.
pub(crate) struct Binding {
    pub(crate) window: Arc<WindowInner>,
    pub(crate) slice: SharedSlice,
    pub(crate) access: RemoteAccess,
    pub(crate) rkey: u32,
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding")
            .field("slice", &self.slice)
            .field("rkey", &self.rkey)
            .finish_non_exhaustive()
    }
}

impl Binding {
    /// What must live until the bind completed.
    pub(crate) fn keep(&self) -> Keep {
        Keep(Arc::new(Kept::Window(Arc::clone(&self.window), self.slice.region().clone())))
    }

    /// Notes that the window may be bound to the region from now on.
    pub(crate) fn note(&self, rkey: u32) {
        let mut bound = self.window.bound.lock();
        bound.rkey = rkey;
        let region = self.slice.region();
        if !bound.regions.iter().any(|other| Arc::ptr_eq(&other.inner, &region.inner)) {
            bound.regions.push(region.clone());
        }
    }
}

impl MemoryWindow {
    /// Its type.
    #[must_use]
    pub fn window_type(&self) -> WindowType {
        self.kind
    }

    /// The key of the last bind, or of the window as it was allocated.
    #[must_use]
    pub fn rkey(&self) -> u32 {
        self.inner.bound.lock().rkey
    }

    /// A work request that binds this window, of type 2, to `slice`, and the token that peers can use
    /// once it completed. Post it on a queue pair of the window's domain; a work request posted after it
    /// on the same queue is executed after it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a window of type 1, a window that went with its pair, a region of another domain or
    /// without [`RegionFlags::WINDOWS`].
    pub fn bind<T: Connected>(
        &self,
        slice: &SharedSlice,
        access: RemoteAccess,
    ) -> Result<(WorkRequest<'static, T>, RemoteSlice), Error> {
        if self.kind != WindowType::Two {
            return Err(Error::Invalid {
                what: "a window of type 1 is bound by QueuePair::bind_window".to_owned(),
            });
        }
        let rkey = inline::ibv_inc_rkey(self.rkey());
        let binding = self.binding(slice, access, rkey)?;
        binding.note(rkey);
        let remote = RemoteSlice { rkey, ..slice.remote() };
        Ok((WorkRequest::bind(binding), remote))
    }

    /// A bind of this window, checked.
    pub(crate) fn binding(
        &self,
        slice: &SharedSlice,
        access: RemoteAccess,
        rkey: u32,
    ) -> Result<Binding, Error> {
        let invalid = |what: &str| Err(Error::Invalid { what: what.to_owned() });
        if self.inner.ptr().is_none() {
            return invalid("the window went with the queue pair that it was bound on");
        }
        let region = &slice.region().inner;
        if !Arc::ptr_eq(&region.pd, &self.inner.pd) {
            return invalid("the region is of another protection domain than the window");
        }
        if region.access & RegionFlags::WINDOWS.bits() == 0 {
            return invalid("the region was not registered with RegionFlags::WINDOWS");
        }
        Ok(Binding { window: Arc::clone(&self.inner), slice: slice.clone(), access, rkey })
    }
}

impl ProtectionDomain {
    /// Allocates a memory window.
    ///
    /// # Errors
    ///
    /// What `ibv_alloc_mw` says; [`Error::Unsupported`] where the provider has none.
    pub fn memory_window(&self, kind: WindowType) -> Result<MemoryWindow, Error> {
        let raw = match kind {
            WindowType::One => ibv_mw_type::IBV_MW_TYPE_1,
            WindowType::Two => ibv_mw_type::IBV_MW_TYPE_2,
        };
        // SAFETY: the domain is live (S-1).
        let ptr = unsafe { inline::ibv_alloc_mw(self.inner.ptr.as_ptr(), raw) };
        let ptr = NonNull::new(ptr).ok_or_else(|| Error::last("ibv_alloc_mw"))?;
        // SAFETY: just allocated.
        let rkey = unsafe { ptr.as_ref() }.rkey;
        let bound = Bound { ptr: Some(ptr), rkey, posted: rkey, pair: None, regions: Vec::new() };
        let inner = WindowInner { pd: Arc::clone(&self.inner), bound: Mutex::new(bound) };
        Ok(MemoryWindow { inner: Arc::new(inner), kind })
    }
}
