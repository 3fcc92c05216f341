//! Latency as the field reports it: half of the round trip, in microseconds, by percentiles.

#![allow(
    clippy::cast_possible_truncation,
    reason = "nanoseconds and counts that f64 holds, and a few buckets"
)]

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Round-trip times, kept with three significant digits between 1 ns and 60 s.
#[derive(Debug, Clone)]
pub struct RoundTrips {
    histogram: Histogram<u64>,
}

/// A range of half round trips, in microseconds, and how many fell into it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    /// The shortest.
    pub from: f64,
    /// The next bucket's shortest.
    pub to: f64,
    /// How many.
    pub count: u64,
}

/// Half of some nanoseconds, in microseconds with three decimals.
fn half(nanoseconds: f64) -> f64 {
    (nanoseconds / 2.0).round() / 1000.0
}

impl RoundTrips {
    /// An empty record.
    #[must_use]
    pub fn new() -> RoundTrips {
        let histogram =
            Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are valid constants");
        RoundTrips { histogram }
    }

    /// Adds one round trip. Times beyond a minute count as a minute.
    pub fn record(&mut self, round_trip: Duration) {
        self.histogram.saturating_record(u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX));
    }

    /// How many were recorded.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.histogram.len()
    }

    /// Whether none was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    /// The distribution of half of the round trip.
    #[must_use]
    pub fn half(&self) -> HalfRtt {
        let quantile = |q| half(self.histogram.value_at_quantile(q) as f64);
        HalfRtt {
            min: half(self.histogram.min() as f64),
            p50: quantile(0.50),
            p90: quantile(0.90),
            p99: quantile(0.99),
            p999: quantile(0.999),
            p9999: quantile(0.9999),
            max: half(self.histogram.max() as f64),
            mean: half(self.histogram.mean()),
            stdev: half(self.histogram.stdev()),
        }
    }

    /// All half round trips in at most `most` ranges, each the same factor wider than the one before.
    #[must_use]
    pub fn buckets(&self, most: u32) -> Vec<Bucket> {
        if self.is_empty() {
            return Vec::new();
        }
        let shortest = self.histogram.min().max(1) as f64;
        // What comes next: the longest is inside of the last bucket.
        let beyond = self.histogram.max() as f64 * 1.001 + 1.0;
        // No narrower than the histogram's own resolution.
        let count = ((beyond / shortest).ln() / 1.01_f64.ln()).clamp(1.0, f64::from(most)).floor();
        let factor = (beyond / shortest).powf(1.0 / count);
        let edge = |index: u32| shortest * factor.powi(index.cast_signed());
        let mut before = 0;
        let below = |edge: f64| self.histogram.count_between(0, (edge.ceil() as u64).saturating_sub(1));
        (0..count as u32)
            .map(|index| {
                let last = f64::from(index) + 1.0 >= count;
                let up_to = if last { self.len() } else { below(edge(index + 1)).max(before) };
                let bucket = Bucket {
                    from: edge(index) / 2000.0,
                    to: edge(index + 1) / 2000.0,
                    count: up_to - before,
                };
                before = up_to;
                bucket
            })
            .collect()
    }

    /// The distribution as rows of text with bars.
    #[must_use]
    pub fn histogram(&self) -> String {
        const BAR: f64 = 50.0;
        let buckets = self.buckets(24);
        let longest = buckets.iter().map(|bucket| bucket.count).max().unwrap_or(0).max(1) as f64;
        let mut text = format!("{:>9}   {:<9} {:>9} {:>9}\n", "from us", "to us", "messages", "up to, %");
        let mut sum = 0;
        for Bucket { from, to, count } in buckets {
            sum += count;
            let percent = 100.0 * sum as f64 / self.len() as f64;
            // One message shows, however many others there are.
            let bar = "#".repeat((count as f64 / longest * BAR).ceil() as usize);
            let row = format!("{from:>9.2} - {to:<9.2} {count:>9} {percent:>9.3}  {bar}");
            text = text + row.trim_end() + "\n";
        }
        text
    }
}

impl Default for RoundTrips {
    fn default() -> Self {
        Self::new()
    }
}

/// Half of the round trip in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the fields' names are the percentiles")]
pub struct HalfRtt {
    pub min: f64,
    /// What perftest calls typical.
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub p9999: f64,
    pub max: f64,
    pub mean: f64,
    pub stdev: f64,
}

impl HalfRtt {
    fn columns(&self) -> [(&'static str, f64); 9] {
        [
            ("min", self.min),
            ("p50", self.p50),
            ("p90", self.p90),
            ("p99", self.p99),
            ("p99.9", self.p999),
            ("p99.99", self.p9999),
            ("max", self.max),
            ("mean", self.mean),
            ("stdev", self.stdev),
        ]
    }
}

impl std::fmt::Display for HalfRtt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: String = self.columns().iter().map(|(name, _)| format!("{name:>9}")).collect();
        let values: String = self.columns().iter().map(|(_, value)| format!("{value:>9.2}")).collect();
        write!(f, "{names}\n{values}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up_to_a_millisecond() -> RoundTrips {
        let mut trips = RoundTrips::new();
        (1..=1000).for_each(|microseconds| trips.record(Duration::from_micros(microseconds)));
        trips
    }

    #[test]
    fn percentiles_are_of_half_the_round_trip() {
        let trips = up_to_a_millisecond();
        let half = trips.half();
        assert_eq!(half.min, 0.5);
        assert!((half.p50 - 250.0).abs() < 1.0, "{half:?}");
        assert!((half.p99 - 495.0).abs() < 1.0, "{half:?}");
        assert!((half.max - 500.0).abs() < 1.0, "{half:?}");
        assert!((half.mean - 250.25).abs() < 1.0, "{half:?}");
        assert_eq!(trips.len(), 1000);
    }

    #[test]
    fn buckets_hold_every_message_once() {
        let trips = up_to_a_millisecond();
        for most in [1, 2, 24, 1000] {
            let buckets = trips.buckets(most);
            assert!(buckets.len() <= most as usize);
            assert_eq!(buckets.iter().map(|bucket| bucket.count).sum::<u64>(), 1000);
            assert!(buckets.windows(2).all(|pair| (pair[0].to - pair[1].from).abs() < 1e-9));
        }
        let half_below = trips.buckets(24).iter().filter(|b| b.to <= 250.0).map(|b| b.count).sum::<u64>();
        assert!((400..=500).contains(&half_below), "{half_below}");
        assert!(RoundTrips::new().buckets(24).is_empty());
        let mut one = RoundTrips::new();
        one.record(Duration::from_micros(8));
        assert_eq!(one.buckets(24).len(), 1);
        assert!(one.histogram().contains("100.000"), "{}", one.histogram());
    }
}
