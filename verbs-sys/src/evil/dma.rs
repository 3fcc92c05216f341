//! The memory that a device may touch: that of work requests whose completion was not delivered.

use core::ptr;
use core::slice;
use std::collections::HashMap;

use crate::bindings::*;

/// A work queue: a queue pair's send or receive queue, or a shared receive queue, by address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queue {
    Send(usize),
    Receive(usize),
    Shared(usize),
}

/// A posted work request.
struct Posted {
    queue: Queue,
    wr_id: u64,
    /// Whether the device writes to its buffers, rather than reads them.
    writes: bool,
    buffers: Vec<ibv_sge>,
}

/// Registered memory, and the work requests that refer to it.
#[derive(Default)]
pub(super) struct Dma {
    /// Start and length, by local key.
    regions: HashMap<u32, (u64, usize)>,
    posted: Vec<Posted>,
}

impl Dma {
    pub(super) fn register(&mut self, region: &ibv_mr) {
        self.regions.insert(region.lkey, (region.addr.expose_provenance() as u64, region.length));
    }

    pub(super) fn deregister(&mut self, lkey: u32) {
        self.regions.remove(&lkey);
    }

    pub(super) fn post(&mut self, queue: Queue, wr_id: u64, writes: bool, buffers: &[ibv_sge]) {
        self.posted.push(Posted { queue, wr_id, writes, buffers: buffers.to_vec() });
    }

    /// The request that was posted last with this identifier was refused after all.
    pub(super) fn refuse(&mut self, queue: Queue, wr_id: u64) {
        if let Some(last) = self.posted.iter().rposition(|p| p.queue == queue && p.wr_id == wr_id) {
            self.posted.remove(last);
        }
    }

    /// A completion was delivered: the device is done with its request, and in a queue that keeps
    /// its order with those before it.
    pub(super) fn complete(&mut self, queue: Queue, wr_id: u64) {
        let Some(last) = self.posted.iter().position(|p| p.queue == queue && p.wr_id == wr_id) else {
            return;
        };
        if matches!(queue, Queue::Shared(_)) {
            self.posted.remove(last);
            return;
        }
        let mut index = 0;
        self.posted.retain(|p| {
            index += 1;
            p.queue != queue || index > last + 1
        });
    }

    /// A queue was emptied or destroyed.
    pub(super) fn forget(&mut self, queue: Queue) {
        self.posted.retain(|p| p.queue != queue);
    }

    /// The buffers that the device may touch: within a region that is still registered.
    fn reachable(&self) -> impl Iterator<Item = (&ibv_sge, bool)> {
        self.posted.iter().flat_map(|p| p.buffers.iter().map(move |sge| (sge, p.writes))).filter(
            |(sge, _)| {
                self.regions.get(&sge.lkey).is_some_and(|&(start, length)| {
                    let end = sge.addr.checked_add(sge.length.into());
                    sge.addr >= start && end.is_some_and(|end| end - start <= length as u64)
                })
            },
        )
    }

    /// Writes to what may be written and reads the rest: the number of bytes.
    ///
    /// # Safety
    ///
    /// What whoever posted and registered promised: the memory is valid, and nobody else uses it
    /// in a way that conflicts, until the completion.
    pub(super) unsafe fn touch(&self) -> u64 {
        let mut bytes = 0;
        for (sge, writes) in self.reachable() {
            let start = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(sge.addr).unwrap_or(0));
            let length = sge.length as usize;
            bytes += u64::from(sge.length);
            if writes {
                // SAFETY: the caller's promise.
                unsafe { ptr::write_bytes(start, super::SCRIBBLE, length) };
            } else {
                // SAFETY: the caller's promise.
                let memory = unsafe { slice::from_raw_parts(start, length) };
                std::hint::black_box(memory.iter().fold(0_u8, |sum, byte| sum ^ byte));
            }
        }
        bytes
    }
}
