//! What can be sent and written, and how it comes back.

use bytes::Bytes;
use rdma_core::{Buffer, Payload, SharedSlice};

use crate::{
    message::{Message, Note},
    pool::BufferPool,
};

/// What an operation sends: a [`Buffer`], a list of buffers that are gathered (`[Buffer; N]`, `Vec<Buffer>`), a
/// [`Message`], a [`SharedSlice`], or [`Bytes`]. It comes back with the result. Sealed.
///
/// Nothing is copied, with one exception: [`Bytes`] that lie in no live pool of the connection's domain are not registered, and are
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
    use super::{Buffer, BufferPool, Bytes, Payload};

    pub trait Source: Sized + Send + Unpin + 'static {
        /// What stays with the future, to make the source again.
        type Kept: Send + Unpin;

        /// Bytes.
        fn len(&self) -> usize;

        /// Splits into what is posted and what is kept; the source itself if it has to be copied first.
        fn split(self, pool: &BufferPool) -> Result<(Payload<'static>, Self::Kept), Self>;

        /// Its bytes, to copy, if `split` may give it back.
        fn bytes(&self) -> &[u8] {
            &[]
        }

        /// Makes the source again of what was kept and the buffers that came back.
        fn rejoin(kept: Self::Kept, buffers: impl Iterator<Item = Buffer>) -> Self;

        /// What was kept, if it is bytes.
        fn bytes_of(_: Self::Kept) -> Option<Bytes> {
            None
        }

        /// It is one buffer: then `of_buffer` makes it again.
        const IS_BUFFER: bool = false;

        /// As `rejoin`, in fewer instructions, where `IS_BUFFER`.
        #[inline]
        fn of_buffer(_: &Self::Kept, _: Buffer) -> Self {
            unreachable!("not one buffer")
        }
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

    fn rejoin((): (), mut buffers: impl Iterator<Item = Buffer>) -> Self {
        next(&mut buffers)
    }

    const IS_BUFFER: bool = true;

    #[inline]
    fn of_buffer((): &(), buffer: Buffer) -> Self {
        buffer
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

    fn rejoin((): (), buffers: impl Iterator<Item = Buffer>) -> Self {
        buffers.collect()
    }
}

impl sealed::Source for Message {
    /// What came with it.
    type Kept = Note;

    #[inline]
    fn len(&self) -> usize {
        self.buffer.len()
    }

    #[inline]
    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, Self::Kept), Self> {
        let Message { buffer, note } = self;
        Ok((buffer.into(), note))
    }

    fn rejoin(note: Note, mut buffers: impl Iterator<Item = Buffer>) -> Self {
        Message { buffer: next(&mut buffers), note }
    }

    const IS_BUFFER: bool = true;

    #[inline]
    fn of_buffer(&note: &Note, buffer: Buffer) -> Self {
        Message { buffer, note }
    }
}

/// Nothing: for an operation that moves no bytes.
impl sealed::Source for () {
    type Kept = ();

    fn len(&self) -> usize {
        0
    }

    fn split(self, _: &BufferPool) -> Result<(Payload<'static>, ()), Self> {
        Ok((Payload::empty(), ()))
    }

    fn rejoin((): (), _: impl Iterator<Item = Buffer>) -> Self {}
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

    fn bytes(&self) -> &[u8] {
        self
    }

    fn bytes_of(kept: Bytes) -> Option<Bytes> {
        Some(kept)
    }

    fn rejoin(kept: Bytes, _: impl Iterator<Item = Buffer>) -> Self {
        kept
    }
}
