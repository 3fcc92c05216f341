//! How a future waits for its completion: asleep, spinning, or as long awake as lately paid off.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

/// How the futures of a completion queue wait when their completion is not there yet.
///
/// In every mode others get their turn: after 4096 operations, or messages, of a connection that were ready at their first polls, and after 200
/// microseconds in which a future of the queue always found by polling what it waited for, the next one lets the other tasks of its
/// runtime run first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitMode {
    /// Sleep on the completion channel's file descriptor: no processor time while nothing arrives, and the wake-up's
    /// few microseconds on every wait.
    Event,
    /// Poll the queue until the completion is there. A future that polled in vain for [`BUSY_TURN`] lets the other
    /// tasks of its runtime run before it goes on. Lowest latency; keeps a processor busy.
    Busy,
    /// Poll for about twice as long as waits took lately, at most [`MAX_SPIN`], then sleep. A queue whose completions
    /// take longer than that sleeps at once.
    #[default]
    Adaptive,
}

/// Longest time that a [`WaitMode::Busy`] future keeps its thread before other tasks run.
pub const BUSY_TURN: Duration = Duration::from_micros(50);

/// Longest time that a [`WaitMode::Adaptive`] future polls before it sleeps. About what falling asleep and waking up
/// costs, several times over: spinning longer could not pay off.
pub const MAX_SPIN: Duration = Duration::from_micros(50);

/// Shortest time that an adaptive future polls where polling pays off at all.
const MIN_SPIN: Duration = Duration::from_micros(4);

/// Moving average of the time that waits took, from the first look at an empty queue to the completion.
#[derive(Debug)]
pub(crate) struct WaitTimes {
    /// Nanoseconds. Concurrent updates may lose one another: it is an estimate.
    average: AtomicU32,
}

impl WaitTimes {
    /// Waits count at most this much, so that a few short ones after a long pause change the estimate.
    const LONGEST: u32 = 4 * MAX_SPIN.subsec_nanos();

    pub(crate) fn new() -> Self {
        WaitTimes { average: AtomicU32::new(MAX_SPIN.subsec_nanos() / 2) }
    }

    /// Takes a wait into account.
    pub(crate) fn learn(&self, waited: Duration) {
        let waited = u32::try_from(waited.as_nanos()).unwrap_or(u32::MAX).min(Self::LONGEST);
        let average = self.average.load(Relaxed);
        self.average.store(average - average / 8 + waited / 8, Relaxed);
    }

    /// How long to poll before sleeping.
    pub(crate) fn spin(&self) -> Duration {
        let average = Duration::from_nanos(self.average.load(Relaxed).into());
        if average > MAX_SPIN { Duration::ZERO } else { (2 * average).clamp(MIN_SPIN, MAX_SPIN) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_about_twice_as_long_as_waits_take() {
        let times = WaitTimes::new();
        for _ in 0..100 {
            times.learn(Duration::from_micros(10));
        }
        let spin = times.spin();
        assert!(spin > Duration::from_micros(19) && spin < Duration::from_micros(21), "{spin:?}");
    }

    #[test]
    fn does_not_spin_where_waits_are_long_and_starts_again_when_they_shorten() {
        let times = WaitTimes::new();
        assert!(times.spin() > Duration::ZERO);
        let long = (0..).take_while(|_| {
            times.learn(Duration::from_secs(1));
            times.spin() > Duration::ZERO
        });
        assert!(long.count() < 5);
        for _ in 0..1000 {
            times.learn(Duration::from_secs(1));
        }
        let short = (0..).take_while(|_| {
            times.learn(Duration::from_micros(8));
            times.spin() == Duration::ZERO
        });
        assert!(short.count() < 20);
    }

    #[test]
    fn waits_of_no_time_keep_the_shortest_spin() {
        let times = WaitTimes::new();
        for _ in 0..1000 {
            times.learn(Duration::ZERO);
        }
        assert_eq!(times.spin(), MIN_SPIN);
    }
}
