//! Who reads a completion queue, and hands each completion to the lane it belongs to.

use std::{
    fmt, mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Wake, Waker},
};

use bytes::Bytes;
use rdma_core::{Buffer, Completion, Completions, PollError};

/// Takes the completions of one queue pair.
pub(crate) trait Deliver: Send + Sync {
    /// `slot` is the number of the work request. Called with the completion queue's lock held.
    fn deliver(&self, slot: u32, completion: &mut Completion<'_>, later: &mut Later);
}

/// Names a lane of a completion queue, in the upper bits of its work requests' numbers: an index, and a generation that is another
/// for every lane that has the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u64);

impl Key {
    const SLOT_BITS: u32 = 24;
    const INDEX_BITS: u32 = 20;
    /// The largest number below a key.
    pub(crate) const MAX_SLOT: u32 = (1 << Self::SLOT_BITS) - 1;

    fn new(index: usize, generation: u64) -> Key {
        Key((generation << Self::INDEX_BITS | index as u64) << Self::SLOT_BITS)
    }

    #[inline(always)]
    pub(crate) fn id(self, slot: u32) -> u64 {
        self.0 | u64::from(slot)
    }

    #[inline(always)]
    pub(crate) fn is_of(self, id: u64) -> bool {
        id & !u64::from(Self::MAX_SLOT) == self.0
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "masked to 24 bits")]
    pub(crate) fn slot(id: u64) -> u32 {
        id as u32 & Self::MAX_SLOT
    }

    fn index(id: u64) -> usize {
        (id >> Self::SLOT_BITS) as usize & ((1 << Self::INDEX_BITS) - 1)
    }
}

/// What is put off until no lock is held: wakers run foreign code, and a buffer that comes home may call one.
#[derive(Debug, Default)]
pub(crate) struct Later {
    wakers: Vec<Waker>,
    garbage: Vec<Buffer>,
    bytes: Vec<Bytes>,
}

impl Later {
    #[inline]
    pub(crate) fn wake(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        self.wakers.extend(wakers);
    }

    /// Drops the buffers of a completion that nobody wants.
    pub(crate) fn discard(&mut self, completion: &mut Completion<'_>) {
        self.garbage.extend(completion.take_buffers());
    }

    /// Drops what an operation that nobody waits for has sent.
    pub(crate) fn discard_bytes(&mut self, bytes: Option<Bytes>) {
        self.bytes.extend(bytes);
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.wakers.is_empty() && self.garbage.is_empty() && self.bytes.is_empty()
    }

    /// Does what was put off; what is left is storage.
    fn run(&mut self) {
        self.garbage.clear();
        self.bytes.clear();
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
    }
}

/// Says that a place in a work queue, or a credit of the completion queue, became free. `rdma-core` calls it while the completion queue
/// is read; the futures that wait for it are woken when that is done.
#[derive(Debug, Default)]
pub(crate) struct Room(AtomicBool);

impl Wake for Room {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// What whoever reads a completion queue uses.
pub(crate) struct Reader {
    completions: Completions,
    lanes: Vec<Registered>,
    free: Vec<usize>,
    later: Later,
    /// Futures that wait for room: see [`Room`].
    starved: Vec<Waker>,
    room: Arc<Room>,
}

#[derive(Default)]
struct Registered {
    generation: u64,
    lane: Option<Arc<dyn Deliver>>,
}

impl Reader {
    pub(crate) fn new(room: Arc<Room>) -> Reader {
        Reader {
            completions: Completions::new(),
            lanes: Vec::new(),
            free: Vec::new(),
            later: Later::default(),
            starved: Vec::new(),
            room,
        }
    }

    /// Reads once, and gives each completion to `mine`, which leaves those of other lanes to them by giving them back; gives how many
    /// there were. [`Reader::put_off`] must follow.
    #[inline(always)]
    pub(crate) fn read(
        &mut self,
        cq: &rdma_core::CompletionQueue,
        mut mine: impl FnMut(&mut Completion<'_>, &mut Later) -> bool,
    ) -> Result<usize, PollError> {
        let Reader { completions, lanes, later, .. } = self;
        let lent = cq.poll(completions)?;
        let count = lent.len();
        for mut completion in lent {
            if !mine(&mut completion, later) {
                hand_over(lanes, &mut completion, later);
            }
        }
        Ok(count)
    }

    /// What was put off, if there is anything: to be run when no lock is held, and then given to [`Reader::recycle`].
    #[inline(always)]
    pub(crate) fn put_off(&mut self) -> Option<Later> {
        if self.later.is_empty() && self.starved.is_empty() { None } else { self.put_off_slow() }
    }

    #[inline(never)]
    fn put_off_slow(&mut self) -> Option<Later> {
        if !self.starved.is_empty() && self.room.0.swap(false, SeqCst) {
            self.later.wakers.append(&mut self.starved);
        }
        (!self.later.is_empty()).then(|| mem::take(&mut self.later))
    }

    /// Keeps the storage.
    fn recycle(&mut self, later: Later) {
        if self.later.is_empty() {
            self.later = later;
        }
    }

    /// Wakes `waker` when there may be room again.
    pub(crate) fn starve(&mut self, waker: &Waker) {
        if !self.starved.iter().any(|other| other.will_wake(waker)) {
            self.starved.push(waker.clone());
        }
    }

    pub(crate) fn add(&mut self, lane: Arc<dyn Deliver>) -> Key {
        let index = self.free.pop().unwrap_or_else(|| {
            self.lanes.push(Registered::default());
            self.lanes.len() - 1
        });
        let registered = &mut self.lanes[index];
        registered.lane = Some(lane);
        Key::new(index, registered.generation)
    }

    /// Gives the lane, to be dropped outside of the lock. Completions that still come for it are dropped.
    pub(crate) fn remove(&mut self, key: Key) -> Option<Arc<dyn Deliver>> {
        let index = Key::index(key.0);
        let registered = self.lanes.get_mut(index)?;
        registered.generation += 1;
        self.free.push(index);
        registered.lane.take()
    }
}

/// Gives a completion to the lane that its number names.
#[inline(never)]
fn hand_over(lanes: &[Registered], completion: &mut Completion<'_>, later: &mut Later) {
    let id = completion.id();
    let index = Key::index(id);
    match lanes.get(index) {
        Some(Registered { generation, lane: Some(lane) }) if Key::new(index, *generation).is_of(id) => {
            lane.deliver(Key::slot(id), completion, later);
        }
        _ => later.discard(completion),
    }
}

/// Runs what was put off; the caller holds no lock.
#[inline(never)]
pub(crate) fn run(later: Option<Later>, reader: &parking_lot::Mutex<Reader>) {
    if let Some(mut later) = later {
        later.run();
        reader.lock().recycle(later);
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}
