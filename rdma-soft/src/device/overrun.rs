//! Completion queues that overran, and the queue pairs that go down with them.
//!
//! A completion that is lost cannot be made up for: the program would wait for it for ever. So, as adapters do
//! (clause 11.6.3.1), every queue pair of such a queue moves to ERR and raises `IBV_EVENT_QP_FATAL`. The queue pair
//! whose completion it was is locked when that is found, others may be; so the background thread does it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Device;
use super::completion_queue::CompletionQueue;
use super::counters::DeviceCounter;
use super::queue_pair::{QueuePair, with_host};
use super::scratch::Scratch;
use crate::proto::{Acks, Status};

/// Queues whose queue pairs are to fail.
#[derive(Debug, Default)]
pub(super) struct Overruns {
    queues: Mutex<Vec<Arc<CompletionQueue>>>,
    any: AtomicBool,
}

impl Overruns {
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }
}

impl Device {
    /// A completion of this status found no room in its queue.
    pub(super) fn note_overrun(&self, cq: &Arc<CompletionQueue>, first: bool, status: Status) {
        self.counters.count(DeviceCounter::CqOverrun);
        if first {
            cq.raise_overrun();
        }
        // A flush shows that its queue pair failed already.
        if status == Status::WrFlush && !first {
            return;
        }
        let mut queues = self.overruns.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if !queues.iter().any(|known| Arc::ptr_eq(known, cq)) {
            queues.push(Arc::clone(cq));
        }
        drop(queues);
        self.overruns.any.store(true, Ordering::SeqCst);
        self.note_deadline(self.now());
    }

    /// Fails the queue pairs of queues that overran; whether there were any.
    pub(super) fn serve_overruns(&self, scratch: &mut Scratch) -> bool {
        if !self.overruns.any() || !self.overruns.any.swap(false, Ordering::SeqCst) {
            return false;
        }
        let queues =
            std::mem::take(&mut *self.overruns.queues.lock().unwrap_or_else(PoisonError::into_inner));
        let is_user = |qp: &&Arc<QueuePair>| {
            queues.iter().any(|cq| Arc::ptr_eq(cq, &qp.send_cq) || Arc::ptr_eq(cq, &qp.recv_cq))
        };
        let users: Vec<_> = self.queue_pairs().values().filter(is_user).cloned().collect();
        let now = self.now();
        for qp in &users {
            let mut inner = qp.lock();
            with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| machine.fail(&mut host));
            self.settle(qp, inner, Acks::Hold, now, scratch);
        }
        true
    }
}
