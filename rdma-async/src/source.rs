//! What can be sent and written, and how it comes back.

use bytes::Bytes;
use rdma_core::{Buffer, Error, Payload, ProtectionDomain, SharedSlice, inflight::Operation};

use crate::{message::Message, pool::BufferPool};

/// What an operation sends: a [`Buffer`], a list of buffers that are gathered (`[Buffer; N]`, `Vec<Buffer>`), a
/// [`Message`], a [`SharedSlice`], or [`Bytes`]. It comes back with the result. Sealed.
///
/// Nothing is copied, with one exception: [`Bytes`] that do not lie in the connection's pool are not registered, and are
/// copied into a buffer of it (or, when they are too long for one, into memory registered for them alone).
pub trait Source: sealed::Source {}

/// What an operation reads into: a [`Buffer`], a list of buffers that are filled one after the other, or a
/// [`SharedSlice`]. It comes back with the result. Sealed.
pub trait Target: Source {}

impl Source for Buffer {}
impl<const N: usize> Source for [Buffer; N] {}
impl Source for Vec<Buffer> {}
impl Source for Message {}
impl Source for SharedSlice {}
impl Source for Bytes {}

impl Target for Buffer {}
impl<const N: usize> Target for [Buffer; N] {}
impl Target for Vec<Buffer> {}
impl Target for SharedSlice {}

pub(crate) mod sealed {
    use super::{Buffer, BufferPool, Operation, Payload};

    pub trait Source: Sized + Send + Unpin + 'static {
        /// What stays with the future, to make the source again.
        type Kept: Send + Unpin;

        /// Bytes.
        fn len(&self) -> usize;

        /// Splits into what is posted and what is kept; the source itself if it has to be copied first.
        fn split(self, pool: &BufferPool) -> Result<(Payload<'static>, Self::Kept), Self>;

        /// The bytes to copy, and what is kept beside the copy.
        fn copied(self, into: Buffer) -> (Payload<'static>, Self::Kept);

        /// Makes the source again of what was kept and the buffers that came back.
        fn rejoin(kept: Self::Kept, buffers: impl Iterator<Item = Buffer>) -> Self;

        /// Makes the source again in few instructions, if its operation succeeded and the source is of a kind that allows it.
        #[inline]
        fn quickly(kept: Self::Kept, operation: Operation) -> Result<Self, (Self::Kept, Operation)> {
            Err((kept, operation))
        }
    }
}

/// The payload of `source`, copied if it must be.
pub(crate) async fn prepare<S: Source>(
    source: S,
    pool: &BufferPool,
    domain: &ProtectionDomain,
) -> Result<(Payload<'static>, S::Kept), (Error, S)> {
    let source = match source.split(pool) {
        Ok(split) => return Ok(split),
        Err(source) => source,
    };
    if source.len() <= pool.buffer_size() {
        return Ok(source.copied(pool.acquire().await));
    }
    match domain.allocate(source.len()) {
        Ok(region) => Ok(source.copied(region.into_buffer())),
        Err(error) => Err((error, source)),
    }
}

/// The next buffer that came back.
fn next(buffers: &mut impl Iterator<Item = Buffer>) -> Buffer {
    let Some(buffer) = buffers.next() else { unreachable!("a work request gives back the buffers it took") };
    buffer
}

impl sealed::Source for Buffer {
    type Kept = ();

    #[inline]
    fn len(&self) -> usize {
        Buffer::len(self)
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, ()), Self> {
        Ok((self.into(), ()))
    }

    fn copied(self, _: Buffer) -> (Payload<'static>, ()) {
        (self.into(), ())
    }

    fn rejoin((): (), mut buffers: impl Iterator<Item = Buffer>) -> Self {
        next(&mut buffers)
    }

    #[inline]
    fn quickly((): (), operation: Operation) -> Result<Self, ((), Operation)> {
        match operation.try_buffer(|_| ()) {
            Ok((buffer, ())) => Ok(buffer),
            Err(operation) => Err(((), operation)),
        }
    }
}

impl<const N: usize> sealed::Source for [Buffer; N] {
    type Kept = ();

    #[inline]
    fn len(&self) -> usize {
        self.iter().map(Buffer::len).sum()
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, ()), Self> {
        Ok((self.into(), ()))
    }

    fn copied(self, _: Buffer) -> (Payload<'static>, ()) {
        (self.into(), ())
    }

    fn rejoin((): (), mut buffers: impl Iterator<Item = Buffer>) -> Self {
        std::array::from_fn(|_| next(&mut buffers))
    }
}

impl sealed::Source for Vec<Buffer> {
    type Kept = ();

    #[inline]
    fn len(&self) -> usize {
        self.iter().map(Buffer::len).sum()
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, ()), Self> {
        Ok((self.into(), ()))
    }

    fn copied(self, _: Buffer) -> (Payload<'static>, ()) {
        (self.into(), ())
    }

    fn rejoin((): (), buffers: impl Iterator<Item = Buffer>) -> Self {
        buffers.collect()
    }
}

impl sealed::Source for Message {
    /// What came with it.
    type Kept = (Option<u32>, Option<usize>);

    #[inline]
    fn len(&self) -> usize {
        self.buffer.len()
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, Self::Kept), Self> {
        let Message { buffer, imm, written } = self;
        Ok((buffer.into(), (imm, written)))
    }

    fn copied(self, _: Buffer) -> (Payload<'static>, Self::Kept) {
        let Message { buffer, imm, written } = self;
        (buffer.into(), (imm, written))
    }

    fn rejoin((imm, written): Self::Kept, mut buffers: impl Iterator<Item = Buffer>) -> Self {
        Message { buffer: next(&mut buffers), imm, written }
    }

    #[inline]
    fn quickly(kept: Self::Kept, operation: Operation) -> Result<Self, (Self::Kept, Operation)> {
        match operation.try_buffer(|_| ()) {
            Ok((buffer, ())) => Ok(Message { buffer, imm: kept.0, written: kept.1 }),
            Err(operation) => Err((kept, operation)),
        }
    }
}

impl sealed::Source for SharedSlice {
    type Kept = SharedSlice;

    #[inline]
    fn len(&self) -> usize {
        SharedSlice::len(self)
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, SharedSlice), Self> {
        Ok((self.clone().into(), self))
    }

    fn copied(self, _: Buffer) -> (Payload<'static>, SharedSlice) {
        (self.clone().into(), self)
    }

    fn rejoin(kept: SharedSlice, _: impl Iterator<Item = Buffer>) -> Self {
        kept
    }
}

impl sealed::Source for Bytes {
    type Kept = Bytes;

    #[inline]
    fn len(&self) -> usize {
        Bytes::len(self)
    }

    #[inline]
    fn split(self, pool: &BufferPool) -> Result<(Payload<'static>, Bytes), Self> {
        if self.is_empty() {
            return Ok((Payload::empty(), self));
        }
        match pool.payload(&self) {
            Some(payload) => Ok((payload, self)),
            None => Err(self),
        }
    }

    fn copied(self, mut into: Buffer) -> (Payload<'static>, Bytes) {
        into.set_len(self.len());
        into.copy_from_slice(&self);
        (into.into(), self)
    }

    fn rejoin(kept: Bytes, _: impl Iterator<Item = Buffer>) -> Self {
        kept
    }
}
