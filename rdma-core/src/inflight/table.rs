//! From a `wr_id` to its work queue: one table per context.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::payload::SlotPayload;
use super::queue::WorkQueue;
use super::slot::{QUEUE_BITS, SLOT_BITS, SimpleSlot, Slot, Slots, WrId};
use crate::cq::CqInner;

/// The most work queues of a context.
pub(crate) const MAX_QUEUES: u32 = 1 << QUEUE_BITS;
/// The deepest work queue.
pub(crate) const MAX_DEPTH: u32 = 1 << SLOT_BITS;

/// The work queues of a context by index, and its completion queues.
///
/// Pollers read the table under the lock of *their* completion queue; a queue is taken out before it
/// is freed, and in between whoever frees it has held every completion queue's lock once (S-4): a poller that saw the
/// queue has left by then. So a lookup is two loads, without a lock or a counter that pollers share.
#[derive(Debug)]
pub(crate) struct QueueTable {
    /// `MAX_QUEUES` entries, 32 MiB of address space that the kernel backs page by page as used.
    entries: Box<Entries>,
    indices: Mutex<Indices>,
    cqs: Mutex<Vec<Weak<CqInner>>>,
}

#[derive(Debug, Default)]
struct Indices {
    fresh: u32,
    freed: Vec<u32>,
}

/// A reserved index; free again once the last holder is gone: the queue itself, and every completion queue that may
/// still deliver its completions.
#[derive(Debug)]
pub(crate) struct QueueIndex {
    pub(crate) index: u32,
    table: Arc<QueueTable>,
}

impl Drop for QueueIndex {
    fn drop(&mut self) {
        self.table.indices.lock().freed.push(self.index);
    }
}

impl QueueIndex {
    /// Says which completion queue may lend what is simple, see [`Entries::claim_simple`]; null: none. The queue with this index
    /// is in the table, and `cq` null or the completion queue that it completes on.
    pub(super) fn lend_to(&self, cq: *const CqInner) {
        // Release: whoever sees this completion queue sees the slots.
        self.table.entry(self.index).lends_to.store(cq.cast_mut(), Ordering::Release);
    }
}

const ENTRY_SHIFT: u32 = 5;

/// A work queue in the table.
#[derive(Debug)]
struct Entry {
    queue: AtomicPtr<WorkQueue>,
    /// The completion queue that it completes on, or null: while someone waits for a slot, or if it is shared, or gone.
    lends_to: AtomicPtr<CqInner>,
    /// See `Slots`.
    slots: AtomicPtr<Slot<SlotPayload>>,
    mask: AtomicU64,
}

/// A queue for every number.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Entries([Entry; MAX_QUEUES as usize]);

impl Entries {
    /// The queue that a `wr_id` names, or null.
    #[inline(always)]
    pub(crate) fn find(&self, id: WrId) -> *const WorkQueue {
        // Acquire: see `insert`. There is an entry for every number that fits.
        self.0[id.queue()].queue.load(Ordering::Acquire)
    }

    /// The slot of a completion that needs nothing but to be lent: posted as simple, in flight, on this completion
    /// queue, and nobody waits for a slot of its queue.
    ///
    /// # Safety
    ///
    /// The caller holds the lock of `cq`, and does not keep the slot longer.
    #[inline(always)]
    pub(crate) unsafe fn claim_simple(
        &self,
        cq: *const CqInner,
        id: WrId,
    ) -> Option<SimpleSlot<'_, SlotPayload>> {
        const { assert!(size_of::<Entry>() == 1 << ENTRY_SHIFT) };
        let entry = self.0.as_ptr().wrapping_byte_add(id.queue_offset(ENTRY_SHIFT));
        // SAFETY: there is an entry for every number.
        let entry = unsafe { &*entry };
        // Acquire: see `lend_to`.
        if !std::ptr::eq(entry.lends_to.load(Ordering::Acquire), cq) {
            return None;
        }
        let first = entry.slots.load(Ordering::Relaxed);
        let slots = Slots { first, mask: entry.mask.load(Ordering::Relaxed) };
        // SAFETY: the queue, and its slots, are not freed before this poller leaves its lock (S-4).
        unsafe { slots.claim_simple(id) }
    }
}

impl QueueTable {
    pub(crate) fn new() -> QueueTable {
        let layout = std::alloc::Layout::new::<Entries>();
        // SAFETY: the layout has a size. Zeroed by the allocator, not by us, so that no page is touched.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<Entries>();
        if ptr.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        // SAFETY: allocated with this layout; null pointers and numbers are all zeroes.
        let entries = unsafe { Box::from_raw(ptr) };
        QueueTable { entries, indices: Mutex::default(), cqs: Mutex::default() }
    }

    /// Reserves an index.
    pub(crate) fn reserve(self: &Arc<QueueTable>) -> Option<Arc<QueueIndex>> {
        let mut indices = self.indices.lock();
        let index = match indices.freed.pop() {
            Some(index) => index,
            // The last one stays unused: the completion that no queue has names it.
            None if indices.fresh < MAX_QUEUES - 1 => {
                indices.fresh += 1;
                indices.fresh - 1
            }
            None => return None,
        };
        Some(Arc::new(QueueIndex { index, table: Arc::clone(self) }))
    }

    fn entry(&self, index: u32) -> &Entry {
        &self.entries.0[index as usize]
    }

    pub(crate) fn insert(&self, queue: &Arc<WorkQueue>) {
        let entry = self.entry(queue.index());
        let Slots { first, mask } = queue.slots.slots();
        entry.slots.store(first.cast_mut(), Ordering::Relaxed);
        entry.mask.store(mask, Ordering::Relaxed);
        // Release: the queue is built before a poller can find it.
        entry.queue.store(Arc::as_ptr(queue).cast_mut(), Ordering::Release);
        queue.set_listed(true);
    }

    /// Takes a queue out. Afterwards, `synchronize` before it is freed.
    pub(crate) fn remove(&self, queue: &WorkQueue) {
        queue.set_listed(false);
        self.entry(queue.index()).queue.store(std::ptr::null_mut(), Ordering::Release);
    }

    /// The entries, to look at several.
    #[inline]
    pub(crate) fn entries(&self) -> &Entries {
        &self.entries
    }

    pub(crate) fn add_cq(&self, cq: &Arc<CqInner>) {
        let mut cqs = self.cqs.lock();
        cqs.retain(|cq| cq.strong_count() > 0);
        cqs.push(Arc::downgrade(cq));
    }

    /// The completion queue whose provider object is at this address.
    pub(crate) fn find_cq(&self, address: usize) -> Option<Arc<CqInner>> {
        let cqs = self.cqs.lock();
        cqs.iter().filter_map(Weak::upgrade).find(|cq| cq.ptr.addr().get() == address)
    }

    /// Waits until every poller that may hold a queue found earlier is done with it. The caller holds
    /// no completion queue's lock.
    pub(crate) fn synchronize(&self) {
        let cqs: Vec<_> = self.cqs.lock().iter().filter_map(Weak::upgrade).collect();
        for cq in cqs {
            drop(cq.lock_state());
        }
    }
}
