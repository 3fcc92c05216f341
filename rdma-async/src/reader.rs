//! Who reads a completion queue, and hands each completion to the lane it belongs to.

use std::{
    fmt, mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Wake, Waker},
    vec,
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rdma_core::{Buffer, Completion, Completions, Lent, PollError};

/// Takes the completions of one queue pair.
pub(crate) trait Deliver: Send + Sync {
    /// Takes `first` and those of `rest` that follow it and are of the same queue pair, as they mostly are: they share a lock. Gives the
    /// next one, of another queue pair. Called with the completion queue's lock held.
    fn deliver<'c>(
        &self,
        first: Completion<'c>,
        rest: &mut Lent<'c>,
        later: &mut Later,
    ) -> Option<Completion<'c>>;

    /// Whoever waits is to look for themselves. Called with the completion queue's lock held.
    fn wake_all(&self, later: &mut Later);
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

    /// Of the lane that the number `id` names.
    #[inline(always)]
    pub(crate) fn of(id: u64) -> Key {
        Key(id & !u64::from(Self::MAX_SLOT))
    }

    /// What follows the key in `id`; more than any number if it is of another lane.
    #[inline(always)]
    pub(crate) fn below(self, id: u64) -> u64 {
        id ^ self.0
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
    /// Something is here.
    pub(crate) any: bool,
    wakers: Vec<Waker>,
    garbage: Vec<Buffer>,
    bytes: Vec<Bytes>,
}

impl Later {
    #[inline]
    pub(crate) fn wake(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        self.wakers.extend(wakers);
        self.any |= !self.wakers.is_empty();
    }

    /// Drops the buffers of a completion that nobody wants.
    pub(crate) fn discard(&mut self, mut completion: Completion<'_>) {
        self.garbage.extend(completion.take_buffers());
        self.any = true;
    }

    /// Drops what an operation that nobody waits for has sent.
    pub(crate) fn discard_bytes(&mut self, bytes: Option<Bytes>) {
        self.bytes.extend(bytes);
        self.any = true;
    }

    /// Does what was put off; what is left is storage.
    fn run(&mut self) {
        self.any = false;
        self.garbage.clear();
        self.bytes.clear();
        wake(&mut self.wakers);
    }
}

fn wake(wakers: &mut Vec<Waker>) {
    let mut left = Left(wakers.drain(..));
    left.0.by_ref().for_each(Waker::wake);
}

/// Wakers to be called: when one of them panics, the others are called all the same.
struct Left<'l>(vec::Drain<'l, Waker>);

impl Drop for Left<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.by_ref().for_each(Waker::wake);
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
    pub(crate) completions: Completions,
    pub(crate) lanes: Vec<Registered>,
    free: Vec<usize>,
    pub(crate) later: Later,
    /// Futures that wait for room: see [`Room`].
    starved: Vec<Waker>,
    room: Arc<Room>,
}

#[derive(Default)]
pub(crate) struct Registered {
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

    /// Reads once, and hands each completion to its lane; says how many there were.
    pub(crate) fn read(&mut self, cq: &rdma_core::CompletionQueue) -> Result<usize, PollError> {
        let Reader { completions, lanes, later, .. } = self;
        let mut lent = cq.poll(completions)?;
        let count = lent.len();
        let mut next = lent.next();
        while let Some(completion) = next {
            next = hand_over(lanes, completion, &mut lent, later);
        }
        Ok(count)
    }

    /// Whether something was put off: then [`run`] must follow, when no lock is held.
    #[inline(always)]
    pub(crate) fn has_put_off(&self) -> bool {
        self.later.any
    }

    /// The wakers put off, if nothing else was.
    #[inline]
    fn take_wakers(&mut self) -> Option<Wakers> {
        let Later { any, wakers, garbage, bytes } = &mut self.later;
        if !(garbage.is_empty() && bytes.is_empty() && self.starved.is_empty()) {
            return None;
        }
        *any = false;
        Some(if wakers.len() == 1 { Wakers::One(wakers.pop()) } else { Wakers::Many(mem::take(wakers)) })
    }

    fn put_off(&mut self) -> Later {
        if self.room.0.swap(false, SeqCst) {
            self.later.wakers.append(&mut self.starved);
        }
        let is_starved = !self.starved.is_empty();
        let later = mem::take(&mut self.later);
        self.later.any = is_starved;
        later
    }

    /// Keeps the storage.
    fn recycle(&mut self, later: Later) {
        if !self.later.any {
            self.later = later;
        }
    }

    /// Wakes everybody who waits.
    pub(crate) fn wake_all(&mut self) {
        for lane in self.lanes.iter().filter_map(|registered| registered.lane.as_ref()) {
            lane.wake_all(&mut self.later);
        }
        self.later.wake(self.starved.drain(..));
    }

    /// Wakes `waker` when there may be room again.
    pub(crate) fn starve(&mut self, waker: &Waker) {
        if !self.starved.iter().any(|other| other.will_wake(waker)) {
            self.starved.push(waker.clone());
        }
        self.later.any = true;
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

/// Gives a completion to the lane that its number names, and those of `rest` that follow; gives the next one, of another lane.
#[inline]
pub(crate) fn hand_over<'c>(
    lanes: &[Registered],
    completion: Completion<'c>,
    rest: &mut Lent<'c>,
    later: &mut Later,
) -> Option<Completion<'c>> {
    let id = completion.id();
    let index = Key::index(id);
    match lanes.get(index) {
        Some(Registered { generation, lane: Some(lane) }) if Key::new(index, *generation).is_of(id) => {
            lane.deliver(completion, rest, later)
        }
        _ => {
            later.discard(completion);
            rest.next()
        }
    }
}

enum Wakers {
    One(Option<Waker>),
    Many(Vec<Waker>),
}

/// Runs what was put off; the caller holds no lock.
#[inline(never)]
pub(crate) fn run(reader: &Mutex<Reader>) {
    let mut guard = reader.lock();
    if !guard.later.any {
        return;
    }
    let wakers = guard.take_wakers();
    match wakers {
        Some(Wakers::One(waker)) => {
            drop(guard);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        Some(Wakers::Many(mut wakers)) => {
            drop(guard);
            wake(&mut wakers);
            let mut guard = reader.lock();
            if guard.later.wakers.capacity() == 0 {
                guard.later.wakers = wakers;
            }
        }
        None => run_all(reader, guard),
    }
}

#[inline(never)]
fn run_all(reader: &Mutex<Reader>, mut guard: MutexGuard<'_, Reader>) {
    let mut later = guard.put_off();
    drop(guard);
    later.run();
    reader.lock().recycle(later);
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::AtomicUsize,
    };

    use super::*;

    #[derive(Default)]
    struct Called(AtomicUsize);

    impl Wake for Called {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    struct Panics;

    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            panic!("a waker of the program's");
        }
    }

    #[test]
    fn a_waker_that_panics_loses_no_other_wake_up() {
        let called = Arc::new(Called::default());
        let mut later = Later::default();
        let waker = || Waker::from(Arc::clone(&called));
        later.wake([waker(), Waker::from(Arc::new(Panics)), waker(), waker()]);
        assert!(catch_unwind(AssertUnwindSafe(|| later.run())).is_err());
        assert_eq!(called.0.load(SeqCst), 3);
    }
}
