//! Copies in and out of registered memory: the only place outside of `abi/` that follows a pointer.
//!
//! The application may read and write registered memory while the device does. So that this is no data
//! race, all words of eight aligned bytes are copied by relaxed atomic loads and stores, and the bytes
//! before the first and after the last such word one by one. A word that both sides use concurrently,
//! as a flag or an atomic's target, is then accessed by one size everywhere.
//!
//! Where the processor has an instruction that moves many words, that does the bulk: it is the same sequence
//! of word-sized accesses, and three times as fast as a loop over atomics.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

const WORD: usize = size_of::<u64>();

/// A range of memory that is valid for reads and writes by atomics.
///
/// Made by `unsafe` code only, which promises that the range stays mapped, and writable where it is
/// written, as long as the value lives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawMemory {
    address: *mut u8,
    len: usize,
    paging: Paging,
}

/// Whether memory is known to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Paging {
    /// It is, as long as it is registered.
    Mapped,
    /// It may come and go (on-demand paging): the kernel copies, and says when there is nothing.
    OnDemand,
}

/// The memory is not there, or not writable.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault;

// SAFETY: it is an address range; all accesses through it are atomic.
unsafe impl Send for RawMemory {}
// SAFETY: as above.
unsafe impl Sync for RawMemory {}

impl RawMemory {
    /// # Safety
    ///
    /// `len` bytes from `address` are mapped as long as this value or a part of it is used, and
    /// writable if [`write`](Self::write) or an atomic is used. Whoever else accesses them at the same
    /// time does it by atomics of the same size, or is not Rust code.
    pub(crate) unsafe fn new(address: *mut u8, len: usize, paging: Paging) -> Self {
        RawMemory { address, len, paging }
    }

    /// `len` bytes from `offset` on, or `None` if they are not all inside.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Option<RawMemory> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| RawMemory { address: self.address.wrapping_add(offset), len, ..*self })
    }

    /// Copies all of it to `out`, which must be as long.
    #[inline]
    pub(crate) fn read(&self, out: &mut [u8]) -> Result<(), Fault> {
        assert_eq!(out.len(), self.len, "the caller cuts both to one length");
        if self.paging == Paging::OnDemand {
            return if crate::sys::copy_from(self.address.addr(), out) { Ok(()) } else { Err(Fault) };
        }
        let head = self.bytes_to_word();
        let (first, rest) = out.split_at_mut(head);
        let mut at = self.address;
        for byte in first {
            *byte = load_byte(at);
            at = at.wrapping_add(1);
        }
        let (words, tail) = rest.as_chunks_mut::<WORD>();
        load_words(at, words);
        at = at.wrapping_add(words.len() * WORD);
        for byte in tail {
            *byte = load_byte(at);
            at = at.wrapping_add(1);
        }
        Ok(())
    }

    /// Copies `bytes`, which must be as long, over all of it.
    ///
    /// The last word or byte is written after all others: programs wait for a message by watching it.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<(), Fault> {
        assert_eq!(bytes.len(), self.len, "the caller cuts both to one length");
        if self.paging == Paging::OnDemand {
            return if crate::sys::copy_to(self.address.addr(), bytes) { Ok(()) } else { Err(Fault) };
        }
        let head = self.bytes_to_word();
        let (first, rest) = bytes.split_at(head);
        let mut at = self.address;
        for byte in first {
            store_byte(at, *byte);
            at = at.wrapping_add(1);
        }
        let (words, tail) = rest.as_chunks::<WORD>();
        if let Some((last, most)) = words.split_last() {
            store_words(at, most);
            at = at.wrapping_add(most.len() * WORD);
            fence(Ordering::Release);
            store_word(at, u64::from_ne_bytes(*last));
            at = at.wrapping_add(WORD);
        }
        fence(Ordering::Release);
        for byte in tail {
            store_byte(at, *byte);
            at = at.wrapping_add(1);
        }
        Ok(())
    }

    /// Replaces the word by `update(word)` atomically and returns what it was; `None` unless this is one
    /// aligned word.
    pub(crate) fn update_word(&self, update: impl Fn(u64) -> u64) -> Option<u64> {
        if self.len != WORD || !self.address.addr().is_multiple_of(WORD) {
            return None;
        }
        if self.paging == Paging::OnDemand {
            // The page is brought in for writing first; a program that unmaps it at this very moment races
            // with its own peer.
            crate::sys::check_mapped(self.address.addr(), WORD, true).ok()?;
        }
        // SAFETY: aligned and eight bytes long, checked above; mapped and writable by `new`'s promise or
        // by the check just made.
        let word = unsafe { AtomicU64::from_ptr(self.address.cast()) };
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |w| Some(update(w))).ok()
    }

    /// Bytes before the first aligned word, or all of them if there is none.
    fn bytes_to_word(&self) -> usize {
        (self.address.addr().wrapping_neg() % WORD).min(self.len)
    }
}

#[inline(always)]
fn load_byte(at: *mut u8) -> u8 {
    // SAFETY: `at` is inside of a `RawMemory`, by the loops above; mapped by `new`'s promise.
    unsafe { AtomicU8::from_ptr(at) }.load(Ordering::Relaxed)
}

#[inline(always)]
fn store_byte(at: *mut u8, value: u8) {
    // SAFETY: as in `load_byte`; writable by `new`'s promise.
    unsafe { AtomicU8::from_ptr(at) }.store(value, Ordering::Relaxed);
}

#[inline(always)]
fn load_word(at: *mut u8) -> u64 {
    // SAFETY: as in `load_byte`, with a whole word before the end; aligned since `bytes_to_word`.
    unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Relaxed)
}

#[inline(always)]
fn store_word(at: *mut u8, value: u64) {
    // SAFETY: as in `load_word`; writable by `new`'s promise.
    unsafe { AtomicU64::from_ptr(at.cast()) }.store(value, Ordering::Relaxed);
}

/// From so many words on the one instruction is faster than a loop.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const MANY_WORDS: usize = 32;

/// Loads all of `words` from `at` on.
fn load_words(mut at: *mut u8, words: &mut [[u8; WORD]]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if words.len() >= MANY_WORDS {
        // SAFETY: the source is inside of a `RawMemory`, aligned, and as long as `words` by the caller; the
        // destination is borrowed for writing.
        return unsafe { move_words(at, words.as_mut_ptr().cast(), words.len()) };
    }
    for word in words {
        *word = load_word(at).to_ne_bytes();
        at = at.wrapping_add(WORD);
    }
}

/// Stores all of `words` from `at` on.
fn store_words(mut at: *mut u8, words: &[[u8; WORD]]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if words.len() >= MANY_WORDS {
        // SAFETY: as in `load_words`, the other way round; writable by `RawMemory::new`'s promise.
        return unsafe { move_words(words.as_ptr().cast(), at, words.len()) };
    }
    for word in words {
        store_word(at, u64::from_ne_bytes(*word));
        at = at.wrapping_add(WORD);
    }
}

/// Moves `count` words, each by one load and one store, in any order.
///
/// # Safety
///
/// `count` words from `from` on are valid for reads and from `to` on for writes. Accesses of others at the
/// same time are atomic and of the same size on the shared side; nobody else uses the other one.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn move_words(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the caller's promise. What the instruction does is what a loop of relaxed atomic loads and
    // stores could do: words move one by one, unordered. The direction flag is clear by the calling
    // convention, and only the three registers change.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") count => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_is_copied_and_nothing_else() {
        for offset in 0..WORD {
            for len in (0..40).chain(250..280).chain([1000]) {
                let mut memory = [0xeeu64; 128].map(u64::to_ne_bytes).concat();
                let source: Vec<u8> = (0..=255).cycle().take(len).collect();
                // SAFETY: inside of `memory`, which outlives it and is not used otherwise meanwhile.
                let region = unsafe { RawMemory::new(memory.as_mut_ptr(), memory.len(), Paging::Mapped) };
                let part = region.part(offset, len).unwrap();
                part.write(&source).unwrap();
                let mut back = vec![0; len];
                part.read(&mut back).unwrap();
                assert_eq!(back, source);
                let untouched = [0xeeu64; 128].map(u64::to_ne_bytes).concat();
                assert_eq!(memory[..offset], untouched[..offset]);
                assert_eq!(memory[offset + len..], untouched[offset + len..]);
            }
        }
    }

    #[test]
    fn parts_stay_inside() {
        let mut memory = [0u8; 16];
        // SAFETY: as above.
        let region = unsafe { RawMemory::new(memory.as_mut_ptr(), memory.len(), Paging::Mapped) };
        assert!(region.part(16, 0).is_some());
        assert!(region.part(16, 1).is_none());
        assert!(region.part(1, usize::MAX).is_none());
    }

    #[test]
    fn words_are_updated_only_when_aligned() {
        let mut memory = [5u64, 6];
        // SAFETY: as above.
        let region = unsafe { RawMemory::new(memory.as_mut_ptr().cast(), 16, Paging::Mapped) };
        assert_eq!(region.part(8, 8).unwrap().update_word(|w| w + 1), Some(6));
        assert_eq!(region.part(4, 8).unwrap().update_word(|w| w + 1), None);
        assert_eq!(region.part(8, 4).unwrap().update_word(|w| w + 1), None);
        assert_eq!(memory, [5, 7]);
    }

    #[test]
    fn memory_on_demand_that_is_not_there_is_a_fault() {
        let mut memory = *b"on demand";
        // SAFETY: on demand: the kernel looks whether it is there.
        let there = unsafe { RawMemory::new(memory.as_mut_ptr(), memory.len(), Paging::OnDemand) };
        let mut out = [0; 9];
        assert_eq!(there.write(b"as wanted"), Ok(()));
        assert_eq!(there.read(&mut out), Ok(()));
        assert_eq!(&out, b"as wanted");
        // SAFETY: as above; nothing is ever mapped at the first page.
        let missing = unsafe { RawMemory::new(std::ptr::without_provenance_mut(64), 8, Paging::OnDemand) };
        assert_eq!(missing.read(&mut [0; 8]), Err(Fault));
        assert_eq!(missing.write(&[0; 8]), Err(Fault));
        assert_eq!(missing.update_word(|w| w), None);
    }
}
