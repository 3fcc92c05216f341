//! What a thread needs while it sends and receives for the device, kept from call to call so that no
//! operation allocates.

use std::cell::RefCell;
use std::sync::Arc;

use super::channel::Channel;
use super::completion_queue::CompletionQueue;
use super::egress::Batch;
use super::inbox::SentTo;
use crate::net::IcrcCache;
use crate::proto::Time;
use crate::wire::Qpn;

/// Per thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) batch: Batch,
    /// Of packets that are sent.
    pub(super) icrcs: IcrcCache,
    pub(super) wakes: Wakes,
    /// Where this thread put packets that may not have been taken yet.
    pub(super) sent_to: SentTo,
    /// Queue pairs whose acknowledgements this thread held, to be sent when it polls in vain, or held them for long enough.
    pub(super) held: Held,
    /// Polls in a row that found nothing.
    pub(super) idle_polls: u32,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends the calling thread's scratch to `f`, then announces the completions it gathered. No lock of the
/// device may be held.
#[inline]
pub(super) fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut f = Some(f);
    let result = SCRATCH.try_with(|scratch| {
        let scratch = &mut *scratch.try_borrow_mut().ok()?;
        let result = f.take()?(scratch);
        scratch.wakes.signal();
        Some(result)
    });
    match (result, f) {
        (Ok(Some(result)), _) => result,
        // The thread is ending and its locals are gone.
        (_, Some(f)) => {
            let mut scratch = Scratch::default();
            let result = f(&mut scratch);
            scratch.wakes.signal();
            result
        }
        (_, None) => unreachable!("the closure was taken only to produce a result"),
    }
}

/// Channels whose descriptors are to be made readable once no lock is held.
#[derive(Debug, Default)]
pub(super) struct Wakes(Vec<Arc<Channel>>);

impl Wakes {
    /// Queues the event of `cq`.
    pub(super) fn add(&mut self, cq: &Arc<CompletionQueue>) {
        if let Some(channel) = &cq.channel {
            channel.events.push(Arc::clone(cq));
            if !self.0.iter().any(|c| Arc::ptr_eq(c, channel)) {
                self.0.push(Arc::clone(channel));
            }
        }
    }

    #[inline]
    pub(super) fn signal(&mut self) {
        if !self.0.is_empty() {
            self.signal_all();
        }
    }

    fn signal_all(&mut self) {
        for channel in self.0.drain(..) {
            channel.events.signal();
        }
    }
}

/// Queue pairs that owe an acknowledgement, by number: a thread that never polls again must not keep them, and
/// most are not looked up, for what they owe leaves with an answer.
#[derive(Debug, Default)]
pub(super) struct Held {
    list: Vec<Qpn>,
    /// When it was empty last.
    since: Time,
    /// The completions of one of them, at least, are for another thread, which may be about to answer.
    is_foreign: bool,
    /// Empty: the storage of the next list.
    spare: Vec<Qpn>,
}

impl Held {
    /// More than this wait for the background thread's tick.
    const MOST: usize = 1024;

    pub(super) fn add(&mut self, qp_num: Qpn, now: Time, is_foreign: bool) {
        if self.list.is_empty() {
            (self.since, self.is_foreign) = (now, false);
        }
        self.is_foreign |= is_foreign;
        if self.list.last() != Some(&qp_num) && self.list.len() < Self::MOST {
            self.list.push(qp_num);
        }
    }

    /// Nothing is owed any more, most likely by the one that was added last.
    pub(super) fn settled(&mut self, qp_num: Qpn) {
        if self.list.last() == Some(&qp_num) {
            self.list.pop();
        }
    }

    /// Takes all, oldest first. `give_back` must follow.
    pub(super) fn take(&mut self) -> Vec<Qpn> {
        std::mem::replace(&mut self.list, std::mem::take(&mut self.spare))
    }

    pub(super) fn give_back(&mut self, mut taken: Vec<Qpn>) {
        taken.clear();
        self.spare = taken;
    }

    /// Whether it was empty last `nanoseconds` before `now`, or longer ago; or by the clock of another device, which is gone.
    pub(super) fn are_older_than(&self, nanoseconds: u64, now: Time) -> bool {
        let (since, now) = (self.since.nanoseconds(), now.nanoseconds());
        now < since || now - since >= nanoseconds
    }

    pub(super) fn is_foreign(&self) -> bool {
        self.is_foreign
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}
