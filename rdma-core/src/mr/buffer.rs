//! Exclusive ranges of registered memory.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::ibv_sge;

use super::region::{RegionInner, RegionRef};

/// A range of a region that someone owns. It stays where it is while the buffer moves: through posts, slots and
/// completions goes one pointer.
struct Segment {
    /// As the verbs take it: the address, the bytes that show (a post sends or offers them), the region's key.
    sge: ibv_sge,
    /// The address again, with leave to use it.
    ptr: NonNull<u8>,
    region: Arc<RegionInner>,
    /// Bytes owned, of which the first `sge.length` show.
    capacity: u32,
}

impl Segment {
    fn boxed(region: Arc<RegionInner>, ptr: NonNull<u8>, len: u32, capacity: u32) -> Box<Segment> {
        let sge = ibv_sge { addr: ptr.addr().get() as u64, length: len, lkey: region.lkey };
        Box::new(Segment { sge, ptr, region, capacity })
    }
}

// SAFETY: the range is owned (S-2); the region is Send and Sync.
unsafe impl Send for Segment {}
// SAFETY: `&Segment` reads nothing but plain fields.
unsafe impl Sync for Segment {}

/// A buffer that was given up: without a `Drop`, for the way into a slot.
#[derive(Clone, Copy)]
pub(crate) struct RawBuffer(*mut Segment);

/// An exclusively owned range of registered memory.
///
/// It derefs to `[u8]`, is moved into a post and comes back with the completion: while the device may
/// touch it nobody else has it. Dropping it frees the range (and, with the last one, the region), or
/// sends it [home](BufferHome).
///
/// ```
/// # fn f(pd: &rdma_core::ProtectionDomain) -> Result<(), rdma_core::Error> {
/// let mut buffer = pd.register(vec![0; 4096])?.into_buffer();
/// buffer[..5].copy_from_slice(b"hello");
/// buffer.truncate(5);
/// # Ok(()) }
/// ```
pub struct Buffer {
    segment: ManuallyDrop<Box<Segment>>,
}

impl Buffer {
    /// # Safety
    ///
    /// The caller owns `len` initialised bytes at `ptr` of the region exclusively and gives them up;
    /// the region is not shared.
    #[inline]
    pub(crate) unsafe fn new(region: Arc<RegionInner>, ptr: NonNull<u8>, len: u32) -> Buffer {
        Buffer::of(Segment::boxed(region, ptr, len, len))
    }

    #[inline]
    fn of(segment: Box<Segment>) -> Buffer {
        Buffer { segment: ManuallyDrop::new(segment) }
    }

    /// Gives the buffer up, to be had back with `from_raw`.
    #[inline(always)]
    pub(crate) fn into_raw(self) -> RawBuffer {
        RawBuffer(Box::into_raw(self.into_segment()))
    }

    /// # Safety
    ///
    /// Of `into_raw`, and made a buffer again once.
    #[inline(always)]
    pub(crate) unsafe fn from_raw(raw: RawBuffer) -> Buffer {
        // SAFETY: the caller's promise.
        Buffer::of(unsafe { Box::from_raw(raw.0) })
    }

    /// Where the device finds it: address, length that shows, key.
    #[inline]
    pub(crate) fn sge(&self) -> ibv_sge {
        self.segment.sge
    }

    #[inline]
    fn into_segment(self) -> Box<Segment> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, so the segment is taken once.
        unsafe { ManuallyDrop::take(&mut this.segment) }
    }

    /// Bytes owned; [`len`](Buffer::len) of them show.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.segment.capacity as usize
    }

    /// Bytes that show, are sent, or are offered to a receive.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.segment.sge.length as usize
    }

    /// Whether no bytes show.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.segment.sge.length == 0
    }

    /// Shows only the first `len` bytes; no effect when fewer show. The rest stays owned, see
    /// [`set_len`](Buffer::set_len).
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if let Ok(len) = u32::try_from(len) {
            self.segment.sge.length = self.segment.sge.length.min(len);
        }
    }

    /// Shows the first `len` bytes of the capacity. Memory is always initialised, so bytes that were
    /// hidden show what they held.
    ///
    /// # Panics
    ///
    /// If `len` is larger than the capacity.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        match u32::try_from(len) {
            Ok(len) if len <= self.segment.capacity => self.segment.sge.length = len,
            _ => panic!("{len} bytes of a buffer of {}", self.segment.capacity),
        }
    }

    /// The region the buffer is a part of, to find out whether other memory lies in it.
    #[must_use]
    pub fn region(&self) -> RegionRef {
        RegionRef { inner: Arc::clone(&self.segment.region) }
    }

    /// The local key of the buffer's region.
    #[must_use]
    pub fn lkey(&self) -> u32 {
        self.segment.region.lkey
    }

    /// Splits into `[0, at)` and `[at, capacity)`; the first part shows what it showed of its bytes, the
    /// second the rest.
    ///
    /// # Errors
    ///
    /// The buffer itself, when `at` is outside it or when it has a [home](BufferHome), which takes
    /// whole buffers only.
    pub fn split_at(self, at: usize) -> Result<(Buffer, Buffer), Buffer> {
        let within = u32::try_from(at).ok().filter(|&at| at <= self.segment.capacity);
        let Some(at) = within.filter(|_| self.segment.region.home.is_none()) else { return Err(self) };
        let Segment { sge, ptr, region, capacity } = *self.into_segment();
        // SAFETY: `at` is within the owned range.
        let tail = unsafe { ptr.add(at as usize) };
        let head = Segment::boxed(Arc::clone(&region), ptr, sge.length.min(at), at);
        let tail = Segment::boxed(region, tail, sge.length.saturating_sub(at), capacity - at);
        Ok((Buffer::of(head), Buffer::of(tail)))
    }

    /// Joins with the buffer that follows in memory. The result shows both when the first showed all
    /// of its bytes, else what the first showed.
    ///
    /// # Errors
    ///
    /// Both, when `next` is not the neighbour of the same region, or the whole would not be shorter than
    /// 4 GiB.
    pub fn merge(self, next: Buffer) -> Result<Buffer, (Buffer, Buffer)> {
        let end = self.segment.ptr.addr().get() + self.capacity();
        let neighbours = Arc::ptr_eq(&self.segment.region, &next.segment.region)
            && end == next.segment.ptr.addr().get()
            && self.segment.region.home.is_none();
        if !neighbours || self.segment.capacity.checked_add(next.segment.capacity).is_none() {
            return Err((self, next));
        }
        let (mut first, second) = (self.into_segment(), next.into_segment());
        if first.sge.length == first.capacity {
            first.sge.length += second.sge.length;
        }
        first.capacity += second.capacity;
        Ok(Buffer::of(first))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the range is initialised and exclusively ours while we hold the buffer: a posted
        // one is in a slot, and no peer may reach its region (S-2).
        unsafe { std::slice::from_raw_parts(self.segment.ptr.as_ptr(), self.segment.sge.length as usize) }
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.segment.ptr.as_ptr(), self.segment.sge.length as usize) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: dropped once, here; the field is not used again.
        drop_segment(unsafe { ManuallyDrop::take(&mut self.segment) });
    }
}

/// A call wherever a buffer might be dropped, instead of all this; by value, so that the buffer may stay in a register.
#[inline(never)]
fn drop_segment(segment: Box<Segment>) {
    let Some(home) = &segment.region.home else { return };
    let home = Arc::clone(home);
    // SAFETY: what `keep` keeps alive.
    unsafe { home.target.as_ref() }.take_back(IdleBuffer { segment });
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("addr", &self.segment.ptr)
            .field("len", &self.segment.sge.length)
            .field("capacity", &self.segment.capacity)
            .finish_non_exhaustive()
    }
}

/// Where buffers of a pool go when they are dropped.
///
/// Set by [`MemoryRegion::into_homed`](crate::MemoryRegion::into_homed). The library calls it from
/// whatever thread drops a buffer, also while it dispatches completions (outside of its locks), so it
/// must be quick. Dropping the [`IdleBuffer`] frees its part of the region.
pub trait BufferHome: Send + Sync {
    /// Takes a buffer back, full length shown.
    fn take_back(&self, buffer: IdleBuffer);
}

/// The home of a region's buffers: behind one more pointer, so that to keep it and to find it takes fewer instructions of every buffer that
/// is dropped.
pub(crate) struct Home {
    #[allow(dead_code, reason = "held for its Drop")]
    keep: Arc<dyn BufferHome>,
    /// What is in `keep`.
    target: NonNull<dyn BufferHome>,
}

// SAFETY: it is an `Arc` of what is `Send` and `Sync`, and a pointer to the same.
unsafe impl Send for Home {}
// SAFETY: as above.
unsafe impl Sync for Home {}

impl Home {
    pub(crate) fn new(keep: Arc<dyn BufferHome>) -> Arc<Home> {
        let target = NonNull::from(&*keep);
        Arc::new(Home { keep, target })
    }
}

/// A buffer at rest in its [home](BufferHome): no access, and dropping it does not call the home.
pub struct IdleBuffer {
    segment: Box<Segment>,
}

impl IdleBuffer {
    pub(crate) fn new(buffer: Buffer) -> IdleBuffer {
        IdleBuffer { segment: buffer.into_segment() }
    }

    /// A buffer of full length, to hand out.
    #[must_use]
    #[inline]
    pub fn into_buffer(mut self) -> Buffer {
        self.segment.sge.length = self.segment.capacity;
        Buffer::of(self.segment)
    }

    /// The address range, to match memory that is no `Buffer` any more (`Bytes`) to its pool.
    #[must_use]
    pub fn addr_range(&self) -> std::ops::Range<usize> {
        let start = self.segment.ptr.addr().get();
        start..start + self.segment.capacity as usize
    }
}

impl fmt::Debug for IdleBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdleBuffer").field("range", &self.addr_range()).finish()
    }
}
