//! Every interleaving of the parties at a slot, under the model checker (`ci/loom.sh`).
//!
//! The payload and the result hold cells that loom watches: an access that does not happen after the last one fails
//! the model, whether or not it went wrong.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::thread;

use super::slot::{Claim, Posted, SlotTable, WrId};

/// What only one party may touch at a time.
struct Watched(UnsafeCell<u32>);

impl Watched {
    fn new(value: u32) -> Watched {
        Watched(UnsafeCell::new(value))
    }

    /// Touches it as its owner may.
    fn touch(&self) -> u32 {
        self.0.with_mut(|value| {
            // SAFETY: loom fails the model if anyone else could be here.
            let value = unsafe { &mut *value };
            *value += 1;
            *value
        })
    }
}

type Table = SlotTable<Watched, Watched>;

/// Wakes by loom's notification, and says so.
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify();
    }
}

fn bell() -> (Arc<Bell>, Waker) {
    let bell = Arc::new(Bell(Notify::new()));
    (Arc::clone(&bell), Waker::from(bell))
}

/// Posts to the only slot; gives its name, or `None` when it is not free.
fn post(table: &Table, owned: bool, value: u32) -> Option<WrId> {
    // What is not owned is simple, so that both ways to claim it are modelled.
    post_as(table, if owned { Posted::Owned } else { Posted::Simple(0) }, value)
}

fn post_as(table: &Table, posted: Posted, value: u32) -> Option<WrId> {
    if posted == Posted::Owned {
        table.prepare_owned();
    }
    let mut cursor = table.cursor();
    cursor.set_open(true);
    // SAFETY: the table outlives the call; there is one poster.
    let free = unsafe { cursor.next() }?;
    // SAFETY: the poster owns the payload of an acquired slot.
    unsafe { free.payload().write(Watched::new(value)) };
    Some(free.publish(posted.step()))
}

/// Takes the payload of a claimed or completed slot and releases it.
fn take(table: &Table) -> u32 {
    // SAFETY: the caller owns the slot.
    let payload = unsafe { table.payload(0) };
    // SAFETY: written by `post`, taken once.
    let payload = unsafe { payload.read() };
    let value = payload.touch();
    // SAFETY: owned, and emptied.
    unsafe { table.release(0) };
    value
}

/// A completion comes: 1 when the payload was this poller's to take.
fn complete(table: &Table, id: WrId, exclusive: bool) -> u32 {
    // SAFETY: the table outlives the call.
    if exclusive && let Some(slot) = unsafe { table.slots().claim_simple(id) } {
        // SAFETY: written by `post`, taken once.
        unsafe { slot.payload().read() }.touch();
        slot.release();
        return 1;
    }
    // SAFETY: the only completion there is, where the model says so.
    if exclusive && unsafe { table.complete_submitted(id, Watched::new(7)) }.is_ok() {
        return 0;
    }
    match table.claim(id, exclusive) {
        Claim::Stray => 0,
        Claim::Polled | Claim::Simple(_) | Claim::Placed(_) | Claim::Ignored => {
            take(table);
            1
        }
        Claim::Owned { waiting } => {
            // SAFETY: claimed with this answer, finished once.
            match unsafe { table.finish(0, waiting, Watched::new(7)) } {
                Ok(waker) => {
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                    0
                }
                Err(result) => {
                    result.touch();
                    take(table);
                    1
                }
            }
        }
    }
}

/// The owner takes a completed operation.
fn finish(table: &Table) {
    // SAFETY: the owner of a completed slot, once.
    let result = unsafe { table.take_result(0) };
    assert_eq!(result.touch(), 8);
    take(table);
}

/// The owner waits: no wake-up is lost, and the result happens before it is read.
#[test]
fn loom_an_owner_waits() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post(&table, true, 1).unwrap();
        let poller = {
            let table = table.clone();
            thread::spawn(move || assert_eq!(complete(&table, id, true), 0))
        };
        loop {
            let (bell, waker) = bell();
            // SAFETY: the owner.
            if unsafe { table.poll(0, &mut Context::from_waker(&waker)) } == Poll::Ready(()) {
                break;
            }
            bell.0.wait();
            // The poller may be about to finish: let it.
            thread::yield_now();
        }
        finish(&table);
        poller.join().unwrap();
        assert!(post(&table, false, 1).is_some());
    });
}

/// The owner changes its waker: the last one is woken.
#[test]
fn loom_an_owner_changes_its_waker() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post(&table, true, 1).unwrap();
        let (_, first) = bell();
        // SAFETY: the owner.
        assert!(unsafe { table.poll(0, &mut Context::from_waker(&first)) }.is_pending());
        let poller = {
            let table = table.clone();
            thread::spawn(move || assert_eq!(complete(&table, id, true), 0))
        };
        loop {
            let (bell, waker) = bell();
            // SAFETY: the owner.
            if unsafe { table.poll(0, &mut Context::from_waker(&waker)) } == Poll::Ready(()) {
                break;
            }
            bell.0.wait();
            // The poller may be about to finish: let it.
            thread::yield_now();
        }
        finish(&table);
        poller.join().unwrap();
    });
}

/// The owner goes away while the completion comes: exactly one of them takes what the slot held.
#[test]
fn loom_an_owner_goes_away() {
    for waits in [false, true] {
        loom::model(move || {
            let table = loom::sync::Arc::new(Table::new(0, 1));
            let id = post(&table, true, 1).unwrap();
            if waits {
                let (_, waker) = bell();
                // SAFETY: the owner.
                assert!(unsafe { table.poll(0, &mut Context::from_waker(&waker)) }.is_pending());
            }
            let poller = {
                let table = table.clone();
                thread::spawn(move || complete(&table, id, true))
            };
            // SAFETY: the owner, who does not use the slot again when told true.
            let mine = if unsafe { table.ignore(0) } {
                0
            } else {
                finish(&table);
                1
            };
            assert_eq!(mine + poller.join().unwrap(), 1);
        });
    }
}

/// Two completion queues report the same work request of a shared queue, and the owner goes away: it is still taken once.
#[test]
fn loom_two_completions_and_an_owner_that_goes_away() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post(&table, true, 1).unwrap();
        let pollers: Vec<_> = (0..2)
            .map(|_| {
                let table = table.clone();
                thread::spawn(move || complete(&table, id, false))
            })
            .collect();
        // SAFETY: the owner, who does not use the slot again when told true.
        let mine = if unsafe { table.ignore(0) } {
            0
        } else {
            finish(&table);
            1
        };
        let theirs: u32 = pollers.into_iter().map(|poller| poller.join().unwrap()).sum();
        assert_eq!(mine + theirs, 1);
    });
}

/// Two completions of one work request that nobody owns, and the next post: each payload is taken once, a late completion
/// does not claim what came after it.
#[test]
fn loom_two_completions_and_the_next_post() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post(&table, false, 1).unwrap();
        let pollers: Vec<_> = (0..2)
            .map(|_| {
                let table = table.clone();
                thread::spawn(move || complete(&table, id, false))
            })
            .collect();
        let next = post(&table, false, 10);
        let taken: u32 = pollers.into_iter().map(|poller| poller.join().unwrap()).sum();
        assert_eq!(taken, 1);
        if let Some(next) = next {
            assert_ne!(next.0, id.0);
            assert_eq!(complete(&table, next, false), 1);
        }
    });
}

/// The fast path of a poller against the poster: the payload is written before it is read, and read before it is written again.
#[test]
fn loom_poster_and_poller() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post(&table, false, 1).unwrap();
        let poller = {
            let table = table.clone();
            thread::spawn(move || {
                // SAFETY: the table outlives the thread.
                let slot = unsafe { table.slots().claim_simple(id) }.unwrap();
                // SAFETY: claimed, taken once.
                let payload = unsafe { slot.payload().read() };
                assert_eq!(payload.touch(), 2);
                slot.release();
                // SAFETY: as above.
                assert!(unsafe { table.slots().claim_simple(id) }.is_none());
            })
        };
        let next = post(&table, false, 10);
        poller.join().unwrap();
        if let Some(next) = next {
            assert_eq!(complete(&table, next, true), 1);
        }
    });
}

/// An unsignalled send is completed by a later one, or by itself with an error: once, and not as what is simple.
#[test]
fn loom_a_placed_slot() {
    loom::model(|| {
        let table = loom::sync::Arc::new(Table::new(0, 1));
        let id = post_as(&table, Posted::Placed(3), 1).unwrap();
        assert_eq!(id.opcode(), 3);
        let poller = {
            let table = table.clone();
            thread::spawn(move || {
                // SAFETY: the table outlives the thread.
                assert!(unsafe { table.slots().claim_simple(id) }.is_none());
                // SAFETY: as above.
                let slot = unsafe { table.slots().claim_placed(id) }.unwrap();
                // SAFETY: claimed, taken once.
                let payload = unsafe { slot.payload().read() };
                assert_eq!(payload.touch(), 2);
                slot.release();
                assert_eq!(complete(&table, id, true), 0);
            })
        };
        let next = post_as(&table, Posted::Placed(3), 10);
        poller.join().unwrap();
        if let Some(next) = next {
            assert_eq!(table.claim(next, true), Claim::Placed(3));
            assert_eq!(take(&table), 11);
        }
    });
}
