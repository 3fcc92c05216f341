//! The owner's side of a slot.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use verbs_sys::ibv_wc_status;

use super::{Held, HeldList, SlotPayload, WorkQueue};
use crate::Error;
use crate::cq::{CompletionError, Success, WorkCompletion};
use crate::inflight::queue::Kind;
use crate::mr::Buffer;

/// A work request in flight that this handle owns: only it gets the result and the buffers.
///
/// Its completion is found by whoever polls the completion queue. Dropping the handle gives up
/// interest, not memory: the slot keeps the buffers until the completion, then drops them (a buffer
/// with a [home](crate::BufferHome) goes there). Forgetting it costs one slot of the queue.
///
/// `Q` is how it holds its queue: borrowed from the queue pair, or with [`detach`](Operation::detach)
/// for itself. If the queue pair is destroyed or reset, the operation finishes with a flush error.
#[derive(Debug)]
#[must_use = "dropping it discards the result and the buffers"]
pub struct Operation<Q: Deref<Target = WorkQueue> = Arc<WorkQueue>> {
    queue: Q,
    slot: u32,
}

impl<Q: Deref<Target = WorkQueue>> Operation<Q> {
    /// # Safety
    ///
    /// The caller published this slot of `queue` as owned, and makes one operation of it.
    #[inline]
    pub(crate) unsafe fn new(queue: Q, slot: u32) -> Operation<Q> {
        Operation { queue, slot }
    }

    /// The queue it was posted to.
    #[must_use]
    pub fn work_queue(&self) -> &WorkQueue {
        &self.queue
    }

    /// Whether the result is there.
    #[must_use]
    #[inline]
    pub fn is_finished(&self) -> bool {
        self.queue.slots.is_completed(self.slot)
    }

    /// The result if it is there; registers the waker otherwise. It does not poll the completion queue.
    ///
    /// # Panics
    ///
    /// When polled again after it was ready.
    pub fn poll_finished(this: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<Finished> {
        let Some(operation) = this.as_ref() else { panic!("operation polled after it finished") };
        // SAFETY: the handle is the slot's owner.
        match unsafe { operation.queue.slots.poll(operation.slot, cx) } {
            Poll::Ready(()) => match this.take() {
                // SAFETY: it completed.
                Some(operation) => Poll::Ready(unsafe { operation.take() }),
                None => Poll::Pending,
            },
            Poll::Pending => Poll::Pending,
        }
    }

    /// The result if it is there. It does not poll the completion queue.
    ///
    /// # Errors
    ///
    /// The operation itself, when it is still in flight.
    #[inline]
    pub fn try_finish(self) -> Result<Finished, Self> {
        if !self.is_finished() {
            return Err(self);
        }
        // SAFETY: it completed.
        Ok(unsafe { self.take() })
    }

    /// As [`try_finish`](Operation::try_finish), for the common case alone, and faster: an operation of one buffer and nothing else
    /// that succeeded. `read` looks at what the completion says; a buffer received into shows what was received.
    ///
    /// # Errors
    ///
    /// The operation itself, when it is still in flight or of another kind, or failed.
    #[inline]
    pub fn try_buffer<R>(self, read: impl FnOnce(Success<'_>) -> R) -> Result<(Buffer, R), Self> {
        if !self.is_finished() {
            return Err(self);
        }
        let slots = &self.queue.slots;
        // SAFETY: owner of a completed slot, which is given up below.
        let wc = unsafe { slots.result(self.slot) };
        // SAFETY: owner of a completed slot.
        let payload = unsafe { slots.payload(self.slot) };
        // SAFETY: filled before it was published; nobody else has it.
        let SlotPayload { first, meta } = unsafe { &*payload };
        if wc.status != ibv_wc_status::IBV_WC_SUCCESS || meta.held != 1 || meta.keep.is_some() {
            return Err(self);
        }
        // SAFETY: `held` says that it was written.
        if !matches!(unsafe { first.assume_init_ref() }, Held::Buffer(_)) {
            return Err(self);
        }
        let completion = WorkCompletion::success(*wc, meta.opcode);
        let value = read(completion.as_success());
        // SAFETY: written; the slot is given up below, so this is the only one to take it.
        let first = unsafe { first.assume_init_read() };
        let this = ManuallyDrop::new(self);
        // SAFETY: owner, and emptied.
        unsafe { this.queue.slots.release(this.slot) };
        this.queue.wake_after_release();
        // SAFETY: `this` is not used again.
        drop(unsafe { std::ptr::read(&raw const this.queue) });
        let Held::Buffer(mut buffer) = first else { unreachable!("matched above") };
        if let Some(len) = completion.received_len() {
            buffer.truncate(len);
        }
        Ok((buffer, value))
    }

    /// Polls the completion queue until the operation finished.
    ///
    /// Completions of other operations go to their owners; those of `post_*` wait for the next
    /// [`CompletionQueue::poll`](crate::CompletionQueue::poll).
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] with the operation, which stays in flight; a poll that failed.
    pub fn wait(self, limit: Duration) -> Result<Finished, (Error, Self)> {
        let start = Instant::now();
        let mut this = self;
        loop {
            this = match this.try_finish() {
                Ok(finished) => return Ok(finished),
                Err(this) => this,
            };
            let polled = match &this.queue.kind {
                Kind::Send(cq) | Kind::Recv(cq) => cq.dispatch(),
                // Its completion comes on the queue of whichever pair received.
                Kind::Shared => Ok(0),
            };
            match polled {
                Ok(_) if this.is_finished() => {}
                Ok(_) if start.elapsed() >= limit => {
                    return Err((Error::TimedOut { what: "the completion", limit }, this));
                }
                Ok(0) => std::thread::yield_now(),
                Ok(_) => {}
                Err(error) => return Err((error.into(), this)),
            }
        }
    }

    /// # Safety
    ///
    /// The operation completed.
    #[inline]
    unsafe fn take(self) -> Finished {
        let this = ManuallyDrop::new(self);
        // SAFETY: owner of a completed slot, taken once because `self` is gone.
        let finished = unsafe { this.take_parts() };
        // SAFETY: `this` is not used again.
        drop(unsafe { std::ptr::read(&raw const this.queue) });
        finished
    }

    /// # Safety
    ///
    /// The operation completed, and nobody uses the slot afterwards.
    #[inline]
    unsafe fn take_parts(&self) -> Finished {
        let slots = &self.queue.slots;
        // SAFETY: owner of a completed slot.
        let wc = unsafe { slots.take_result(self.slot) };
        // SAFETY: as above.
        let taken = unsafe { self.queue.take(self.slot, None) };
        // SAFETY: owner, and emptied.
        unsafe { slots.release(self.slot) };
        self.queue.wake_after_release();
        let completion = WorkCompletion::new(wc, taken.opcode, &self.queue.health);
        Finished { completion, held: taken.held }
    }
}

/// A work queue borrowed from its queue pair; see [`Operation`].
#[derive(Debug, Clone, Copy)]
pub struct QueueRef<'q>(pub(crate) &'q Arc<WorkQueue>);

impl Deref for QueueRef<'_> {
    type Target = WorkQueue;

    fn deref(&self) -> &WorkQueue {
        self.0
    }
}

impl Operation<QueueRef<'_>> {
    /// The operation by itself, without the borrow.
    #[inline]
    pub fn detach(self) -> Operation {
        let this = ManuallyDrop::new(self);
        Operation { queue: Arc::clone(this.queue.0), slot: this.slot }
    }
}

impl<Q: Deref<Target = WorkQueue>> Drop for Operation<Q> {
    fn drop(&mut self) {
        // SAFETY: the handle is the slot's owner and goes away.
        let ignored = unsafe { self.queue.slots.ignore(self.slot) };
        if !ignored {
            // SAFETY: not ignored means completed.
            drop(unsafe { self.take_parts() });
        }
    }
}

/// A finished operation: how it ended, and its buffers.
#[derive(Debug)]
pub struct Finished {
    completion: WorkCompletion,
    held: HeldList,
}

impl Finished {
    /// The completion.
    #[must_use]
    #[inline]
    pub fn completion(&self) -> &WorkCompletion {
        &self.completion
    }

    /// Success, or why not.
    ///
    /// # Errors
    ///
    /// The status explained.
    #[inline]
    pub fn result(&self) -> Result<Success<'_>, CompletionError> {
        self.completion.result()
    }

    /// The first buffer. After a successful receive it shows the bytes received.
    #[must_use]
    #[inline]
    pub fn into_buffer(mut self) -> Option<Buffer> {
        if !self.held.rest.is_empty() {
            return self.into_buffers().next();
        }
        match self.held.first.take()? {
            Held::Buffer(mut buffer) => {
                if let Some(len) = self.completion.received_len() {
                    buffer.truncate(len);
                }
                Some(buffer)
            }
            Held::Shared(_) | Held::Bytes(_) => None,
        }
    }

    /// All buffers, in the order of the scatter/gather list.
    pub fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        self.completion.received(self.held.into_iter())
    }
}
