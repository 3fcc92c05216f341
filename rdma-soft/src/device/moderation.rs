//! Moderation: an event of a completion queue that waits for several completions, but not for long.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::Device;
use super::completion_queue::{CompletionQueue, Pushed};
use super::queue_pair::NEVER;
use super::scratch::Wakes;
use crate::proto::Time;

/// How many completions an event waits for, and how long after the first (`man ibv_modify_cq`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moderation {
    /// Zero for as many as come.
    count: u32,
    period: Duration,
}

impl Moderation {
    /// The longest wait, as on common adapters; in microseconds.
    pub(crate) const MAX_PERIOD: u16 = 4095;
    pub(crate) const NONE: Self = Self { count: 1, period: Duration::ZERO };

    /// `period` in microseconds. Zero turns off either limit, both together all of it; a count without a period
    /// waits for the longest one, so that a last completion is not left alone for ever.
    pub(crate) fn new(count: u16, period: u16) -> Self {
        if (count, period) == (0, 0) {
            return Self::NONE;
        }
        let period = if period == 0 { Self::MAX_PERIOD } else { period };
        Self { count: count.into(), period: Duration::from_micros(period.into()) }
    }

    /// Whether the event waits on when `gathered` completions have come.
    pub(super) fn waits_after(&self, gathered: u32) -> bool {
        self.count == 0 || gathered < self.count
    }

    pub(super) fn period(&self) -> Duration {
        self.period
    }
}

/// The queues whose events wait, and until when.
#[derive(Debug, Default)]
pub(super) struct Moderated(Mutex<Vec<(Time, Weak<CompletionQueue>)>>);

impl Device {
    /// The event of a queue waits until `due`: the background thread ends that, within its tick.
    pub(super) fn wait_for_more(&self, cq: &Arc<CompletionQueue>, due: Time) {
        let mut waiting = self.moderated.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push((due, Arc::downgrade(cq)));
        drop(waiting);
        self.expect_timer(due.nanoseconds());
    }

    /// Raises the events that waited long enough; returns when the next one will have.
    pub(super) fn expire_moderated(&self, now: Time, wakes: &mut Wakes) -> u64 {
        let mut waiting = self.moderated.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut earliest = NEVER;
        waiting.retain(|(due, cq)| {
            if now < *due {
                earliest = earliest.min(due.nanoseconds());
                return true;
            }
            if let Some(cq) = cq.upgrade()
                && cq.expire(now) == Pushed::Notify
            {
                wakes.add(&cq);
            }
            false
        });
        earliest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_limit_ends_the_wait_and_there_is_always_one() {
        assert!(!Moderation::NONE.waits_after(1) && !Moderation::new(0, 0).waits_after(1));
        let three = Moderation::new(3, 0);
        assert!(three.waits_after(2) && !three.waits_after(3));
        assert_eq!(three.period(), Duration::from_micros(4095));
        let timed = Moderation::new(0, 50);
        assert!(timed.waits_after(u32::MAX));
        assert_eq!(timed.period(), Duration::from_micros(50));
    }
}
