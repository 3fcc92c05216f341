//! Responder resources (clause 9.7.5.1.2): the READ and atomic requests that are answered or may be asked for again.

use crate::wire::Psn;

/// What a remembered request was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// RDMA READ.
    Read { va: u64, rkey: u32, length: u32 },
    /// Atomic operation, with what stood there before it: a duplicate gets the same answer (clause 9.7.5.1.6).
    Atomic { original: u64 },
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
}

/// The last `max_dest_rd_atomic` requests, oldest first.
#[derive(Debug, Default)]
pub(super) struct Resources {
    ring: Box<[Option<Resource>]>,
    /// Place of the oldest, where the next goes.
    oldest: usize,
    pending: usize,
}

impl Resources {
    /// Room for `capacity` requests; those remembered most recently are kept.
    pub(super) fn resize(&mut self, capacity: usize) {
        if capacity == self.ring.len() {
            return;
        }
        let mut kept: Vec<_> = self.in_order().filter_map(|place| self.ring[place]).collect();
        kept.drain(..kept.len().saturating_sub(capacity));
        self.pending = kept.iter().filter(|resource| resource.pending.is_some()).count();
        let count = kept.len();
        let mut ring: Vec<_> = kept.into_iter().map(Some).collect();
        ring.resize(capacity, None);
        self.ring = ring.into_boxed_slice();
        self.oldest = if count == capacity { 0 } else { count };
    }

    pub(super) fn clear(&mut self) {
        self.ring.fill(None);
        self.oldest = 0;
        self.pending = 0;
    }

    /// Whether responses wait to be sent.
    pub(super) fn any_pending(&self) -> bool {
        self.pending != 0
    }

    /// Forgets all responses that wait.
    pub(super) fn cancel(&mut self) {
        for resource in self.ring.iter_mut().flatten() {
            resource.pending = None;
        }
        self.pending = 0;
    }

    /// Whether one more request may be outstanding (clause 9.7.5.1.2).
    pub(super) fn has_room(&self) -> bool {
        match self.ring.get(self.oldest) {
            None => false,
            Some(slot) => slot.is_none_or(|resource| resource.pending.is_none()),
        }
    }

    /// Remembers a request whose responses wait to be sent. There is room.
    pub(super) fn push(&mut self, first: Psn, packets: u32, kind: Kind) {
        let end_offset = if let Kind::Read { length, .. } = kind { length } else { 0 };
        let span = Span { begin: first, next: first, end: first + packets, end_offset };
        if let Some(slot) = self.ring.get_mut(self.oldest) {
            *slot = Some(Resource { first, packets, kind, pending: Some(span) });
            self.pending += 1;
            self.oldest = if self.oldest + 1 == self.ring.len() { 0 } else { self.oldest + 1 };
        }
    }

    /// The request that has `psn` among its responses.
    pub(super) fn find(&self, psn: Psn) -> Option<(usize, &Resource)> {
        let place = self.ring.iter().position(|slot| slot.is_some_and(|r| psn - r.first < r.packets))?;
        self.ring[place].as_ref().map(|resource| (place, resource))
    }

    /// Sends the responses of the request at `place` again as `span` says. If a response that is asked for
    /// is still to be sent the request changes nothing.
    pub(super) fn replay(&mut self, place: usize, span: Span) {
        let Some(resource) = &mut self.ring[place] else { return };
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
        self.in_order().find_map(|place| {
            let resource = self.ring[place].as_ref()?;
            resource.pending.map(|span| (place, resource, span))
        })
    }

    /// One response of the request at `place` was sent.
    pub(super) fn advance(&mut self, place: usize) {
        let Some(Some(resource)) = self.ring.get_mut(place) else { return };
        let Some(span) = &mut resource.pending else { return };
        span.next = span.next.next();
        if span.next == span.end {
            resource.pending = None;
            self.pending -= 1;
        }
    }

    fn in_order(&self) -> impl Iterator<Item = usize> + use<> {
        let len = self.ring.len();
        (self.oldest..len).chain(0..self.oldest.min(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn atomic(original: u64) -> Kind {
        Kind::Atomic { original }
    }

    fn originals(resources: &Resources) -> Vec<u64> {
        let in_order = resources.in_order().filter_map(|place| resources.ring[place]);
        in_order
            .map(|resource| match resource.kind {
                Kind::Atomic { original } => original,
                Kind::Read { .. } => u64::MAX,
            })
            .collect()
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
    fn resizing_keeps_the_latest_and_what_is_pending() {
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
        sent(&mut resources);
        resources.push(Psn::new(7), 1, atomic(7));
        assert_eq!(originals(&resources), [4, 5, 6, 7]);
        resources.resize(0);
        assert!(!resources.any_pending() && !resources.has_room());
    }
}
