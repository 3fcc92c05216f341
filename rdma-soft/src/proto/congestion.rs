//! Congestion window of RC: slow start, then one packet more per window, half at a loss.
//!
//! InfiniBand has no such window, since its links do not drop. UDP sockets do: without one a fast sender
//! overruns the receiver's buffer and most of what it sends is lost.

use super::{CongestionConfig, PathMtu};

/// The window, in packets of the path MTU.
#[derive(Debug)]
pub(super) struct Congestion {
    window: u32,
    threshold: u32,
    max: u32,
    /// Packets acknowledged since the window last grew.
    acknowledged: u32,
}

impl Congestion {
    pub(super) fn new(config: &CongestionConfig, mtu: PathMtu) -> Self {
        let packets = |bytes: u32| (bytes / mtu.bytes()).clamp(1, crate::wire::Psn::WINDOW / 2);
        let max = packets(config.max);
        Self { window: packets(config.initial).min(max), threshold: max, max, acknowledged: 0 }
    }

    /// Packets that may be in flight, at least one.
    pub(super) fn window(&self) -> u32 {
        self.window
    }

    pub(super) fn on_ack(&mut self, packets: u32) {
        if self.window < self.threshold {
            self.window = self.window.saturating_add(packets).min(self.max);
            return;
        }
        self.acknowledged = self.acknowledged.saturating_add(packets);
        if self.acknowledged >= self.window {
            self.acknowledged -= self.window;
            self.window = (self.window + 1).min(self.max);
        }
    }

    /// To be called once per flight.
    pub(super) fn on_loss(&mut self) {
        self.window = (self.window / 2).max(1);
        self.threshold = self.window;
        self.acknowledged = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Congestion {
        Congestion::new(
            &CongestionConfig { initial: 8 << 10, max: 64 << 10, read_chunk: 4096 },
            PathMtu::Mtu1024,
        )
    }

    #[test]
    fn grows_to_its_maximum_and_no_further() {
        let mut congestion = window();
        assert_eq!(congestion.window(), 8);
        congestion.on_ack(8);
        assert_eq!(congestion.window(), 16);
        for _ in 0..100 {
            congestion.on_ack(16);
        }
        assert_eq!(congestion.window(), 64);
    }

    #[test]
    fn halves_at_a_loss_and_then_grows_slowly() {
        let mut congestion = window();
        congestion.on_loss();
        assert_eq!(congestion.window(), 4);
        congestion.on_ack(4);
        assert_eq!(congestion.window(), 5);
        for _ in 0..10 {
            congestion.on_loss();
        }
        assert_eq!(congestion.window(), 1);
    }
}
