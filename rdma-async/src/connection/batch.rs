//! Several operations with one doorbell and one signalled completion.

use std::{
    collections::VecDeque,
    future::poll_fn,
    task::{Context, Poll},
};

use rdma_core::{Buffer, PostErrorKind, RemoteSlice, WorkRequest, inflight::Operation};

use super::{Connection, check, transport::Connected};
use crate::{error::OperationError, queue::Waiter};

/// Sends and writes that are posted together, in order: one chain of work requests, one doorbell, and a completion for the last one
/// alone. Made by [`Connection::batch`].
///
/// The send queue may lack the room for all of them; then those that fit are posted, and the others as room comes.
#[derive(Debug)]
#[must_use = "a batch does nothing until it is posted"]
pub struct Batch<'c, T: Connected> {
    connection: &'c Connection<T>,
    requests: Vec<WorkRequest<'static, T>>,
    too_long: Option<OperationError>,
}

/// What is left of a batch while it is carried out.
struct Progress<T: Connected> {
    requests: Vec<WorkRequest<'static, T>>,
    operations: VecDeque<Option<Operation>>,
    buffers: Vec<Buffer>,
    error: Option<OperationError>,
}

impl<'c, T: Connected> Batch<'c, T> {
    pub(super) fn new(connection: &'c Connection<T>) -> Self {
        Batch { connection, requests: Vec::new(), too_long: None }
    }

    /// Adds a [`send`](Connection::send).
    pub fn send(self, buffer: Buffer) -> Self {
        self.message(buffer, WorkRequest::send)
    }

    /// Adds a [`send_with_imm`](Connection::send_with_imm).
    pub fn send_with_imm(self, buffer: Buffer, imm: u32) -> Self {
        self.message(buffer, |buffer| WorkRequest::send_with_imm(buffer, imm))
    }

    /// Adds a [`write`](Connection::write).
    pub fn write(mut self, buffer: Buffer, remote: RemoteSlice) -> Self {
        self.requests.push(WorkRequest::write(buffer, remote));
        self
    }

    /// Adds a [`write_with_imm`](Connection::write_with_imm).
    pub fn write_with_imm(mut self, buffer: Buffer, remote: RemoteSlice, imm: u32) -> Self {
        self.requests.push(WorkRequest::write_with_imm(buffer, remote, imm));
        self
    }

    fn message(mut self, buffer: Buffer, request: impl FnOnce(Buffer) -> WorkRequest<'static, T>) -> Self {
        let (length, limit) = (buffer.len(), self.connection.peer.message_size);
        if length > limit {
            self.too_long.get_or_insert(OperationError::TooLong { length, limit });
        }
        self.requests.push(request(buffer));
        self
    }

    /// Posts all of them and waits for the end of the last one; gives the buffers back, in order.
    ///
    /// # Errors
    ///
    /// The first [`OperationError`]. With [`TooLong`](OperationError::TooLong) nothing was posted; otherwise those before the one
    /// that failed may have been carried out, and those behind it were not.
    ///
    /// # Cancel safety
    ///
    /// A dropped future may have had all, some or none of them carried out.
    pub async fn post(mut self) -> (Result<(), OperationError>, Vec<Buffer>) {
        let link = &*self.connection.link;
        if let Some(error) = self.too_long {
            return (Err(error), buffers(self.requests));
        }
        if let Some(last) = self.requests.pop() {
            let others = self.requests.into_iter().map(WorkRequest::unsignaled);
            self.requests = others.chain([last]).collect();
        }
        let count = self.requests.len();
        let mut progress = Progress {
            operations: VecDeque::with_capacity(count),
            buffers: Vec::with_capacity(count),
            requests: self.requests,
            error: None,
        };
        let mut waiter = Waiter::new(&link.queue.shared);
        let done = poll_fn(|cx| waiter.poll(cx, |cx| progress.poll(self.connection, cx))).await;
        if let Err(error) = done {
            progress.error.get_or_insert(link.fail_queue(&error));
            // The watcher destroys the pair, and with it the operations end.
            poll_fn(|cx| progress.poll(self.connection, Some(cx))).await;
        }
        let Progress { requests, buffers: mut back, error, .. } = progress;
        back.extend(buffers(requests));
        (error.map_or(Ok(()), Err), back)
    }
}

fn buffers<T: Connected>(requests: Vec<WorkRequest<'static, T>>) -> Vec<Buffer> {
    requests.into_iter().flat_map(|request| request.into_payload().into_buffers()).collect()
}

impl<T: Connected> Progress<T> {
    /// Posts what can be, takes what has finished; ready when nothing is in flight and nothing is left to post.
    fn poll(&mut self, connection: &Connection<T>, mut cx: Option<&mut Context<'_>>) -> Poll<()> {
        let link = &*connection.link;
        loop {
            if self.error.is_none() && !self.requests.is_empty() {
                match link.start_batch(&mut self.requests, &mut self.operations) {
                    Ok(()) | Err(OperationError::Post(PostErrorKind::QueueFull)) => {}
                    Err(error) => self.error = Some(error),
                }
            }
            // A finished operation keeps its place in the queue until it is taken, which others of this batch may need.
            let mut taken = false;
            while let Some(first) = self.operations.front_mut() {
                let Poll::Ready(finished) = check(first, cx.as_deref_mut()) else { break };
                self.operations.pop_front();
                taken = true;
                if let Err(error) = finished.result() {
                    link.count_failure(&finished);
                    let error = link.fail(error);
                    self.error.get_or_insert(error);
                } else {
                    link.count_success();
                }
                self.buffers.extend(finished.into_buffers());
            }
            let left = self.error.is_none() && !self.requests.is_empty();
            if self.operations.is_empty() && !left {
                return Poll::Ready(());
            }
            let Some(cx) = &mut cx else { return Poll::Pending };
            if !left || !taken && link.poll_place(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}
