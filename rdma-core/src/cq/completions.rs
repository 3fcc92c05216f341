//! Where a poll puts what it lends, and how that is handed out.

use std::fmt;
use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit};

use verbs_sys::ibv_wc;

use super::completion::{NOTHING, Opcode, Success, WorkCompletion};
use super::poll::{BATCH, Parked};
use super::status::CompletionError;
use crate::inflight::{Held, HeldList, SimpleSlot, SlotPayload};
use crate::mr::Buffer;

/// What belongs to a completion of one buffer. As large as the completion, so that one is found from the other.
#[repr(C)]
struct Item {
    id: u64,
    buffer: Buffer,
    padding: [MaybeUninit<u64>; 4],
}

const _: () = assert!(size_of::<Item>() == size_of::<WorkCompletion>());

/// Storage for [`CompletionQueue::poll`](crate::CompletionQueue::poll), to be reused.
#[repr(C)]
pub struct Completions {
    /// What each says: the provider writes here. Initialised, for a provider may count what it did not write.
    wcs: [WorkCompletion; BATCH],
    /// And what belongs to it. Written are those that a [`Lot`] counts, until they were handed out.
    items: [MaybeUninit<Item>; BATCH],
    /// Completions that are not of one buffer, or wanted more than to be lent.
    listed: Vec<Parked>,
}

/// What a poll put into `Completions`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lot {
    /// So many places, whose items are written.
    pub(super) simple: usize,
    /// And what is listed.
    pub(super) is_listed: bool,
}

impl Completions {
    /// Empty storage, for as many completions as a poll reads at once; it grows where lists of buffers or completions left
    /// behind by other pollers need more.
    #[must_use]
    pub fn new() -> Completions {
        Completions {
            wcs: [WorkCompletion::of(NOTHING); BATCH],
            items: [const { MaybeUninit::uninit() }; BATCH],
            listed: Vec::new(),
        }
    }

    /// Where the verb writes.
    #[inline(always)]
    pub(super) fn landing(&mut self) -> *mut ibv_wc {
        // `WorkCompletion` is transparent.
        self.wcs.as_mut_ptr().cast()
    }

    /// The place of what belongs to the completion at this place.
    #[inline(always)]
    fn item(wc: *mut WorkCompletion) -> *mut Item {
        const DISTANCE: usize =
            std::mem::offset_of!(Completions, items) - std::mem::offset_of!(Completions, wcs);
        wc.wrapping_byte_add(DISTANCE).cast()
    }

    /// Moves the buffers of the first of `n` completions that the verb wrote to their places, as long as they are simple: as
    /// `claim` says, which gives the slot of a completion. Gives how many.
    #[inline(always)]
    pub(super) fn lend_simple<'q>(
        &mut self,
        n: usize,
        mut claim: impl FnMut(&ibv_wc) -> Option<SimpleSlot<'q, SlotPayload>>,
    ) -> usize {
        let mut wc: *mut WorkCompletion = (&raw mut *self).cast();
        let n = n.min(BATCH);
        let mut left = n;
        while left > 0 {
            // SAFETY: one of ours.
            let Some(slot) = claim(unsafe { (*wc).raw() }) else { break };
            // SAFETY: claimed as simple, and given up.
            let (id, buffer) = unsafe { SlotPayload::take_simple(slot.payload()) };
            slot.release();
            let item = Item { id, buffer, padding: [MaybeUninit::uninit(); 4] };
            // SAFETY: one of ours too, and it holds nothing.
            unsafe { Self::item(wc).write(item) };
            wc = wc.wrapping_add(1);
            left -= 1;
        }
        n - left
    }

    /// As `lend_simple`, but offers each to `take`, and lends from the first one on that it gives back. `None` if it took all, otherwise how
    /// many it took, and how many were simple.
    #[inline(always)]
    pub(super) fn offer_simple<'q>(
        &mut self,
        n: usize,
        mut claim: impl FnMut(&ibv_wc) -> Option<SimpleSlot<'q, SlotPayload>>,
        mut take: impl for<'o> FnMut(Offer<'o>) -> Option<Offer<'o>>,
    ) -> Option<(usize, usize)> {
        let n = n.min(BATCH);
        let mut wc: *mut WorkCompletion = (&raw mut *self).cast();
        let mut left = n;
        while left > 0 {
            // SAFETY: one of ours.
            let Some(slot) = claim(unsafe { (*wc).raw() }) else { return Some((n - left, n - left)) };
            // SAFETY: claimed as simple, and given up.
            let (id, buffer) = unsafe { SlotPayload::take_simple(slot.payload()) };
            slot.release();
            // SAFETY: one of ours; nothing writes it before `take` returns.
            let offer = Offer { id, buffer, completion: unsafe { &*wc } };
            if let Some(Offer { id, buffer, .. }) = take(offer) {
                return Some(self.lend_from(n - left, n, id, buffer, claim));
            }
            wc = wc.wrapping_add(1);
            left -= 1;
        }
        None
    }

    /// Lends a completion, and those behind it. Gives its place, and how many completions are simple.
    #[inline(never)]
    fn lend_from<'q>(
        &mut self,
        place: usize,
        n: usize,
        id: u64,
        buffer: Buffer,
        mut claim: impl FnMut(&ibv_wc) -> Option<SimpleSlot<'q, SlotPayload>>,
    ) -> (usize, usize) {
        self.items[place].write(Item { id, buffer, padding: [MaybeUninit::uninit(); 4] });
        let mut simple = place + 1;
        for wc in &self.wcs[simple..n] {
            let Some(slot) = claim(wc.raw()) else { break };
            // SAFETY: claimed as simple, and given up.
            let (id, buffer) = unsafe { SlotPayload::take_simple(slot.payload()) };
            slot.release();
            self.items[simple].write(Item { id, buffer, padding: [MaybeUninit::uninit(); 4] });
            simple += 1;
        }
        (place, simple)
    }

    /// What the verb wrote, and what is listed of the last lot.
    pub(super) fn parts(&mut self) -> (&mut [WorkCompletion; BATCH], &mut Vec<Parked>) {
        (&mut self.wcs, &mut self.listed)
    }

    /// Hands a lot out, but for the first `taken` of it.
    ///
    /// # Safety
    ///
    /// The last poll gave it, and it is handed out once. The first `taken` of the simple ones, no more than there are, were taken.
    #[inline(always)]
    pub(super) unsafe fn lend(&mut self, lot: Lot, taken: usize) -> Lent<'_> {
        let (listed, listed_left) =
            if lot.is_listed { self.lend_listed() } else { (std::ptr::null_mut(), 0) };
        let first: *mut WorkCompletion = (&raw mut *self).cast();
        Lent {
            wc: first.wrapping_add(taken),
            left: lot.simple - taken,
            listed,
            listed_left,
            storage: PhantomData,
        }
    }

    #[cold]
    fn lend_listed(&mut self) -> (*mut Parked, usize) {
        let listed = self.listed.as_mut_slice();
        (listed.as_mut_ptr(), listed.len())
    }
}

impl Default for Completions {
    fn default() -> Completions {
        Completions::new()
    }
}

impl fmt::Debug for Completions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completions").finish_non_exhaustive()
    }
}

/// The completions of one [`poll`](crate::CompletionQueue::poll). Buffers that nobody takes are dropped with their completion, or with this.
pub struct Lent<'c> {
    /// The next of those of one buffer, of which so many are `left`.
    wc: *mut WorkCompletion,
    left: usize,
    /// The next that is listed, and how many are left.
    listed: *mut Parked,
    listed_left: usize,
    storage: PhantomData<&'c mut Completions>,
}

// SAFETY: it is a borrow of the storage, whose parts are Send.
unsafe impl Send for Lent<'_> {}
// SAFETY: as above; `&Lent` reads plain fields.
unsafe impl Sync for Lent<'_> {}

impl<'c> Iterator for Lent<'c> {
    type Item = Completion<'c>;

    #[inline(always)]
    fn next(&mut self) -> Option<Completion<'c>> {
        if self.left == 0 {
            if self.listed_left == 0 {
                return None;
            }
            let parked = self.listed;
            self.listed_left -= 1;
            self.listed = parked.wrapping_add(1);
            // SAFETY: one of those listed, in the storage that is borrowed for `'c`, and lent once.
            return Some(Completion::of_listed(unsafe { &mut *parked }));
        }
        let wc = self.wc;
        self.left -= 1;
        self.wc = wc.wrapping_add(1);
        // SAFETY: inside the storage: the compiler does not see that, and tests.
        unsafe { std::hint::assert_unchecked(!wc.is_null()) };
        // SAFETY: a place of the storage that is borrowed for `'c`.
        let completion = unsafe { &*wc };
        // SAFETY: as above; the items of a lot are written, and handed out once.
        let Item { id, buffer, .. } = unsafe { Completions::item(wc).read() };
        Some(Completion { id, buffer: ManuallyDrop::new(Some(buffer)), more: None, completion })
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = self.left + self.listed_left;
        (len, Some(len))
    }
}

impl ExactSizeIterator for Lent<'_> {}

impl fmt::Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl FusedIterator for Lent<'_> {}

impl Drop for Lent<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.left > 0 || self.listed_left > 0 {
            let left = std::mem::take(&mut self.left);
            let listed_left = std::mem::take(&mut self.listed_left);
            // By value, so that nothing points to this.
            drop_rest(Lent { wc: self.wc, left, listed: self.listed, listed_left, storage: PhantomData });
        }
    }
}

#[inline(never)]
fn drop_rest(lent: Lent<'_>) {
    lent.for_each(drop);
}

/// A success of a work request of one buffer, on offer to a driver: see
/// [`CompletionQueue::poll_with`](crate::CompletionQueue::poll_with).
pub struct Offer<'o> {
    id: u64,
    buffer: Buffer,
    completion: &'o WorkCompletion,
}

impl<'o> Offer<'o> {
    /// The number given to the work request.
    #[must_use]
    #[inline(always)]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The buffer as it was posted, and what the completion says.
    #[must_use]
    #[inline(always)]
    pub fn into_parts(self) -> (Buffer, Success<'o>, &'o WorkCompletion) {
        (self.buffer, self.completion.as_success(), self.completion)
    }
}

impl fmt::Debug for Offer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer")
            .field("id", &self.id)
            .field("completion", self.completion)
            .finish_non_exhaustive()
    }
}

/// A completion of a work request that was posted with `post_*`: what it says, and its buffers, which are dropped with it unless
/// taken.
pub struct Completion<'a> {
    id: u64,
    /// The first entry of the list, if it is a buffer. Without a `Drop`: that of a `Completion`, which is inlined, sees to it, so
    /// that a completion may stay in registers.
    buffer: ManuallyDrop<Option<Buffer>>,
    /// What else of the list there is, in order.
    more: Option<&'a mut HeldList>,
    completion: &'a WorkCompletion,
}

impl<'a> Completion<'a> {
    #[inline(never)]
    fn of_listed(Parked { completion, id, held }: &'a mut Parked) -> Completion<'a> {
        let buffer = match held.first.take() {
            Some(Held::Buffer(buffer)) => Some(buffer),
            other => {
                held.first = other;
                None
            }
        };
        let has_more = !held.is_empty();
        Completion { id: *id, buffer: ManuallyDrop::new(buffer), more: has_more.then_some(held), completion }
    }
}

impl Completion<'_> {
    /// The number given to the work request.
    #[must_use]
    #[inline]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What it says.
    #[must_use]
    #[inline]
    pub fn completion(&self) -> &WorkCompletion {
        self.completion
    }

    /// What the work request asked for.
    #[must_use]
    #[inline]
    pub fn opcode(&self) -> Opcode {
        self.completion.opcode()
    }

    /// Success, or why not.
    ///
    /// # Errors
    ///
    /// [`CompletionError`].
    #[inline]
    pub fn result(&self) -> Result<Success<'_>, CompletionError> {
        self.completion.result()
    }

    /// Whether [`take_buffer`](Completion::take_buffer) takes all buffers that there are.
    #[must_use]
    #[inline]
    pub fn is_single(&self) -> bool {
        self.more.is_none()
    }

    /// Takes the first buffer of the scatter/gather list (the only one, of most). After a successful
    /// receive it shows what was received.
    #[inline]
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        let mut buffer = self.buffer.take()?;
        if let Some(len) = self.completion.received_len() {
            if let Some(more) = &mut self.more {
                shorten(more, len.saturating_sub(buffer.len()));
            }
            buffer.truncate(len);
        }
        Some(buffer)
    }

    /// Takes all buffers, in the order of the scatter/gather list. After a successful receive they
    /// show what was received.
    pub fn take_buffers(&mut self) -> impl Iterator<Item = Buffer> {
        let first = self.buffer.take().map(Held::Buffer);
        let more = self.more.as_deref_mut().map(std::mem::take).unwrap_or_default();
        self.completion.received(first.into_iter().chain(more))
    }
}

impl Drop for Completion<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        drop(self.buffer.take());
        if let Some(more) = self.more.take() {
            drop_list(more);
        }
    }
}

/// The first buffer went by itself: what is left of the message lies in the others, in order.
#[cold]
fn shorten(list: &mut HeldList, mut left: usize) {
    for held in list.first.iter_mut().chain(&mut list.rest) {
        let offered = held.sge().length as usize;
        let n = left.min(offered);
        left -= n;
        if let Held::Buffer(buffer) = held {
            buffer.truncate(n);
        }
    }
}

#[inline(never)]
fn drop_list(list: &mut HeldList) {
    *list = HeldList::default();
}

impl fmt::Debug for Completion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("id", &self.id)
            .field("completion", self.completion)
            .finish_non_exhaustive()
    }
}
