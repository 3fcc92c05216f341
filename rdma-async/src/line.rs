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
    /// In the order of their tickets. Those who left leave an empty place, at most as many as still stand here.
    rest: VecDeque<Place>,
    empty: usize,
    last: Ticket,
}

#[derive(Debug)]
struct Place {
    /// With `EMPTY` if that one left.
    ticket: Ticket,
    /// `None` once it was called.
    waker: Option<Waker>,
}

/// A bit that no ticket gets to.
const EMPTY: Ticket = 1 << 63;

impl Place {
    fn is_empty(&self) -> bool {
        self.ticket & EMPTY != 0
    }
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
        let place = match &mut self.first {
            Some(first) if first.ticket == *ticket => first,
            _ => {
                let index = self.find(*ticket)?;
                &mut self.rest[index]
            }
        };
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
            let next = if self.rest.is_empty() { None } else { self.next() };
            return std::mem::replace(&mut self.first, next)?.waker;
        }
        self.leave_rest(ticket)
    }

    #[inline(never)]
    fn leave_rest(&mut self, ticket: Ticket) -> Option<Waker> {
        let index = self.find(ticket)?;
        let place = &mut self.rest[index];
        place.ticket |= EMPTY;
        let waker = place.waker.take();
        self.empty += 1;
        self.tidy();
        waker
    }

    /// Where in the rest it stands.
    #[inline(never)]
    fn find(&self, ticket: Ticket) -> Option<usize> {
        let index = self.rest.binary_search_by_key(&ticket, |place| place.ticket & !EMPTY).ok()?;
        (!self.rest[index].is_empty()).then_some(index)
    }

    /// Takes the first of the rest who still stands there.
    #[inline(never)]
    fn next(&mut self) -> Option<Place> {
        while let Some(place) = self.rest.pop_front() {
            if !place.is_empty() {
                self.tidy();
                return Some(place);
            }
            self.empty -= 1;
        }
        None
    }

    /// Drops the empty places when they are the most: what that takes was saved when they were left.
    fn tidy(&mut self) {
        if 2 * self.empty > self.rest.len() {
            self.rest.retain(|place| !place.is_empty());
            self.empty = 0;
        }
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

    /// `count` futures of a line, and the places that they have.
    fn crowd(count: usize) -> (Line, Vec<Ticket>) {
        let mut line = Line::default();
        let tickets = (0..count).map(|_| line.stand_last(&Context::from_waker(Waker::noop()))).collect();
        (line, tickets)
    }

    #[test]
    fn whoever_leaves_from_the_middle_is_passed_over() {
        let cx = Context::from_waker(Waker::noop());
        let (mut line, mut tickets) = crowd(100);
        for step in 0..100 {
            assert!(line.is_turn(tickets[0]));
            let mut ticket = tickets.remove(37 * step % tickets.len());
            line.stand(&mut ticket, &cx);
            assert!(line.leave(&mut ticket).is_some());
            assert_eq!(line.all().count(), tickets.len(), "a waker each");
            tickets.iter_mut().for_each(|ticket| drop(line.stand(ticket, &cx)));
        }
        assert!(line.is_empty() && line.rest.is_empty());
    }

    #[test]
    fn empty_places_do_not_pile_up() {
        let cx = Context::from_waker(Waker::noop());
        let (mut line, _kept) = crowd(3);
        for _ in 0..1000 {
            let mut ticket = line.stand_last(&cx);
            line.stand_last(&cx);
            line.leave(&mut ticket);
            line.leave(&mut line.last.clone());
            assert!(line.rest.len() <= 4, "{line:?}");
        }
    }

    /// Two sizes are compared, each by the shortest of several times.
    #[test]
    fn to_leave_costs_the_same_however_many_wait() {
        let time = |count: usize, is_newest_first: bool| {
            let run = |_| {
                let (mut line, mut tickets) = crowd(count);
                if is_newest_first {
                    tickets.reverse();
                }
                let start = std::time::Instant::now();
                // The first one stays.
                let leaving = tickets.iter_mut().filter(|ticket| **ticket != 1);
                leaving.for_each(|ticket| drop(line.leave(ticket)));
                start.elapsed()
            };
            (0..5).map(run).min().unwrap_or_default()
        };
        for is_newest_first in [true, false] {
            let (few, many) = (time(1000, is_newest_first), time(16_000, is_newest_first));
            assert!(many < 64 * few, "16 times as many take {many:?}, not {few:?}");
        }
    }
}
