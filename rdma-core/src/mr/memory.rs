//! Where registered memory comes from.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::io;
use std::ptr::NonNull;

/// Memory that can be registered, owned.
///
/// Made from a `Vec<u8>`, a `Box<[u8]>` (both keep their bytes), [`Memory::zeroed`] (page-aligned),
/// [`Memory::mapped`] or [`Memory::huge_pages`].
pub struct Memory {
    ptr: NonNull<u8>,
    len: usize,
    origin: Origin,
}

enum Origin {
    Heap(Layout),
    Vec { capacity: usize },
    Map { len: usize },
    Foreign(#[allow(dead_code, reason = "held for its Drop")] Box<dyn Any + Send + Sync>),
}

// SAFETY: exclusively owned bytes; nothing here is bound to a thread.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives no access to the bytes.
unsafe impl Sync for Memory {}

/// Alignment of library allocations: a page, so that registrations pin no more than they must.
const PAGE: usize = 4096;
/// The size of a huge page on x86-64 and on arm64 with 4 KiB pages.
pub const HUGE_PAGE: usize = 2 << 20;

/// At least one byte, in whole pieces. The sum must not wrap around: what follows relies on it not being less than `len`.
fn rounded(len: usize, piece: usize) -> io::Result<usize> {
    len.max(1).checked_next_multiple_of(piece).ok_or_else(too_large)
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "no allocation can be that large")
}

impl Memory {
    /// `len` zeroed bytes on the heap, aligned to 4096.
    ///
    /// # Errors
    ///
    /// Out of memory, or a `len` that no allocation can have.
    pub fn zeroed(len: usize) -> io::Result<Memory> {
        let layout = Layout::from_size_align(rounded(len, 8)?, PAGE).map_err(|_| too_large())?;
        // SAFETY: the layout's size is at least 1.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Memory { ptr, len, origin: Origin::Heap(layout) })
    }

    /// `len` zeroed bytes of anonymous private memory from `mmap`, in whole pages of their own, kept
    /// out of children that this process forks (`MADV_DONTFORK`).
    ///
    /// # Errors
    ///
    /// What `mmap` says.
    pub fn mapped(len: usize) -> io::Result<Memory> {
        let memory = Memory::map(len, rounded(len, PAGE)?, 0)?;
        // SAFETY: the mapping is ours and live. A kernel without the advice loses nothing: ignored.
        let _ = unsafe { libc::madvise(memory.ptr.as_ptr().cast(), len.max(1), libc::MADV_DONTFORK) };
        Ok(memory)
    }

    /// `len` zeroed bytes in huge pages of 2 MiB (`MAP_HUGETLB`): fewer address translations in the
    /// device and in the CPU.
    ///
    /// # Errors
    ///
    /// What `mmap` says: `ENOMEM` when the machine has no free huge pages (`/proc/sys/vm/nr_hugepages`).
    pub fn huge_pages(len: usize) -> io::Result<Memory> {
        Memory::map(len, rounded(len, HUGE_PAGE)?, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)
    }

    fn map(len: usize, mapped: usize, flags: i32) -> io::Result<Memory> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Memory { ptr, len, origin: Origin::Map { len: mapped } })
    }

    /// Memory of someone else's, at `ptr`, kept alive by `owner`.
    ///
    /// # Safety
    ///
    /// `ptr` is valid for reads and writes of `len` bytes, and nobody but the library accesses it,
    /// until `owner` is dropped.
    pub unsafe fn from_raw_parts(ptr: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Memory {
        Memory { ptr, len, origin: Origin::Foreign(owner) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory in whole 8-byte words, as accesses to shared memory need it: what is not aligned so
    /// is copied to a new allocation, unless it is someone else's.
    pub(crate) fn into_words(self) -> io::Result<Memory> {
        let whole = match self.origin {
            Origin::Heap(_) | Origin::Map { .. } => true,
            _ => self.ptr.addr().get().is_multiple_of(8) && self.len.is_multiple_of(8),
        };
        if whole {
            return Ok(self);
        }
        if matches!(self.origin, Origin::Foreign(_)) {
            let message = "memory that peers may reach must start and end at a multiple of 8 bytes";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let copy = Memory::zeroed(self.len)?;
        // SAFETY: both own `len` bytes, and they are two allocations.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr(), copy.ptr.as_ptr(), self.len) };
        Ok(copy)
    }

    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }
}

impl From<Vec<u8>> for Memory {
    fn from(vec: Vec<u8>) -> Memory {
        let mut vec = std::mem::ManuallyDrop::new(vec);
        let ptr = NonNull::new(vec.as_mut_ptr()).unwrap_or(NonNull::dangling());
        Memory { ptr, len: vec.len(), origin: Origin::Vec { capacity: vec.capacity() } }
    }
}

impl From<Box<[u8]>> for Memory {
    fn from(bytes: Box<[u8]>) -> Memory {
        Memory::from(bytes.into_vec())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.origin {
            Origin::Heap(layout) => {
                // SAFETY: allocated by `zeroed` with this layout.
                unsafe { dealloc(self.ptr.as_ptr(), layout) };
            }
            Origin::Vec { capacity } => {
                // SAFETY: the parts of the vector that `from` took apart.
                drop(unsafe { Vec::from_raw_parts(self.ptr.as_ptr(), self.len, capacity) });
            }
            Origin::Map { len } => {
                // SAFETY: mapped by `map` with this length. Unmapping an own mapping cannot fail.
                unsafe { libc::munmap(self.ptr.as_ptr().cast(), len) };
            }
            Origin::Foreign(_) => {}
        }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("ptr", &self.ptr).field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also without overflow checks, where rounding up would give 0.
    #[test]
    fn lengths_that_wrap_around_are_refused() {
        for len in [usize::MAX, usize::MAX - 6, usize::MAX - HUGE_PAGE + 2, isize::MAX.unsigned_abs() + 1] {
            assert!(Memory::zeroed(len).is_err(), "{len:#x}");
            assert!(Memory::mapped(len).is_err(), "{len:#x}");
            assert!(Memory::huge_pages(len).is_err(), "{len:#x}");
        }
    }
}
