//! Faults injected on a live device: `RDMA_SOFT_FAULT=loss=0.05,dup=0.01,reorder=0.02,corrupt=0.001,seed=7`.

use std::str::FromStr;

/// The name of the variable.
pub(crate) const FAULT_VARIABLE: &str = "RDMA_SOFT_FAULT";

/// How often each fault happens, as probabilities between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct FaultRates {
    pub(crate) loss: f64,
    pub(crate) duplicate: f64,
    pub(crate) reorder: f64,
    pub(crate) corrupt: f64,
    pub(crate) seed: u64,
}

impl FromStr for FaultRates {
    type Err = String;

    fn from_str(text: &str) -> Result<FaultRates, String> {
        let mut rates = FaultRates::default();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| {
                format!("`{item}` has no value; write loss=0.05,dup=0.01,reorder=0.02,corrupt=0.001,seed=7")
            })?;
            if name == "seed" {
                rates.seed = value.parse().map_err(|_| format!("seed={value}: not a whole number"))?;
                continue;
            }
            let rate = value.parse::<f64>().ok().filter(|rate| (0.0..=1.0).contains(rate));
            let rate = rate.ok_or_else(|| format!("{name}={value}: not a probability between 0 and 1"))?;
            match name {
                "loss" => rates.loss = rate,
                "dup" => rates.duplicate = rate,
                "reorder" => rates.reorder = rate,
                "corrupt" => rates.corrupt = rate,
                _ => return Err(format!("`{name}` is none of loss, dup, reorder, corrupt, seed")),
            }
        }
        Ok(rates)
    }
}

/// What happens to one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing: it is delivered.
    None,
    /// It is lost.
    Lose,
    /// It arrives twice.
    Duplicate,
    /// It arrives after the packet behind it.
    Reorder,
    /// One bit arrives flipped; `bit` is taken modulo the packet's length in bits.
    Corrupt {
        /// Which bit, before the modulo.
        bit: u64,
    },
}

/// The source of faults: for the same seed and rates the same sequence.
#[derive(Debug)]
pub(crate) struct Faults {
    rates: FaultRates,
    random: fastrand::Rng,
}

impl Faults {
    pub(crate) fn new(rates: FaultRates) -> Faults {
        Faults { rates, random: fastrand::Rng::with_seed(rates.seed) }
    }

    /// The fate of the next packet; at most one fault at a time.
    pub(crate) fn next(&mut self) -> Fault {
        let FaultRates { loss, duplicate, reorder, corrupt, .. } = self.rates;
        // One draw decides, so that the rates are exact and the sequence depends on nothing else.
        let mut draw = self.random.f64();
        for (rate, fault) in [(loss, Fault::Lose), (duplicate, Fault::Duplicate), (reorder, Fault::Reorder)] {
            if draw < rate {
                return fault;
            }
            draw -= rate;
        }
        if draw < corrupt { Fault::Corrupt { bit: self.random.u64(..) } } else { Fault::None }
    }
}

/// Flips the bit that [`Fault::Corrupt`] names.
pub(crate) fn corrupt(packet: &mut [u8], bit: u64) {
    let bits = packet.len() as u64 * 8;
    if let Some(bit) = bit.checked_rem(bits).and_then(|bit| usize::try_from(bit).ok()) {
        packet[bit / 8] ^= 1 << (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_and_mistakes_are_named() {
        let rates: FaultRates = "loss=0.05,dup=0.01,reorder=0.02,corrupt=0.001,seed=7".parse().unwrap();
        assert_eq!(rates, FaultRates { loss: 0.05, duplicate: 0.01, reorder: 0.02, corrupt: 0.001, seed: 7 });
        assert_eq!("".parse(), Ok(FaultRates::default()));
        for (text, word) in [
            ("loss", "no value"),
            ("loss=2", "probability"),
            ("loss=NaN", "probability"),
            ("gain=0.1", "gain"),
            ("seed=x", "seed"),
        ] {
            let error = text.parse::<FaultRates>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn the_rates_are_kept_and_the_seed_repeats_the_sequence() {
        let rates = FaultRates { loss: 0.1, duplicate: 0.2, reorder: 0.05, corrupt: 0.15, seed: 3 };
        let run = || {
            let mut faults = Faults::new(rates);
            (0..100_000).map(|_| faults.next()).collect::<Vec<_>>()
        };
        let first = run();
        assert_eq!(first, run());
        let share =
            |wanted: fn(&Fault) -> bool| first.iter().filter(|fault| wanted(fault)).count() as f64 / 1e5;
        assert!((share(|f| *f == Fault::Lose) - 0.1).abs() < 0.01);
        assert!((share(|f| *f == Fault::Duplicate) - 0.2).abs() < 0.01);
        assert!((share(|f| *f == Fault::Reorder) - 0.05).abs() < 0.01);
        assert!((share(|f| matches!(f, Fault::Corrupt { .. })) - 0.15).abs() < 0.01);
    }

    #[test]
    fn corruption_flips_one_bit_and_an_empty_packet_has_none() {
        let mut packet = [0_u8; 20];
        corrupt(&mut packet, 20 * 8 + 13);
        assert_eq!(packet.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        assert_eq!(packet[1], 1 << 5);
        corrupt(&mut [], 5);
    }
}
