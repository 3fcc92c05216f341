//! Posting several sends as one chain: one call, one doorbell.

use verbs_sys::{ibv_send_flags, ibv_wr_opcode, inline};

use super::inner::QpInner;
use super::post::{SIGNALED, fill, raw_send, take_back};
use super::refusal::{PostErrorKind, refused_chain};
use super::request::{Action, Data, Payload, WorkRequest};
use super::transport::Transport;
use crate::cq::Opcode;
use crate::inflight::{Held, Meta, PostState, Posted, SlotPayload, WorkQueue};

/// A link of a chain that is being built, and what to undo if it is not posted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    slot: u32,
    unsignaled: bool,
    /// Credits it took.
    credits: u32,
    /// The poster's state before it.
    before: (u32, bool),
}

/// Takes the credits for one send; may decide that it is signalled after all. `None`: none left.
///
/// The first of a run of unsignalled sends takes a second credit, for the signalled send that ends the
/// run: so a run can always be ended, however full the completion queue is of others' work.
#[inline(always)]
fn credit(queue: &WorkQueue, post: &mut PostState, flags: &mut u32) -> Option<u32> {
    if *flags & SIGNALED == 0 && (post.unsignaled() + 1) * 2 <= queue.depth() {
        let credits = if post.reserved { 1 } else { 2 };
        if queue.take_credits(credits) {
            post.reserved = true;
            post.set_unsignaled(post.unsignaled() + 1);
            return Some(credits);
        }
    }
    *flags |= SIGNALED;
    if !post.reserved && !queue.take_credits(1) {
        return None;
    }
    post.set_unsignaled(0);
    Some(u32::from(!std::mem::take(&mut post.reserved)))
}

impl QpInner {
    /// Posts requests in order until one cannot be: gives how many were, and why no more. Those that were
    /// posted have lost their memory; `posted` gets their slots.
    pub(crate) fn post_chain<T: Transport>(
        &self,
        requests: &mut [WorkRequest<'_, T>],
        owned: bool,
        mut posted: impl FnMut(u32),
    ) -> (usize, Option<PostErrorKind>) {
        let queue = &*self.sq;
        if owned {
            queue.slots.prepare_owned();
        }
        // Order of slots is order of posting, so the lock is held over the verb.
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        post.count = 0;
        post.links.clear();
        post.sges.clear();
        let mut refusal = None;
        for request in requests.iter_mut() {
            let listed = post.sges.len();
            let added = if request.is_bare() && !owned {
                self.add_bare(post, request)
            } else {
                self.add(post, request, owned)
            };
            if let Err(kind) = added {
                post.sges.truncate(listed);
                refusal = Some(kind);
                break;
            }
        }
        let count = post.count;
        if count == 0 {
            return (0, refusal);
        }
        if refusal.is_some() {
            self.sign_last(post);
        }
        queue.tell_unsignaled(post);
        // The vectors have stopped growing: their addresses hold.
        let mut first = std::ptr::null_mut();
        let mut list = post.sges.as_mut_ptr().wrapping_add(post.sges.len());
        for wr in post.chain[..count].iter_mut().rev() {
            list = list.wrapping_sub(usize::try_from(wr.num_sge).unwrap_or(0));
            (wr.next, wr.sg_list) = (first, list);
            first = wr;
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the pair is live (S-1); the chain is linked and terminated, and valid for the call; the
        // memory it names is held by the slots until the completions (S-2).
        let code = unsafe { inline::ibv_post_send(self.ptr.as_ptr(), first, &raw mut bad) };
        let mut done = count;
        if code != 0 {
            let place = post.chain[..count].iter().position(|wr| std::ptr::eq(wr, bad));
            let kind;
            (done, kind) = refused_chain("ibv_post_send", code, place, count);
            refusal = Some(kind);
            let mut is_spent = false;
            for i in (done..count).rev() {
                self.undo(post, i, &mut requests[i].payload, owned, &mut is_spent);
            }
        }
        post.seq = post.seq.wrapping_add(u32::try_from(done).unwrap_or(0));
        for link in &post.links[..done] {
            posted(link.slot);
        }
        (done, refusal)
    }

    /// As `add`, of a request that is bare, and has no owner.
    #[inline(always)]
    fn add_bare<T: Transport>(
        &self,
        post: &mut PostState,
        request: &mut WorkRequest<'_, T>,
    ) -> Result<(), PostErrorKind> {
        let queue = &*self.sq;
        let Data::One(Held::Buffer(buffer)) = &request.payload.data else { unreachable!("one buffer") };
        let sge = buffer.sge();
        // Written in its place: that of a longer chain before, or a new one.
        let place = post.count;
        if place == post.chain.len() {
            post.chain.push(raw_send());
        }
        let wr = &mut post.chain[place];
        let opcode = match &request.action {
            // What most are, without a call.
            Action::Send => {
                wr.opcode = ibv_wr_opcode::IBV_WR_SEND;
                Opcode::Send
            }
            action => action.describe(self, wr, u64::from(sge.length), true)?,
        };
        let Some(free) = queue.acquire(post) else { return Err(PostErrorKind::QueueFull) };
        let before = (post.unsignaled(), post.reserved);
        let mut flags = request.flags;
        let Some(credits) = credit(queue, post, &mut flags) else {
            queue.slots.set_cursor(&mut post.cursor, free.index());
            return Err(PostErrorKind::QueueFull);
        };
        let unsignaled = flags & SIGNALED == 0;
        let data = std::mem::replace(&mut request.payload.data, Data::None);
        let Data::One(Held::Buffer(buffer)) = data else { unreachable!("one buffer") };
        let seq = post.seq.wrapping_add(u32::try_from(place).unwrap_or(0));
        // SAFETY: the poster; what was there was taken out before the slot was released.
        unsafe { SlotPayload::put_placed(free.payload(), request.id, buffer, seq) };
        let is_apart = !unsignaled && before.0 == 0;
        let opcode = opcode as u8;
        let posted = if is_apart { Posted::Simple(opcode) } else { Posted::Placed(opcode) };
        let wr_id = free.publish(posted.step());
        if unsignaled {
            queue.push_unsignaled(post, wr_id, seq);
        }
        let wr = &mut post.chain[place];
        (wr.wr_id, wr.num_sge, wr.send_flags) = (wr_id.0, 1, flags);
        post.count += 1;
        post.sges.push(sge);
        post.links.push(Link { slot: wr_id.slot(), unsignaled, credits, before });
        Ok(())
    }

    /// Adds one request to the chain, with its slot filled and published.
    #[inline(never)]
    fn add<T: Transport>(
        &self,
        post: &mut PostState,
        request: &mut WorkRequest<'_, T>,
        owned: bool,
    ) -> Result<(), PostErrorKind> {
        let queue = &*self.sq;
        let mut wr = raw_send();
        let (sges, place) = (post.sges.len(), post.count);
        let len = request.payload.list(&mut post.sges, queue.max_sge())?;
        let mut flags = request.flags;
        if let Data::Inline(bytes) = &request.payload.data {
            if bytes.len() > self.capacity.max_inline as usize {
                return Err(PostErrorKind::InlineTooLong {
                    asked: bytes.len(),
                    limit: self.capacity.max_inline,
                });
            }
            flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        let opcode = request.action.describe(self, &mut wr, len, request.payload.is_writable())?;
        let Some(free) = queue.acquire(post) else { return Err(PostErrorKind::QueueFull) };
        let before = (post.unsignaled(), post.reserved);
        let Some(credits) = credit(queue, post, &mut flags) else {
            queue.slots.set_cursor(&mut post.cursor, free.index());
            return Err(PostErrorKind::QueueFull);
        };
        let unsignaled = flags & SIGNALED == 0;
        let seq = post.seq.wrapping_add(u32::try_from(place).unwrap_or(0));
        let data = match request.payload.data {
            // The verb copies these bytes; they stay with the request.
            Data::Inline(bytes) => Data::Inline(bytes),
            _ => std::mem::replace(&mut request.payload.data, Data::None),
        };
        let payload = free.payload();
        // SAFETY: a place inside the payload.
        let first = unsafe { &raw mut (*payload).first };
        // SAFETY: the poster, and `list` checked the length.
        let held = unsafe { Payload { data }.hold(queue, free.index(), first.cast()) };
        // SAFETY: the poster; what was there was taken out before the slot was released.
        unsafe { fill(payload, Meta { id: request.id, keep: request.action.keep(), seq, held, opcode }) };
        let id = free.publish(Posted::new(owned).step());
        if unsignaled {
            queue.push_unsignaled(post, id, seq);
        }
        wr.wr_id = id.0;
        wr.num_sge = i32::try_from(post.sges.len() - sges).unwrap_or(i32::MAX);
        wr.send_flags = flags;
        match post.chain.get_mut(place) {
            Some(reused) => *reused = wr,
            None => post.chain.push(wr),
        }
        post.count += 1;
        post.links.push(Link { slot: id.slot(), unsignaled, credits, before });
        Ok(())
    }

    /// Signals the last request of the chain, with the credit that was kept for the one that ends the run: what would have done so was
    /// refused, and may never be posted. Without it those before would complete with the next send, or never.
    fn sign_last(&self, post: &mut PostState) {
        let (Some(wr), Some(link)) = (post.chain[..post.count].last_mut(), post.links.last_mut()) else {
            return;
        };
        if !std::mem::take(&mut link.unsignaled) {
            return;
        }
        wr.send_flags |= SIGNALED;
        link.credits -= 1;
        self.sq.pop_unsignaled(post);
        self.sq.return_credits(1);
        post.set_unsignaled(0);
        post.reserved = false;
    }

    /// Takes back the `i`th link, the last of those that remain, which the verb did not post. `is_spent`: one of its run behind it completed all
    /// the same, and with it the credit was returned that had been set aside.
    fn undo(
        &self,
        post: &mut PostState,
        i: usize,
        payload: &mut Payload<'_>,
        owned: bool,
        is_spent: &mut bool,
    ) {
        let link = post.links[i];
        if link.unsignaled {
            self.sq.pop_unsignaled(post);
        }
        let (unsignaled, reserved) = link.before;
        post.set_unsignaled(unsignaled);
        let (taken, is_completed) = take_back(&self.sq, post, link.slot, owned);
        // A completion that came all the same has returned one: of those that it took, or the one that was set aside before.
        self.sq.return_credits(link.credits.saturating_sub(u32::from(is_completed)));
        // The one set aside is gone for the rest of the run, which is undone next.
        *is_spent = reserved && (*is_spent || is_completed && link.credits == 0);
        post.reserved = reserved && !*is_spent;
        if !matches!(payload.data, Data::Inline(_)) {
            *payload = taken;
        }
    }
}
