//! Latency as the field reports it: half of the round trip, in microseconds, by percentiles.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Round-trip times, kept with three significant digits between 1 ns and 60 s.
#[derive(Debug, Clone)]
pub struct RoundTrips {
    histogram: Histogram<u64>,
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
        // A nanosecond of resolution is a thousandth in these units; keep three decimals.
        let half = |nanoseconds: u64| (nanoseconds as f64 / 2.0).round() / 1000.0;
        let quantile = |q| half(self.histogram.value_at_quantile(q));
        HalfRtt {
            min: half(self.histogram.min()),
            p50: quantile(0.50),
            p90: quantile(0.90),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: half(self.histogram.max()),
        }
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
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl std::fmt::Display for HalfRtt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:>9} {:>9} {:>9} {:>9} {:>9} {:>9}", "min", "p50", "p90", "p99", "p99.9", "max")?;
        write!(
            f,
            "{:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
            self.min, self.p50, self.p90, self.p99, self.p999, self.max
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_half_the_round_trip() {
        let mut trips = RoundTrips::new();
        for microseconds in 1..=1000 {
            trips.record(Duration::from_micros(microseconds));
        }
        let half = trips.half();
        assert_eq!(half.min, 0.5);
        assert!((half.p50 - 250.0).abs() < 1.0, "{half:?}");
        assert!((half.p99 - 495.0).abs() < 1.0, "{half:?}");
        assert!((half.max - 500.0).abs() < 1.0, "{half:?}");
        assert_eq!(trips.len(), 1000);
    }
}
