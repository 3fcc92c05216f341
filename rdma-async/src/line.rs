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
    places: VecDeque<Place>,
    last: Ticket,
}

#[derive(Debug)]
struct Place {
    ticket: Ticket,
    /// `None` once it was called.
    waker: Option<Waker>,
}

impl Line {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether the future with `ticket` comes first; one without does when nobody waits.
    #[inline]
    pub(crate) fn is_turn(&self, ticket: Ticket) -> bool {
        match self.places.front() {
            Some(first) => first.ticket == ticket,
            None => true,
        }
    }

    /// Stands in line, or stays there, with the context's waker. Gives the waker that was there before.
    pub(crate) fn stand(&mut self, ticket: &mut Ticket, cx: &Context<'_>) -> Option<Waker> {
        let place = self.places.iter_mut().find(|place| place.ticket == *ticket);
        match place {
            Some(Place { waker: Some(waker), .. }) if waker.will_wake(cx.waker()) => None,
            Some(place) => place.waker.replace(cx.waker().clone()),
            None => {
                self.last += 1;
                *ticket = self.last;
                self.places.push_back(Place { ticket: self.last, waker: Some(cx.waker().clone()) });
                None
            }
        }
    }

    /// Leaves the line. Gives the waker that was left there.
    pub(crate) fn leave(&mut self, ticket: &mut Ticket) -> Option<Waker> {
        let ticket = std::mem::take(ticket);
        if self.places.front().is_some_and(|first| first.ticket == ticket) {
            return self.places.pop_front()?.waker;
        }
        let index = self.places.iter().position(|place| place.ticket == ticket)?;
        self.places.remove(index)?.waker
    }

    /// The waker of the first one, to be called.
    #[inline]
    pub(crate) fn first(&mut self) -> Option<Waker> {
        self.places.front_mut()?.waker.take()
    }

    /// The wakers of all, to be called.
    pub(crate) fn all(&mut self) -> impl Iterator<Item = Waker> {
        self.places.iter_mut().filter_map(|place| place.waker.take())
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
        line.leave(&mut c);
        assert!(line.is_empty());
        assert!(line.leave(&mut c).is_none());
    }
}
