//! Registered buffers of one size that come back by themselves.

use std::{
    collections::BTreeMap,
    fmt,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use crossbeam_utils::atomic::AtomicCell;
use parking_lot::{Mutex, RwLock};
use rdma_core::{Buffer, BufferHome, Error, IdleBuffer, Payload, ProtectionDomain, RegionRef};
use tokio::sync::Notify;

/// A pool of equal buffers in one registered region.
///
/// A buffer taken from the pool is an ordinary [`Buffer`]; dropping it, wherever that happens, brings it back: in the
/// caller, in the library once the device is done with an operation whose future was dropped, or with the last clone
/// of the [`Bytes`](bytes::Bytes) it became. Clones of the pool are the same pool. When the last clone is dropped the
/// idle buffers go at once, those still out as they come back.
#[derive(Clone, Debug)]
pub struct BufferPool {
    handle: Arc<Handle>,
}

/// Closes the pool when the last [`BufferPool`] is gone. Idle buffers keep their region alive and the region its home,
/// so somebody has to break the circle.
#[derive(Debug)]
struct Handle {
    home: Arc<Home>,
    domain: ProtectionDomain,
    region: RegionRef,
    buffer_size: usize,
    /// Where it is found by address, and its own.
    found_in: Option<(Arc<Registry>, usize)>,
}

/// The live pools of a domain, by address: `Bytes` that lie in one of them are sent as they are.
#[derive(Debug, Default)]
pub(crate) struct Registry(RwLock<BTreeMap<usize, Weak<Handle>>>);

impl Registry {
    /// The region that `bytes` lie in.
    fn find(&self, bytes: &[u8]) -> Option<RegionRef> {
        let pools = self.0.read();
        let (_, pool) = pools.range(..=bytes.as_ptr().addr()).next_back()?;
        let pool = pool.upgrade();
        drop(pools);
        let region = pool?.region.clone();
        region.contains(bytes).then_some(region)
    }
}

struct Home {
    /// The buffer that came back last, which the cache still has: most are taken from here and come back to it, at the cost of one
    /// atomic exchange each.
    last: AtomicCell<Option<IdleBuffer>>,
    others: Mutex<Vec<IdleBuffer>>,
    /// `CLOSED`, and the number of futures that wait for a buffer times `WAITS`.
    special: AtomicUsize,
    capacity: usize,
    returned: Notify,
}

/// The pool is gone: what comes back is freed.
const CLOSED: usize = 1;
const WAITS: usize = 2;

/// Buffers begin at multiples of this, so that two of them never share a cache line.
const ALIGNMENT: usize = 64;

impl BufferPool {
    /// Registers memory for `count` buffers of at least `size` bytes: a multiple of 64.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for buffers of 4 GiB or more, which no message can have; what the allocation or the registration says: `ENOMEM`
    /// of the latter names the limit on locked memory.
    ///
    /// # Panics
    ///
    /// If `count` is 0.
    pub fn new(domain: &ProtectionDomain, count: usize, size: usize) -> Result<BufferPool, Error> {
        BufferPool::found_in(domain, count, size, None)
    }

    /// One that others of the same domain find.
    pub(crate) fn found_in(
        domain: &ProtectionDomain,
        count: usize,
        size: usize,
        registry: Option<&Arc<Registry>>,
    ) -> Result<BufferPool, Error> {
        assert!(count > 0, "a pool of no buffers");
        let buffer_size = size.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        if u32::try_from(buffer_size).is_err() {
            return Err(Error::Invalid {
                what: format!("buffers of {size} bytes: a message has less than 4 GiB"),
            });
        }
        let memory = domain.allocate(buffer_size.saturating_mul(count))?;
        let home = Arc::new(Home {
            last: AtomicCell::new(None),
            others: Mutex::new(Vec::with_capacity(count)),
            special: AtomicUsize::new(0),
            capacity: count,
            returned: Notify::new(),
        });
        let home_of_buffers = Arc::clone(&home) as Arc<dyn BufferHome>;
        // Handed out and dropped at once, each buffer finds its way home.
        let mut buffers = memory.into_homed(buffer_size, home_of_buffers).map(IdleBuffer::into_buffer);
        let Some(first) = buffers.next() else { unreachable!("a region of {count} buffers has a first one") };
        let (region, address) = (first.region(), first.as_ptr().addr());
        drop(first);
        buffers.for_each(drop);
        let found_in = registry.map(|registry| (Arc::clone(registry), address));
        let handle = Arc::new(Handle { home, domain: domain.clone(), region, buffer_size, found_in });
        if let Some(registry) = registry {
            registry.0.write().insert(address, Arc::downgrade(&handle));
        }
        Ok(BufferPool { handle })
    }

    /// A buffer if one is idle. It shows all of its [`buffer_size`](BufferPool::buffer_size) bytes, with what they
    /// held before.
    #[must_use]
    #[inline]
    pub fn try_acquire(&self) -> Option<Buffer> {
        let home = &*self.handle.home;
        home.last.take().or_else(|| home.take_other()).map(IdleBuffer::into_buffer)
    }

    /// As many idle buffers as there are, at most `count`, for less than as many calls of `try_acquire`.
    pub(crate) fn try_acquire_many(&self, count: usize, mut take: impl FnMut(Buffer)) {
        let home = &*self.handle.home;
        let mut others = home.others.lock();
        let first = others.len().saturating_sub(count);
        let found = others.len() - first;
        others.drain(first..).map(IdleBuffer::into_buffer).for_each(&mut take);
        drop(others);
        if found < count {
            home.last.take().map(IdleBuffer::into_buffer).into_iter().for_each(take);
        }
    }

    /// The next buffer that is idle: the back-pressure of everything that uses the pool.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped call leaves every buffer in the pool.
    pub async fn acquire(&self) -> Buffer {
        let home = &*self.handle.home;
        loop {
            if let Some(buffer) = self.try_acquire() {
                return buffer;
            }
            let mut returned = pin!(home.returned.notified());
            returned.as_mut().enable();
            let _waiting = Waiting::new(home);
            // Again after both announcements: a buffer that came back before them notified nobody.
            if let Some(buffer) = self.try_acquire() {
                return buffer;
            }
            returned.await;
        }
    }

    /// Bytes of each buffer.
    #[must_use]
    pub fn buffer_size(&self) -> usize {
        self.handle.buffer_size
    }

    /// Number of buffers, idle and in use.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.handle.home.capacity
    }

    /// Number of idle buffers at this moment.
    #[must_use]
    pub fn idle(&self) -> usize {
        let home = &*self.handle.home;
        let last = home.last.take();
        let count = home.others.lock().len() + usize::from(last.is_some());
        if let Some(last) = last {
            home.take_back(last);
        }
        count
    }

    /// The domain it is registered in.
    pub(crate) fn domain(&self) -> &ProtectionDomain {
        &self.handle.domain
    }

    /// `bytes` as they are, if they lie in memory of this pool, or of another one of its domain.
    pub(crate) fn payload(&self, bytes: &Bytes) -> Option<Payload<'static>> {
        let Handle { region, found_in, .. } = &*self.handle;
        if region.contains(bytes) {
            return Payload::bytes(bytes.clone(), region);
        }
        let region = found_in.as_ref()?.0.find(bytes)?;
        Payload::bytes(bytes.clone(), &region)
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Home {
    #[inline(never)]
    fn take_other(&self) -> Option<IdleBuffer> {
        self.others.lock().pop()
    }

    #[inline(never)]
    fn put_other(&self, buffer: IdleBuffer) {
        self.others.lock().push(buffer);
    }

    /// A buffer came back while somebody waits for one, or after the pool was closed.
    #[cold]
    fn see_to(&self, special: usize) {
        if special & CLOSED != 0 {
            self.clear();
        } else {
            self.returned.notify_one();
        }
    }

    /// Frees the idle buffers; the last one deregisters the region, so it is done outside of the lock.
    fn clear(&self) {
        let last = self.last.take();
        let others = std::mem::take(&mut *self.others.lock());
        drop((last, others));
    }
}

impl BufferHome for Home {
    fn take_back(&self, buffer: IdleBuffer) {
        if let Some(other) = self.last.swap(Some(buffer)) {
            self.put_other(other);
        }
        // After it was put: whoever waits, or closes the pool, first says so and then looks for buffers, and one of both sees the other.
        let special = self.special.load(SeqCst);
        if special != 0 {
            self.see_to(special);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Its memory lives on as long as the region does, so no other pool can have this address by now.
        if let Some((registry, address)) = &self.found_in {
            registry.0.write().remove(address);
        }
        self.home.special.fetch_or(CLOSED, SeqCst);
        self.home.clear();
    }
}

/// Counts a waiter for as long as it waits, also when its future is dropped.
struct Waiting<'a>(&'a Home);

impl<'a> Waiting<'a> {
    fn new(home: &'a Home) -> Self {
        home.special.fetch_add(WAITS, SeqCst);
        Waiting(home)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.special.fetch_sub(WAITS, SeqCst);
    }
}
