//! Memory that peers reach: no references to it, ever.

use std::ops::{Bound, RangeBounds};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use verbs_sys::ibv_sge;

use super::{MemoryRegion, RegionInner, RemoteAccess, RemoteSlice};
use crate::Error;
use crate::pd::PdInner;

/// The one size of access that this process makes, as the soft device does: races of mixed sizes are
/// undefined, races of equal-sized atomics are not.
const WORD: usize = 8;

/// Registered memory that peers may write or read at any moment.
///
/// It gives no `&[u8]`: bytes are copied in and out, words loaded and stored atomically. A peer's RDMA
/// write is not atomic as a whole: a copy may see part of it, in words of 8 bytes. What a *completion*
/// announces (a receive with immediate, a send that followed the write) is all there.
///
/// Cloning is cheap; the memory is deregistered and freed with the last clone, slice and operation.
#[derive(Debug, Clone)]
pub struct SharedRegion {
    pub(crate) inner: Arc<RegionInner>,
}

impl SharedRegion {
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

    /// What peers may do with it.
    #[must_use]
    pub fn access(&self) -> RemoteAccess {
        RemoteAccess::from_bits_truncate(self.inner.access)
    }

    /// The token that lets a peer reach the whole region; see [`RemoteSlice::slice`] for a part (the
    /// key opens the whole region all the same; a [memory window](crate::MemoryWindow) opens a part).
    #[must_use]
    pub fn remote(&self) -> RemoteSlice {
        RemoteSlice {
            addr: self.inner.ptr.addr().get() as u64,
            rkey: self.inner.rkey,
            len: self.inner.len as u64,
        }
    }

    /// A range as the local side of a work request (sent from, or read into).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<SharedSlice, Error> {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len(),
        };
        let len =
            end.checked_sub(start).ok_or(Error::OutOfBounds { offset: start, len: 0, of: self.len() })?;
        self.check(start, len)?;
        let too_long = |_| Error::Invalid { what: format!("a slice of {len} bytes: the limit is 4 GiB") };
        let len = u32::try_from(len).map_err(too_long)?;
        Ok(SharedSlice { region: self.clone(), offset: start, len })
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), Error> {
        if offset > self.len() || len > self.len() - offset {
            return Err(Error::OutOfBounds { offset, len, of: self.len() });
        }
        Ok(())
    }

    /// As `check`, for accesses of the CPU.
    fn check_host(&self, offset: usize, len: usize) -> Result<(), Error> {
        if !self.inner.has_host_memory() {
            return Err(Error::Unsupported { verb: "access of the CPU to memory of a dma-buf" });
        }
        self.check(offset, len)
    }

    /// The word that holds byte `offset`, which is inside the region.
    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: shared regions start on a word and are allocated in whole words (`ShareMemory`).
        let ptr: NonNull<u8> = unsafe { self.inner.ptr.add(offset / WORD * WORD) };
        // SAFETY: aligned, initialised, live with the region; everyone in this process accesses it as
        // such an atomic, and the device outside of the abstract machine (S-2).
        unsafe { AtomicU64::from_ptr(ptr.as_ptr().cast()) }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.check_host(offset, bytes.len())?;
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = at % WORD;
            let n = rest.len().min(WORD - within);
            let (now, later) = rest.split_at(n);
            let word = self.word(at);
            if n == WORD {
                let mut value = [0; WORD];
                value.copy_from_slice(now);
                word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
            } else {
                // Neighbouring bytes may change under us: merge by compare and exchange.
                let merge = |old: u64| {
                    let mut value = old.to_ne_bytes();
                    value[within..within + n].copy_from_slice(now);
                    Some(u64::from_ne_bytes(value))
                };
                let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, merge);
            }
            at += n;
            rest = later;
        }
        fence(Ordering::Release);
        Ok(())
    }

    /// Copies from `offset` into `bytes`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`]; then nothing was copied.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> Result<(), Error> {
        self.check_host(offset, bytes.len())?;
        fence(Ordering::Acquire);
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let within = at % WORD;
            let n = rest.len().min(WORD - within);
            let (now, later) = rest.split_at_mut(n);
            let value = self.word(at).load(Ordering::Relaxed).to_ne_bytes();
            now.copy_from_slice(&value[within..within + n]);
            at += n;
            rest = later;
        }
        Ok(())
    }

    fn aligned_word(&self, offset: usize) -> Result<&AtomicU64, Error> {
        self.check_host(offset, WORD)?;
        if !offset.is_multiple_of(WORD) {
            return Err(Error::Misaligned { address: offset as u64 });
        }
        Ok(self.word(offset))
    }

    /// Loads the 8 bytes at `offset`, a multiple of 8, in one piece and in the machine's byte order.
    /// What happened before a [`store`](SharedRegion::store) of this process that is seen here is seen
    /// too (acquire).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn load(&self, offset: usize) -> Result<u64, Error> {
        Ok(self.aligned_word(offset)?.load(Ordering::Acquire))
    }

    /// Stores 8 bytes at `offset`, a multiple of 8, in one piece (release).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn store(&self, offset: usize, value: u64) -> Result<(), Error> {
        self.aligned_word(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Adds to the word at `offset` and gives what it held, atomically also against the device's
    /// atomics: hence only where the device's are global.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] when the device's `atomic_cap` is not
    /// [`Global`](crate::AtomicCapability::Global); [`Error::OutOfBounds`], [`Error::Misaligned`].
    pub fn fetch_add(&self, offset: usize, add: u64) -> Result<u64, Error> {
        let word = self.aligned_word(offset)?;
        self.inner.pd.context.require_global_atomics()?;
        Ok(word.fetch_add(add, Ordering::AcqRel))
    }

    /// Stores `new` at `offset` if the word there is `expected`; gives what it held. As atomic as
    /// [`fetch_add`](SharedRegion::fetch_add).
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](SharedRegion::fetch_add).
    pub fn compare_and_swap(&self, offset: usize, expected: u64, new: u64) -> Result<u64, Error> {
        let word = self.aligned_word(offset)?;
        self.inner.pd.context.require_global_atomics()?;
        Ok(match word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(old) | Err(old) => old,
        })
    }

    /// Changes what peers may do with the memory, without registering it anew (`man ibv_rereg_mr`). The remote key may
    /// change with it: tokens made before are void.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while clones, slices, windows or operations of the region exist, [`Error::Unsupported`] where the provider or the
    /// library has no such verb, what `ibv_rereg_mr` says; with the region. After a failure of the verb itself the region may be
    /// of no use to peers any more.
    pub fn change_access(self, access: RemoteAccess) -> Result<SharedRegion, (Error, SharedRegion)> {
        let mut inner = Arc::try_unwrap(self.inner).map_err(|inner| {
            let error = Error::InUse { what: "the shared region has clones, slices, windows or operations" };
            (error, SharedRegion { inner })
        })?;
        let changed = inner.change_access(inner.access & !RemoteAccess::all().bits() | access.bits());
        let region = SharedRegion { inner: Arc::new(inner) };
        match changed {
            Ok(()) => Ok(region),
            Err(error) => Err((error, region)),
        }
    }

    /// Takes the memory back from the peers: deregisters, which revokes the remote key, and registers
    /// it again as a [`MemoryRegion`] without remote access.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while clones, slices, windows or operations of the region exist (the region is
    /// given back); what `ibv_dereg_mr` and `ibv_reg_mr` say (if registering again fails, the memory
    /// is freed, and there is nothing to give back).
    pub fn revoke(self) -> Result<MemoryRegion, (Error, Option<SharedRegion>)> {
        let inner = Arc::try_unwrap(self.inner).map_err(|inner| {
            let error = Error::InUse { what: "the shared region has clones, slices, windows or operations" };
            (error, Some(SharedRegion { inner }))
        })?;
        let pd = Arc::clone(&inner.pd);
        let memory = inner
            .deregister()
            .map_err(|(error, inner)| (error, Some(SharedRegion { inner: Arc::new(inner) })))?;
        let Some(memory) = memory else {
            return Err((Error::Unsupported { verb: "exclusive access to memory of a dma-buf" }, None));
        };
        match RegionInner::register(&pd, memory, PdInner::EXCLUSIVE, false) {
            Ok(inner) => Ok(MemoryRegion { inner: Arc::new(inner) }),
            Err((error, _)) => Err((error, None)),
        }
    }
}

/// A range of a [`SharedRegion`], as the local side of a work request.
#[derive(Debug, Clone)]
pub struct SharedSlice {
    region: SharedRegion,
    offset: usize,
    len: u32,
}

impl SharedSlice {
    /// The region it is of.
    #[must_use]
    pub fn region(&self) -> &SharedRegion {
        &self.region
    }

    /// Offset in the region, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The token that names this range to a peer.
    #[must_use]
    pub fn remote(&self) -> RemoteSlice {
        let whole = self.region.remote();
        RemoteSlice { addr: whole.addr + self.offset as u64, len: u64::from(self.len), ..whole }
    }

    pub(crate) fn sge(&self) -> ibv_sge {
        ibv_sge {
            addr: (self.region.inner.ptr.addr().get() + self.offset) as u64,
            length: self.len,
            lkey: self.region.inner.lkey,
        }
    }
}
