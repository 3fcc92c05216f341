//! Futures that wait for their turn.

use std::{
    collections::VecDeque,
    task::{Context, Waker},
};

/// A place in a [`Line`]; none yet is 0.
pub(crate) type Ticket = u64;

/// Futures in the order of asking. Only the first one is woken; it wakes the next when it leaves.
///
/// It is used under a lock, under which no foreign code may run: wakers are given to the caller, who calls or drops them later.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Mostly one waits, or none.
    first: Option<Place>,
    rest: VecDeque<Place>,
    last: Ticket,
}

#[derive(Debug)]
struct Place {
    ticket: Ticket,
    /// `None` once it was called.
    waker: Option<Waker>,
}

impl Line {
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Whether the future with `ticket` comes first; one without does when nobody waits.
    #[inline(always)]
    pub(crate) fn is_turn(&self, ticket: Ticket) -> bool {
        match &self.first {
            Some(first) => first.ticket == ticket,
            None => true,
        }
    }

    /// Stands in line; gives the place.
    #[inline]
    pub(crate) fn stand_last(&mut self, cx: &Context<'_>) -> Ticket {
        self.last += 1;
        let (ticket, waker) = (self.last, Some(cx.waker().clone()));
        match &mut self.first {
            first @ None => *first = Some(Place { ticket, waker }),
            Some(_) => self.rest.push_back(Place { ticket, waker }),
        }
        ticket
    }

    /// Stands in line, or stays there, with the context's waker. Gives the waker that was there before.
    #[inline]
    pub(crate) fn stand(&mut self, ticket: &mut Ticket, cx: &Context<'_>) -> Option<Waker> {
        if *ticket == 0 {
            *ticket = self.stand_last(cx);
            return None;
        }
        let mut places = self.first.iter_mut().chain(&mut self.rest);
        let place = places.find(|place| place.ticket == *ticket)?;
        match &place.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => place.waker.replace(cx.waker().clone()),
        }
    }

    /// Leaves the line. Gives the waker that was left there.
    #[inline]
    pub(crate) fn leave(&mut self, ticket: &mut Ticket) -> Option<Waker> {
        let ticket = std::mem::take(ticket);
        if self.first.as_ref()?.ticket == ticket {
            return std::mem::replace(&mut self.first, self.rest.pop_front())?.waker;
        }
        let index = self.rest.iter().position(|place| place.ticket == ticket)?;
        self.rest.remove(index)?.waker
    }

    /// As `leave` for the first one, if it was called, and nobody else stands in line.
    #[inline]
    pub(crate) fn leave_empty(&mut self, ticket: &mut Ticket) -> bool {
        let is_last = self.rest.is_empty() && matches!(&self.first, Some(Place { waker: None, .. }));
        if is_last {
            (self.first, *ticket) = (None, 0);
        }
        is_last
    }

    /// The waker of the first one, to be called.
    #[inline(always)]
    pub(crate) fn first(&mut self) -> Option<Waker> {
        self.first.as_mut()?.waker.take()
    }

    /// The wakers of all, to be called.
    pub(crate) fn all(&mut self) -> impl Iterator<Item = Waker> {
        self.first.iter_mut().chain(&mut self.rest).filter_map(|place| place.waker.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_ask_comes_first_and_whoever_leaves_is_not_missed() {
        let cx = Context::from_waker(Waker::noop());
        let mut line = Line::default();
        assert!(line.is_empty() && line.is_turn(0));
        let (mut a, mut b, mut c) = (0, 0, 0);
        for ticket in [&mut a, &mut b, &mut c] {
            assert!(line.stand(ticket, &cx).is_none());
        }
        let before = a;
        line.stand(&mut a, &cx);
        assert_eq!(a, before, "stays where it is");
        assert!(line.is_turn(a) && !line.is_turn(b) && !line.is_turn(0));
        assert!(line.leave(&mut b).is_some());
        assert_eq!(b, 0);
        assert!(line.first().is_some());
        assert!(line.first().is_none(), "called once");
        assert!(line.leave(&mut a).is_none(), "its waker was called");
        assert!(line.is_turn(c));
        assert_eq!(line.all().count(), 1);
        assert!(line.leave_empty(&mut c) && c == 0);
        assert!(line.is_empty());
        assert!(!line.leave_empty(&mut c), "it has left");
        for ticket in [&mut a, &mut b] {
            line.stand(ticket, &cx);
        }
        assert!(!line.leave_empty(&mut a), "not called");
        assert!(line.first().is_some() && !line.leave_empty(&mut a), "not the last");
        line.leave(&mut b);
        assert!(line.leave_empty(&mut a) && line.is_empty());
        assert!(line.leave(&mut c).is_none());
    }
}
