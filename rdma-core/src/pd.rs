//! Protection domains.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_access_flags, ibv_pd};

use crate::context::{Context, ContextInner};
use crate::mr::{HUGE_PAGE, Memory, MemoryRegion, RegionFlags, RegionInner, RemoteAccess, SharedRegion};
use crate::{Error, leak};

/// A live protection domain.
#[derive(Debug)]
pub(crate) struct PdInner {
    pub(crate) ptr: NonNull<ibv_pd>,
    pub(crate) context: Arc<ContextInner>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for PdInner {}
// SAFETY: as above.
unsafe impl Sync for PdInner {}

impl PdInner {
    /// The access flags of memory that only this process and its device touch.
    pub(crate) const EXCLUSIVE: u32 = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
}

impl Drop for PdInner {
    fn drop(&mut self) {
        // SAFETY: allocated by `alloc_pd`, freed once; everything made in it holds an Arc (S-1).
        let code = unsafe { (self.context.verbs.ibv_dealloc_pd)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_dealloc_pd", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.context));
        }
    }
}

/// A protection domain: memory, queue pairs and address handles work together only within one
/// (`man ibv_alloc_pd`; IBTA vol. 1, 10.2.3).
///
/// Cloning gives another handle to the same domain; it is deallocated after everything made in it.
#[derive(Debug, Clone)]
pub struct ProtectionDomain {
    pub(crate) inner: Arc<PdInner>,
}

impl ProtectionDomain {
    pub(crate) fn new(context: &Arc<ContextInner>) -> Result<ProtectionDomain, Error> {
        // SAFETY: the context is live (S-1).
        let ptr = unsafe { (context.verbs.ibv_alloc_pd)(context.ptr.as_ptr()) };
        let ptr = NonNull::new(ptr).ok_or_else(|| Error::last("ibv_alloc_pd"))?;
        Ok(ProtectionDomain { inner: Arc::new(PdInner { ptr, context: Arc::clone(context) }) })
    }

    /// The context it belongs to.
    #[must_use]
    pub fn context(&self) -> Context {
        Context { inner: Arc::clone(&self.inner.context) }
    }

    /// Registers memory for this process and its device: no peer may reach it (`man ibv_reg_mr`).
    ///
    /// # Errors
    ///
    /// What `ibv_reg_mr` says; `ENOMEM` comes with the value of `RLIMIT_MEMLOCK`.
    pub fn register(&self, memory: impl Into<Memory>) -> Result<MemoryRegion, Error> {
        self.register_with(memory, RegionFlags::empty()).map_err(|(error, _)| error)
    }

    /// As [`register`](ProtectionDomain::register), with flags; the memory comes back with an error.
    ///
    /// # Errors
    ///
    /// What `ibv_reg_mr` says.
    pub fn register_with(
        &self,
        memory: impl Into<Memory>,
        flags: RegionFlags,
    ) -> Result<MemoryRegion, (Error, Memory)> {
        let flags = PdInner::EXCLUSIVE | (flags - RegionFlags::WINDOWS).bits();
        let inner = RegionInner::register(&self.inner, memory.into(), flags, false)?;
        Ok(MemoryRegion { inner: Arc::new(inner) })
    }

    /// Allocates `len` zeroed bytes and registers them.
    ///
    /// # Errors
    ///
    /// What the allocator or `ibv_reg_mr` says.
    pub fn allocate(&self, len: usize) -> Result<MemoryRegion, Error> {
        self.register(Memory::zeroed(len).map_err(|e| Error::verb("allocating memory", e))?)
    }

    /// Registers memory that peers may reach with `access`.
    ///
    /// Memory that is not aligned to 8 bytes is copied to an allocation that is.
    ///
    /// # Errors
    ///
    /// What the allocator or `ibv_reg_mr` says.
    pub fn share(&self, memory: impl Into<Memory>, access: RemoteAccess) -> Result<SharedRegion, Error> {
        self.share_with(memory, access, RegionFlags::empty())
    }

    /// As [`share`](ProtectionDomain::share), with flags. With [`RegionFlags::WINDOWS`], memory
    /// windows can be bound to ranges of the region, also when `access` is empty.
    ///
    /// # Errors
    ///
    /// What the allocator or `ibv_reg_mr` says.
    pub fn share_with(
        &self,
        memory: impl Into<Memory>,
        access: RemoteAccess,
        flags: RegionFlags,
    ) -> Result<SharedRegion, Error> {
        let memory = memory.into().into_words().map_err(|e| Error::verb("aligning memory", e))?;
        let bits = PdInner::EXCLUSIVE | access.bits() | flags.bits();
        let inner = RegionInner::register(&self.inner, memory, bits, true).map_err(|(error, _)| error)?;
        Ok(SharedRegion { inner: Arc::new(inner) })
    }

    /// Registers `len` bytes at `offset` of the memory behind a dma-buf descriptor, of another device mostly, for peers
    /// with `access` (`man ibv_reg_dmabuf_mr`). The device keeps the memory until the region is gone; the descriptor can
    /// be closed at once. The CPU does not reach it through the region: copies and loads say [`Error::Unsupported`].
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where provider or library has no such verb, [`Error::Invalid`] for a range that no address
    /// can have, and what `ibv_reg_dmabuf_mr` says.
    pub fn share_dma_buf(
        &self,
        dma_buf: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: RemoteAccess,
    ) -> Result<SharedRegion, Error> {
        const VERB: &str = "ibv_reg_dmabuf_mr";
        let context = &self.inner.context;
        let reg = context.verbs.ibv_reg_dmabuf_mr.ok_or(Error::Unsupported { verb: VERB })?;
        // The address that work requests and peers use: any that is not 0 and lies in its page as the offset does.
        let start = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(HUGE_PAGE));
        let start = start.filter(|start| start.checked_add(len).is_some());
        let ptr = start.and_then(|start| NonNull::new(std::ptr::without_provenance_mut::<u8>(start)));
        let Some(ptr) = ptr else {
            return Err(Error::Invalid { what: format!("{len} bytes at offset {offset} of a dma-buf") });
        };
        let flags = PdInner::EXCLUSIVE | access.bits();
        let bits = i32::try_from(flags).unwrap_or(i32::MAX);
        let iova = ptr.addr().get() as u64;
        // SAFETY: the domain is live (S-1), the descriptor open for the call; the kernel keeps what is behind it.
        let mr = unsafe { reg(self.inner.ptr.as_ptr(), offset, len, iova, dma_buf.as_raw_fd(), bits) };
        let mr = NonNull::new(mr).ok_or_else(|| Error::last(VERB))?;
        let inner = RegionInner::adopt(&self.inner, mr, ptr, len, (flags, true), None);
        Ok(SharedRegion { inner: Arc::new(inner) })
    }
}
