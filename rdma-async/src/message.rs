//! What `recv` hands out.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use bytes::Bytes;
use rdma_core::{Buffer, Success};

/// A message that arrived: its bytes, in a buffer of the connection's pool, and what came with them.
///
/// It derefs to the bytes. Dropped, its buffer goes back to the pool; turned into a [`Buffer`] it can be changed and
/// sent, turned into [`Bytes`] it can be cloned and sliced.
#[derive(Debug)]
pub struct Message {
    pub(crate) buffer: Buffer,
    pub(crate) note: Note,
}

/// What came with a message. One number, so that a message is moved about in two registers.
#[derive(Clone, Copy)]
pub struct Note(u64);

impl Note {
    pub(crate) const NOTHING: Note = Note(0);

    /// Of a receive.
    #[inline(never)]
    pub(crate) fn of(success: Success<'_>) -> Note {
        Note::new(success.imm(), success.is_write_with_imm().then_some(success.len()))
    }

    /// The lower half is the immediate data; the upper half is 0 without, 1 with it, 2 more than what was written. (A message has 2^31 bytes at
    /// most, IBTA vol. 1, 9.7.1; what claims more counts as that.)
    fn new(imm: Option<u32>, written: Option<usize>) -> Note {
        let upper = match written {
            Some(bytes) => bytes.min(1 << 31) as u64 + 2,
            None => u64::from(imm.is_some()),
        };
        Note(upper << 32 | u64::from(imm.unwrap_or(0)))
    }

    /// The immediate data.
    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    fn to_imm(self) -> Option<u32> {
        (self.0 >> 32 != 0).then_some(self.0 as u32)
    }

    /// The number of bytes written.
    fn to_written(self) -> Option<usize> {
        usize::try_from((self.0 >> 32).checked_sub(2)?).ok()
    }
}

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Note").field("imm", &self.to_imm()).field("written", &self.to_written()).finish()
    }
}

impl Message {
    /// The 32 bits of immediate data that came with it, if the sender gave some.
    #[must_use]
    pub fn imm(&self) -> Option<u32> {
        self.note.to_imm()
    }

    /// For an RDMA write with immediate, the number of bytes written to this side's shared region; the message itself is
    /// empty then.
    #[must_use]
    pub fn written(&self) -> Option<usize> {
        self.note.to_written()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_keeps_what_came() {
        let read = |note: Note| (note.to_imm(), note.to_written());
        assert_eq!(read(Note::NOTHING), (None, None));
        assert_eq!(read(Note::new(None, None)), (None, None));
        for imm in [0, 1, u32::MAX] {
            assert_eq!(read(Note::new(Some(imm), None)), (Some(imm), None));
            for bytes in [0, 1, 1 << 31] {
                assert_eq!(read(Note::new(Some(imm), Some(bytes))), (Some(imm), Some(bytes)));
            }
            assert_eq!(read(Note::new(Some(imm), Some(usize::MAX))), (Some(imm), Some(1 << 31)));
        }
    }
}
