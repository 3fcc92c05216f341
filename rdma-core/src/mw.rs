//! Memory windows: remote access to a part of a region, given and taken without registering.

use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_mw, ibv_mw_type, inline};

use crate::pd::{PdInner, ProtectionDomain};
use crate::{Error, leak};

/// A live memory window.
#[derive(Debug)]
pub(crate) struct WindowInner {
    pub(crate) ptr: NonNull<ibv_mw>,
    pub(crate) pd: Arc<PdInner>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for WindowInner {}
// SAFETY: as above.
unsafe impl Sync for WindowInner {}

impl Drop for WindowInner {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; bind requests in flight hold an Arc (S-2).
        let code = unsafe { inline::ibv_dealloc_mw(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_dealloc_mw", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.pd));
        }
    }
}

/// The type of a memory window (IBTA vol. 1, 10.6.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowType {
    /// Bound by the verb `ibv_bind_mw`; any queue pair of the domain can be used by peers.
    One,
    /// Bound by a work request; tied to the queue pair that bound it, and invalidated by work requests.
    Two,
}

/// A memory window (`man ibv_alloc_mw`).
#[derive(Debug, Clone)]
pub struct MemoryWindow {
    pub(crate) inner: Arc<WindowInner>,
    kind: WindowType,
}

impl MemoryWindow {
    /// Its type.
    #[must_use]
    pub fn window_type(&self) -> WindowType {
        self.kind
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
        Ok(MemoryWindow { inner: Arc::new(WindowInner { ptr, pd: Arc::clone(&self.inner) }), kind })
    }
}
