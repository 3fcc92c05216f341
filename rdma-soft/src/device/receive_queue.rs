//! Receive queues, one queue pair's own or shared.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::completion_queue::Polled;
use super::events::{AsyncEvent, AsyncEvents, EventCount};
use crate::proto::Sge;

/// Posted receives, oldest first. All memory is allocated at creation.
#[derive(Debug)]
pub(crate) struct ReceiveRing {
    slots: Box<[Slot]>,
    sges: Box<[Sge]>,
    max_sge: usize,
    head: usize,
    len: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    wr_id: u64,
    num_sge: usize,
}

/// Why a receive was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReceiveError {
    Full,
    TooManySges,
    /// The queue pair takes none: it has a shared receive queue, or is in RESET.
    WrongState,
}

/// The receive that the message of the moment fills.
#[derive(Debug, Default)]
pub(crate) struct CurrentReceive {
    pub(crate) wr_id: u64,
    pub(crate) sges: Vec<Sge>,
}

impl ReceiveRing {
    pub(crate) fn new(depth: usize, max_sge: usize) -> Self {
        ReceiveRing {
            slots: vec![Slot::default(); depth].into_boxed_slice(),
            sges: vec![Sge::default(); depth * max_sge].into_boxed_slice(),
            max_sge,
            head: 0,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn depth(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn max_sge(&self) -> usize {
        self.max_sge
    }

    fn place(&self, n: usize) -> usize {
        let place = self.head + n;
        if place < self.slots.len() { place } else { place - self.slots.len() }
    }

    /// `away`: receives that have left it and keep their places.
    pub(crate) fn push(
        &mut self,
        wr_id: u64,
        sges: impl ExactSizeIterator<Item = Sge>,
        away: usize,
    ) -> Result<(), ReceiveError> {
        let num_sge = sges.len();
        if num_sge > self.max_sge {
            return Err(ReceiveError::TooManySges);
        }
        if self.len + away >= self.slots.len() {
            return Err(ReceiveError::Full);
        }
        let place = self.place(self.len);
        self.slots[place] = Slot { wr_id, num_sge };
        for (to, from) in self.sges[place * self.max_sge..].iter_mut().zip(sges) {
            *to = from;
        }
        self.len += 1;
        Ok(())
    }

    /// Takes the oldest receive into `current`.
    #[inline]
    pub(crate) fn pop(&mut self, current: &mut CurrentReceive) -> bool {
        if self.len == 0 {
            return false;
        }
        let Slot { wr_id, num_sge } = self.slots[self.head];
        let first = self.head * self.max_sge;
        current.wr_id = wr_id;
        current.sges.clear();
        current.sges.extend_from_slice(&self.sges[first..first + num_sge]);
        self.head = self.place(1);
        self.len -= 1;
        true
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// The same receives in a ring of another depth; refused when they are more.
    fn resized(&self, depth: usize) -> Option<ReceiveRing> {
        if self.len > depth {
            return None;
        }
        let mut ring = ReceiveRing::new(depth, self.max_sge);
        for n in 0..self.len {
            let place = self.place(n);
            let Slot { wr_id, num_sge } = self.slots[place];
            let first = place * self.max_sge;
            let sges = self.sges[first..first + num_sge].iter().copied();
            ring.push(wr_id, sges, 0).ok()?;
        }
        Some(ring)
    }
}

/// A receive queue that several queue pairs take from.
#[derive(Debug)]
pub(crate) struct SharedReceiveQueue {
    inner: Mutex<Shared>,
    pub(crate) identity: usize,
    pub(crate) pd: u32,
    /// Queue pairs that use it.
    pub(crate) users: AtomicUsize,
    pub(crate) async_events: Arc<AsyncEvents>,
    pub(crate) event_count: Arc<EventCount>,
    /// Receives whose completions were queued, on whatever completion queue, and polled.
    completed: AtomicU32,
    pub(super) polled: Arc<Polled>,
}

#[derive(Debug)]
struct Shared {
    ring: ReceiveRing,
    /// Fewer receives than this raise the limit event, once; 0 is off.
    limit: usize,
}

impl SharedReceiveQueue {
    pub(crate) fn new(
        depth: usize,
        max_sge: usize,
        limit: usize,
        pd: u32,
        identity: usize,
        async_events: Arc<AsyncEvents>,
    ) -> Self {
        SharedReceiveQueue {
            inner: Mutex::new(Shared { ring: ReceiveRing::new(depth, max_sge), limit }),
            identity,
            pd,
            users: AtomicUsize::new(0),
            async_events,
            event_count: Arc::default(),
            completed: AtomicU32::new(0),
            polled: Polled::of_shared(),
        }
    }

    pub(super) fn count_completed(&self) {
        self.completed.fetch_add(1, Ordering::AcqRel);
    }

    /// Receives whose completions wait to be polled. One may be polled before it is counted as completed.
    fn away(&self) -> usize {
        let waiting = self.polled.waiting_of(self.completed.load(Ordering::Acquire));
        usize::try_from(waiting.cast_signed()).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(
        &self,
        wr_id: u64,
        sges: impl ExactSizeIterator<Item = Sge>,
    ) -> Result<(), ReceiveError> {
        self.lock().ring.push(wr_id, sges, self.away())
    }

    pub(crate) fn pop(&self, current: &mut CurrentReceive) -> bool {
        let mut shared = self.lock();
        let taken = shared.ring.pop(current);
        let reached = shared.limit > 0 && shared.ring.len() < shared.limit;
        if reached {
            shared.limit = 0;
        }
        drop(shared);
        if reached {
            self.async_events.raise(AsyncEvent::SrqLimitReached, self.identity, &self.event_count);
        }
        taken
    }

    pub(crate) fn max_sge(&self) -> usize {
        self.lock().ring.max_sge()
    }

    /// Depth and limit.
    pub(crate) fn query(&self) -> (usize, usize) {
        let shared = self.lock();
        (shared.ring.depth(), shared.limit)
    }

    /// Changes depth, limit or both; refused when the result does not hold what is posted, or the limit
    /// exceeds the depth.
    pub(crate) fn modify(&self, depth: Option<usize>, limit: Option<usize>) -> bool {
        let mut shared = self.lock();
        let new_depth = depth.unwrap_or(shared.ring.depth());
        if limit.is_some_and(|limit| limit > new_depth) {
            return false;
        }
        if depth.is_some() {
            match shared.ring.resized(new_depth).filter(|ring| ring.len() + self.away() <= new_depth) {
                Some(ring) => shared.ring = ring,
                None => return false,
            }
        }
        if let Some(limit) = limit {
            shared.limit = limit;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sges(n: u32) -> impl ExactSizeIterator<Item = Sge> {
        (0..n as usize).map(|i| Sge { addr: i as u64, length: 1, lkey: 2 })
    }

    #[test]
    fn receives_come_out_in_order_around_the_ring() {
        let mut ring = ReceiveRing::new(3, 2);
        let mut current = CurrentReceive::default();
        for round in 0..5 {
            for i in 0..3 {
                ring.push(round * 3 + i, sges(u32::try_from(i).unwrap() % 3), 0).unwrap();
            }
            assert_eq!(ring.push(0, sges(1), 0), Err(ReceiveError::Full));
            for i in 0..3 {
                assert!(ring.pop(&mut current));
                assert_eq!((current.wr_id, current.sges.len() as u64), (round * 3 + i, i % 3));
            }
            assert!(!ring.pop(&mut current));
        }
        assert_eq!(ring.push(0, sges(3), 0), Err(ReceiveError::TooManySges));
        ring.push(0, sges(1), 2).unwrap();
        assert_eq!(ring.push(0, sges(1), 2), Err(ReceiveError::Full));
    }

    #[test]
    fn the_limit_event_comes_once() {
        let events = Arc::new(AsyncEvents::new().unwrap());
        let srq = SharedReceiveQueue::new(4, 1, 2, 1, 77, Arc::clone(&events));
        let mut current = CurrentReceive::default();
        for i in 0..3 {
            srq.push(i, sges(1)).unwrap();
        }
        assert!(srq.pop(&mut current) && srq.pop(&mut current) && srq.pop(&mut current));
        let event = events.take().unwrap();
        assert_eq!((event.event, event.identity), (AsyncEvent::SrqLimitReached, 77));
        assert_eq!(srq.query(), (4, 0));
        assert!(!srq.modify(None, Some(5)) && srq.modify(Some(8), Some(5)));
    }
}
