//! What `recv` hands out.

use std::ops::{Deref, DerefMut};

use bytes::Bytes;
use rdma_core::Buffer;

/// A message that arrived: its bytes, in a buffer of the connection's pool, and what came with them.
///
/// It derefs to the bytes. Dropped, its buffer goes back to the pool; turned into a [`Buffer`] it can be changed and
/// sent, turned into [`Bytes`] it can be cloned and sliced.
#[derive(Debug)]
pub struct Message {
    pub(crate) buffer: Buffer,
    pub(crate) imm: Option<u32>,
    pub(crate) written: Option<u32>,
}

impl Message {
    /// The 32 bits of immediate data that came with it, if the sender gave some.
    #[must_use]
    pub fn imm(&self) -> Option<u32> {
        self.imm
    }

    /// For an RDMA write with immediate, the number of bytes written to this side's shared region; the message itself is
    /// empty then.
    #[must_use]
    pub fn written(&self) -> Option<usize> {
        self.written.map(|bytes| bytes as usize)
    }

    /// The buffer that shows the message's bytes; no allocation.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }

    /// The message as [`Bytes`]; the buffer goes back to its pool when their last clone is dropped. One allocation.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self.buffer)
    }
}

impl Deref for Message {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

impl DerefMut for Message {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
