//! What a slot of a work queue keeps.

use std::mem::MaybeUninit;

use super::held::{Held, HeldList, Keep};
use crate::cq::Opcode;
use crate::mr::Buffer;

/// What a slot keeps.
pub(crate) struct SlotPayload {
    /// The first entry of the scatter/gather list, if `held` is not 0; further ones are in
    /// `WorkQueue::more`.
    pub(crate) first: MaybeUninit<Held>,
    pub(crate) meta: Meta,
}

/// What a slot keeps besides its list.
pub(crate) struct Meta {
    /// The caller's number.
    pub(crate) id: u64,
    pub(crate) keep: Option<Keep>,
    /// Position in the queue's order of posting.
    pub(crate) seq: u32,
    /// Entries of the scatter/gather list that the slot owns.
    pub(crate) held: u16,
    pub(crate) opcode: Opcode,
}

impl SlotPayload {
    /// The place of the first entry of the list.
    ///
    /// # Safety
    ///
    /// The caller owns the payload.
    #[inline(always)]
    pub(crate) unsafe fn first(this: *mut SlotPayload) -> *mut Held {
        // SAFETY: a place inside the payload.
        unsafe { &raw mut (*this).first }.cast()
    }

    /// Fills that of a slot to be posted as simple: a buffer and the caller's number, and nothing else.
    ///
    /// # Safety
    ///
    /// The caller owns the payload, which holds nothing.
    #[inline(always)]
    pub(crate) unsafe fn put_simple(this: *mut SlotPayload, id: u64, buffer: Buffer) {
        // SAFETY: the caller's promise.
        let first = unsafe { Self::first(this) }.cast::<Buffer>();
        // SAFETY: the caller's promise; a buffer is smaller than `Held`.
        unsafe { first.write(buffer) };
        // SAFETY: a place inside the payload.
        let place = unsafe { &raw mut (*this).meta.id };
        // SAFETY: the caller's promise.
        unsafe { place.write(id) };
    }

    /// The same of a slot to be posted as placed, which has a position besides.
    ///
    /// # Safety
    ///
    /// As for `put_simple`.
    #[inline(always)]
    pub(crate) unsafe fn put_placed(this: *mut SlotPayload, id: u64, buffer: Buffer, seq: u32) {
        // SAFETY: the caller's promise.
        unsafe { Self::put_simple(this, id, buffer) };
        // SAFETY: a place inside the payload.
        let place = unsafe { &raw mut (*this).meta.seq };
        // SAFETY: the caller's promise.
        unsafe { place.write(seq) };
    }

    /// The position of a slot that was posted as any but simple.
    ///
    /// # Safety
    ///
    /// The caller owns the payload, which was filled so.
    #[inline(always)]
    pub(super) unsafe fn seq(this: *const SlotPayload) -> u32 {
        // SAFETY: a place inside the payload.
        let place = unsafe { &raw const (*this).meta.seq };
        // SAFETY: written by `put_placed`, or with all of `meta`.
        unsafe { place.read() }
    }

    /// Takes that of a slot posted as simple, or as placed.
    ///
    /// # Safety
    ///
    /// The caller owns the payload, filled by `put_simple` or `put_placed`, and gives it up.
    #[inline(always)]
    pub(crate) unsafe fn take_simple(this: *mut SlotPayload) -> (u64, Buffer) {
        // SAFETY: the caller's promise.
        let first = unsafe { Self::first(this) }.cast::<Buffer>();
        // SAFETY: written by `put_simple`, taken once.
        let buffer = unsafe { first.read() };
        // SAFETY: a place inside the payload.
        let place = unsafe { &raw const (*this).meta.id };
        // SAFETY: written by `put_simple`.
        (unsafe { place.read() }, buffer)
    }
}

const _: () = assert!(size_of::<Buffer>() <= size_of::<Held>() && align_of::<Buffer>() <= align_of::<Held>());

/// With the state word beside it, a payload fills a cache line.
const _: () = assert!(size_of::<SlotPayload>() <= 56);

/// What a slot held, taken out.
pub(crate) struct Taken {
    pub(crate) id: u64,
    pub(crate) opcode: Opcode,
    pub(crate) held: HeldList,
    pub(crate) keep: Option<Keep>,
}
