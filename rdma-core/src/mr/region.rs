//! The registration itself, and the region that nobody else may touch.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_mr, ibv_rereg_mr_flags};

use super::buffer::Home;
use super::{Buffer, BufferHome, IdleBuffer, Memory};
use crate::pd::PdInner;
use crate::{Error, leak};

/// A live registration and the memory under it.
pub(crate) struct RegionInner {
    pub(crate) mr: NonNull<ibv_mr>,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
    pub(crate) ptr: NonNull<u8>,
    pub(crate) len: usize,
    /// Whether peers may reach it: then there are no references to it.
    pub(crate) shared: bool,
    /// The flags it was registered with (of `ibv_access_flags`).
    pub(crate) access: u32,
    pub(crate) home: Option<Arc<Home>>,
    memory: ManuallyDrop<Option<Memory>>,
    pub(crate) pd: Arc<PdInner>,
}

// SAFETY: the registration is thread-safe (S-6); bytes are reached only through types that own a
// range exclusively (`Buffer`, `MemoryRegion`) or by atomics (`SharedRegion`) (S-2).
unsafe impl Send for RegionInner {}
// SAFETY: as above.
unsafe impl Sync for RegionInner {}

impl RegionInner {
    /// Registers `memory` with `flags` (of `ibv_access_flags`).
    pub(crate) fn register(
        pd: &Arc<PdInner>,
        memory: Memory,
        flags: u32,
        shared: bool,
    ) -> Result<RegionInner, (Error, Memory)> {
        let (ptr, len) = (memory.ptr(), memory.len());
        let reg = pd.context.verbs.ibv_reg_mr;
        let access = i32::try_from(flags).unwrap_or(i32::MAX);
        // SAFETY: the domain is live (S-1), and `memory` owns `len` bytes at `ptr` until after the
        // deregistration in `drop`.
        let mr = unsafe { reg(pd.ptr.as_ptr(), ptr.as_ptr().cast(), len, access) };
        let Some(mr) = NonNull::new(mr) else {
            return Err((Error::verb("ibv_reg_mr", std::io::Error::last_os_error()), memory));
        };
        Ok(RegionInner::adopt(pd, mr, ptr, len, (flags, shared), Some(memory)))
    }

    /// Wraps a registration that a verb just made.
    pub(crate) fn adopt(
        pd: &Arc<PdInner>,
        mr: NonNull<ibv_mr>,
        ptr: NonNull<u8>,
        len: usize,
        (access, shared): (u32, bool),
        memory: Option<Memory>,
    ) -> RegionInner {
        // SAFETY: the verb returned a live registration.
        let raw = unsafe { mr.as_ref() };
        RegionInner {
            mr,
            lkey: raw.lkey,
            rkey: raw.rkey,
            ptr,
            len,
            shared,
            access,
            home: None,
            memory: ManuallyDrop::new(memory),
            pd: Arc::clone(pd),
        }
    }

    /// Whether the CPU can reach it at `ptr`.
    pub(crate) fn has_host_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Changes the flags of the registration.
    pub(crate) fn change_access(&mut self, flags: u32) -> Result<(), Error> {
        const VERB: &str = "ibv_rereg_mr";
        let rereg = self.pd.context.verbs.ibv_rereg_mr.ok_or(Error::Unsupported { verb: VERB })?;
        let change = i32::try_from(ibv_rereg_mr_flags::IBV_REREG_MR_CHANGE_ACCESS.0).unwrap_or(0);
        let access = i32::try_from(flags).unwrap_or(i32::MAX);
        let (pd, addr) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the registration is live (S-1), and neither domain nor memory changes.
        let code = unsafe { rereg(self.mr.as_ptr(), change, pd, addr, 0, access) };
        // Whatever came of it, the keys are what the structure says now.
        // SAFETY: live, as above.
        let raw = unsafe { self.mr.as_ref() };
        (self.lkey, self.rkey) = (raw.lkey, raw.rkey);
        if code != 0 {
            return Err(Error::last(VERB));
        }
        self.access = flags;
        Ok(())
    }

    /// Deregisters and gives the memory back.
    #[allow(clippy::result_large_err, reason = "the region comes back; a rare control call")]
    pub(crate) fn deregister(self) -> Result<Option<Memory>, (Error, RegionInner)> {
        let mut this = ManuallyDrop::new(self);
        match this.dereg() {
            Ok(()) => {
                // SAFETY: `this` is never dropped, so the memory is taken once.
                let memory = unsafe { ManuallyDrop::take(&mut this.memory) };
                // SAFETY: as above; the other fields' only owned values are these two.
                let pd = unsafe { std::ptr::read(&this.pd) };
                // SAFETY: as above.
                let home = unsafe { std::ptr::read(&this.home) };
                drop((pd, home));
                Ok(memory)
            }
            Err(error) => Err((error, ManuallyDrop::into_inner(this))),
        }
    }

    fn dereg(&mut self) -> Result<(), Error> {
        // SAFETY: registered by `register` or `adopt`, and deregistered successfully at most once:
        // a caller that sees success never gets here again.
        let code = unsafe { (self.pd.context.verbs.ibv_dereg_mr)(self.mr.as_ptr()) };
        if code == 0 { Ok(()) } else { Err(Error::verb("ibv_dereg_mr", crate::error::from_return(code))) }
    }
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        match self.dereg() {
            Ok(()) => {
                // SAFETY: dropped once, here; the device can no longer reach it.
                unsafe { ManuallyDrop::drop(&mut self.memory) };
            }
            // The device may still reach the memory: it is never freed, nor is the domain.
            Err(error) => {
                leak(&error);
                std::mem::forget(Arc::clone(&self.pd));
            }
        }
    }
}

impl std::fmt::Debug for RegionInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("addr", &self.ptr)
            .field("len", &self.len)
            .field("lkey", &self.lkey)
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// A reference that keeps a region registered, without access to its bytes.
#[derive(Debug, Clone)]
pub struct RegionRef {
    pub(crate) inner: Arc<RegionInner>,
}

impl RegionRef {
    /// Whether all of `bytes` lies in the region.
    #[must_use]
    pub fn contains(&self, bytes: &[u8]) -> bool {
        let start = self.inner.ptr.addr().get();
        let at = bytes.as_ptr().addr();
        at >= start && at - start <= self.inner.len && bytes.len() <= self.inner.len - (at - start)
    }
}

/// Registered memory that only this process touches: it owns its bytes and gives them as `[u8]`.
///
/// Peers cannot reach it (no remote access; memory for peers is a
/// [`SharedRegion`](crate::SharedRegion)). Turn it into [`Buffer`]s to post it. When the last part of
/// it is gone the memory is deregistered and freed; if the deregistration fails it is leaked, which
/// is logged and counted in [`leaks`](crate::leaks).
#[derive(Debug)]
pub struct MemoryRegion {
    /// The only reference to the region: made so, and given away by value only.
    pub(crate) inner: Arc<RegionInner>,
}

impl MemoryRegion {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// Whether the region has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// The local key, for logs and comparison; nothing safe takes one.
    #[must_use]
    pub fn lkey(&self) -> u32 {
        self.inner.lkey
    }

    /// The whole region as one buffer.
    ///
    /// # Panics
    ///
    /// If the region has 4 GiB or more, which no message can have: see
    /// [`into_buffers`](MemoryRegion::into_buffers).
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.part(0, self.inner.len)
    }

    /// The region as buffers of `size` bytes, the last one possibly shorter.
    ///
    /// # Panics
    ///
    /// If `size` is 0, or 4 GiB or more.
    pub fn into_buffers(self, size: usize) -> impl ExactSizeIterator<Item = Buffer> {
        assert!(size > 0, "buffers of 0 bytes");
        let count = self.inner.len.div_ceil(size);
        (0..count).map(move |i| self.part(i * size, size))
    }

    /// A range as a buffer; the callers give each range away once.
    fn part(&self, offset: usize, size: usize) -> Buffer {
        let size = size.min(self.inner.len - offset);
        let Ok(len) = u32::try_from(size) else { panic!("a buffer of {size} bytes: the limit is 4 GiB") };
        // SAFETY: `offset` is inside the region.
        let ptr = unsafe { self.inner.ptr.add(offset) };
        // SAFETY: disjoint ranges, each given away once, by an iterator that owns the region.
        unsafe { Buffer::new(Arc::clone(&self.inner), ptr, len) }
    }

    /// The region as buffers of exactly `size` bytes that go back to `home` whenever one is dropped,
    /// by whomever: also by the library, once the device is done with an operation nobody waits for.
    /// Bytes after the last whole buffer stay unused.
    ///
    /// # Panics
    ///
    /// If `size` is 0, or 4 GiB or more.
    pub fn into_homed(
        mut self,
        size: usize,
        home: Arc<dyn BufferHome>,
    ) -> impl ExactSizeIterator<Item = IdleBuffer> {
        assert!(size > 0, "buffers of 0 bytes");
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.home = Some(Home::new(home));
        }
        let count = self.inner.len / size;
        (0..count).map(move |i| IdleBuffer::new(self.part(i * size, size)))
    }

    /// Deregisters and gives the memory back.
    ///
    /// # Errors
    ///
    /// What `ibv_dereg_mr` says, with the region.
    pub fn deregister(self) -> Result<Memory, (Error, MemoryRegion)> {
        let inner = match Arc::try_unwrap(self.inner) {
            Ok(inner) => inner,
            Err(inner) => {
                let error = Error::InUse { what: "the memory region has buffers" };
                return Err((error, MemoryRegion { inner }));
            }
        };
        match inner.deregister() {
            Ok(Some(memory)) => Ok(memory),
            // Regions without host memory are never `MemoryRegion`s, but an empty one harms nobody.
            Ok(None) => Ok(Memory::from(Vec::new())),
            Err((error, inner)) => Err((error, MemoryRegion { inner: Arc::new(inner) })),
        }
    }
}

impl Deref for MemoryRegion {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the region is live, initialised and only ours: no buffer was made of it, and no
        // peer may reach it (S-2).
        unsafe { std::slice::from_raw_parts(self.inner.ptr.as_ptr(), self.inner.len) }
    }
}

impl DerefMut for MemoryRegion {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.inner.ptr.as_ptr(), self.inner.len) }
    }
}
