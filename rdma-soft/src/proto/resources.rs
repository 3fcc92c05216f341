//! Responder resources (clause 9.7.5.1.2): the READ and atomic requests that are answered or may be asked for again.

use std::collections::VecDeque;

use crate::wire::Psn;

/// What a remembered request was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// RDMA READ.
    Read { va: u64, rkey: u32, length: u32 },
    /// Atomic operation, with what stood there before it: a duplicate gets the same answer (clause 9.7.5.1.6).
    Atomic { original: u64 },
    /// ATOMIC WRITE: a duplicate is answered and not written again.
    AtomicWrite,
}

/// The part of the responses that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Where the (first or repeated) request began.
    pub(super) begin: Psn,
    /// The next response.
    pub(super) next: Psn,
    /// The PSN after the last response.
    pub(super) end: Psn,
    /// The offset in the message at which the responses end.
    pub(super) end_offset: u32,
}

/// A remembered request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resource {
    pub(super) first: Psn,
    pub(super) packets: u32,
    pub(super) kind: Kind,
    pub(super) pending: Option<Span>,
    /// All responses were sent once: what is pending answers a duplicate.
    pub(super) answered: bool,
}

/// The last `max_dest_rd_atomic` requests, oldest first.
///
/// Responses are sent in the order of the requests, so those that were never answered are the latest.
#[derive(Debug, Default)]
pub(super) struct Resources {
    ring: VecDeque<Resource>,
    capacity: usize,
    /// Requests with responses to send.
    pending: usize,
    /// Requests that were not answered yet.
    unanswered: usize,
}

impl Resources {
    /// Room for `capacity` requests. The latest are kept, and all that were not answered: the peer was promised that.
    pub(super) fn resize(&mut self, capacity: usize) {
        if capacity == self.capacity {
            return;
        }
        self.capacity = capacity;
        self.make_room(0);
        self.ring.shrink_to(capacity);
        // So that no push allocates.
        self.ring.reserve_exact(capacity.saturating_sub(self.ring.len()));
    }

    pub(super) fn clear(&mut self) {
        self.ring.clear();
        self.pending = 0;
        self.unanswered = 0;
    }

    /// Whether responses wait to be sent.
    pub(super) fn any_pending(&self) -> bool {
        self.pending != 0
    }

    /// Forgets all responses that wait.
    pub(super) fn cancel(&mut self) {
        for resource in &mut self.ring {
            resource.pending = None;
        }
        self.pending = 0;
    }

    /// Whether one more request may be outstanding (clause 9.7.5.1.2). A duplicate that is being answered takes
    /// no room: its requester has what it asks for, or it would not send the next.
    pub(super) fn has_room(&self) -> bool {
        self.unanswered < self.capacity
    }

    /// Remembers a request whose responses wait to be sent. There is room.
    pub(super) fn push(&mut self, first: Psn, packets: u32, kind: Kind) {
        self.make_room(1);
        let end_offset = if let Kind::Read { length, .. } = kind { length } else { 0 };
        let span = Span { begin: first, next: first, end: first + packets, end_offset };
        self.ring.push_back(Resource { first, packets, kind, pending: Some(span), answered: false });
        self.pending += 1;
        self.unanswered += 1;
    }

    /// Forgets the oldest answered requests until `more` fit.
    fn make_room(&mut self, more: usize) {
        while self.ring.len() + more > self.capacity
            && let Some(oldest) = self.ring.front()
            && oldest.answered
        {
            self.pending -= usize::from(oldest.pending.is_some());
            self.ring.pop_front();
        }
    }

    /// The request that has `psn` among its responses, the latest if the PSNs went round since an older one.
    pub(super) fn find(&self, psn: Psn) -> Option<(usize, &Resource)> {
        self.ring.iter().enumerate().rev().find(|(_, resource)| psn - resource.first < resource.packets)
    }

    /// Sends the responses of the request at `place` again as `span` says. If a response that is asked for
    /// is still to be sent the request changes nothing.
    pub(super) fn replay(&mut self, place: usize, span: Span) {
        let Some(resource) = self.ring.get_mut(place) else { return };
        match &mut resource.pending {
            Some(pending) if !span.next.is_before(pending.next) && pending.end == span.end => {}
            Some(pending) => *pending = span,
            None => {
                resource.pending = Some(span);
                self.pending += 1;
            }
        }
    }

    /// The oldest request that has a response to send.
    pub(super) fn next_pending(&self) -> Option<(usize, &Resource, Span)> {
        if self.pending == 0 {
            return None;
        }
        let mut places = self.ring.iter().enumerate();
        places.find_map(|(place, resource)| resource.pending.map(|span| (place, resource, span)))
    }

    /// One response of the request at `place` was sent.
    pub(super) fn advance(&mut self, place: usize) {
        let Some(resource) = self.ring.get_mut(place) else { return };
        let Some(span) = &mut resource.pending else { return };
        span.next = span.next.next();
        if span.next == span.end {
            self.unanswered -= usize::from(!std::mem::replace(&mut resource.answered, true));
            self.drop_pending(place);
        }
    }

    /// Forgets the responses of the request at `place` that wait.
    pub(super) fn drop_pending(&mut self, place: usize) {
        if let Some(resource) = self.ring.get_mut(place)
            && resource.pending.take().is_some()
        {
            self.pending -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn atomic(original: u64) -> Kind {
        Kind::Atomic { original }
    }

    fn originals(resources: &Resources) -> Vec<u64> {
        let value = |resource: &Resource| match resource.kind {
            Kind::Atomic { original } => original,
            Kind::Read { .. } | Kind::AtomicWrite => u64::MAX,
        };
        resources.ring.iter().map(value).collect()
    }

    fn sent(resources: &mut Resources) {
        while let Some((place, ..)) = resources.next_pending() {
            resources.advance(place);
        }
    }

    #[test]
    fn oldest_is_forgotten_only_when_answered() {
        let mut resources = Resources::default();
        assert!(!resources.has_room());
        resources.resize(2);
        for n in 0..2 {
            assert!(resources.has_room());
            resources.push(Psn::new(n), 1, atomic(n.into()));
        }
        assert!(!resources.has_room());
        sent(&mut resources);
        assert!(resources.has_room());
        resources.push(Psn::new(2), 1, atomic(2));
        assert_eq!(originals(&resources), [1, 2]);
        assert!(resources.find(Psn::new(0)).is_none());
    }

    /// RDMA/rxe: Fix responder UAF on IB_QP_MAX_DEST_RD_ATOMIC modify_qp
    /// RDMA/rxe: Fix OOB in free_rd_atomic_resources()
    #[test]
    fn resizing_keeps_the_latest_and_what_is_not_answered() {
        let mut resources = Resources::default();
        resources.resize(3);
        for n in 0..5 {
            resources.push(Psn::new(n), 1, atomic(n.into()));
            if n != 4 {
                sent(&mut resources);
            }
        }
        resources.resize(2);
        assert_eq!(originals(&resources), [3, 4]);
        assert!(resources.any_pending());
        resources.resize(4);
        assert_eq!(originals(&resources), [3, 4]);
        resources.push(Psn::new(5), 1, atomic(5));
        resources.push(Psn::new(6), 1, atomic(6));
        resources.resize(1);
        assert_eq!(originals(&resources), [4, 5, 6], "all that was promised");
        assert!(!resources.has_room());
        sent(&mut resources);
        assert!(resources.has_room());
        resources.push(Psn::new(7), 1, atomic(7));
        assert_eq!(originals(&resources), [7]);
        resources.resize(0);
        assert_eq!(originals(&resources), [7]);
        sent(&mut resources);
        assert!(!resources.any_pending() && !resources.has_room());
    }

    #[test]
    fn a_duplicate_takes_no_room() {
        let mut resources = Resources::default();
        resources.resize(1);
        resources.push(Psn::new(0), 1, atomic(0));
        sent(&mut resources);
        let (place, resource) = resources.find(Psn::new(0)).expect("remembered");
        let first = resource.first;
        resources.replay(place, Span { begin: first, next: first, end: first.next(), end_offset: 0 });
        assert!(resources.any_pending() && resources.has_room());
        resources.push(Psn::new(1), 1, atomic(1));
        assert_eq!(originals(&resources), [1]);
        sent(&mut resources);
        assert!(!resources.any_pending());
    }

    /// The PSNs went round once: the answer to the request of this round is given.
    #[test]
    fn the_latest_of_two_rounds_is_found() {
        let mut resources = Resources::default();
        resources.resize(4);
        for round in [10, 20] {
            resources.push(Psn::new(5), 1, atomic(round));
            sent(&mut resources);
        }
        assert!(resources.find(Psn::new(5)).is_some_and(|(_, resource)| resource.kind == atomic(20)));
    }
}
