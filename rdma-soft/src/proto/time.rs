//! Time as the state machines see it.

use std::ops::Add;
use std::time::Duration;

/// A point on a monotonic clock whose zero the caller chose, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(u64);

impl Time {
    /// The zero of the clock.
    pub const ZERO: Self = Self(0);

    /// The point `nanoseconds` after zero.
    #[must_use]
    pub const fn from_nanoseconds(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds after zero.
    #[must_use]
    pub const fn nanoseconds(self) -> u64 {
        self.0
    }

    /// The point so many nanoseconds later.
    pub(super) const fn after(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }

    /// Time from `earlier` to `self`; zero if it is not earlier.
    #[must_use]
    pub const fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        self.after(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }
}
