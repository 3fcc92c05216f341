//! One direction of a wire: rate, delay, and faults drawn from a seed.

use std::collections::{BTreeMap, VecDeque};

use rdma_soft::wire::{Icrc, Ipv4Repr, ROCE_V2_PORT, UdpRepr, UnknownIdentification};

use super::Rng;

/// Fates of packets as probabilities, and time.
#[derive(Debug, Clone, Copy)]
pub struct LinkConfig {
    pub loss: f64,
    pub duplicate: f64,
    /// A packet so chosen is late by up to eight delays.
    pub reorder: f64,
    /// A packet so chosen has one to three bits flipped.
    pub corrupt: f64,
    pub delay_ns: u64,
    /// The receiver looks so much later than a packet arrives, and takes all that has arrived by then before it
    /// answers, as a device does. At zero it takes one packet at a time.
    pub batch_ns: u64,
    pub bytes_per_us: u64,
    /// The receiver sees the IPv4 identification, as on a raw socket. Otherwise it accepts what some
    /// identification explains, and one corrupt packet in 65,536 gets through.
    pub identification_known: bool,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            corrupt: 0.0,
            delay_ns: 5_000,
            batch_ns: 0,
            bytes_per_us: 4_000,
            identification_known: true,
        }
    }
}

#[derive(Debug)]
pub struct Link {
    pub config: LinkConfig,
    /// Packets whose number, counted from 0, is in here are lost; for scripted tests.
    pub lose: Vec<u64>,
    pub sent: u64,
    /// How many of the packets that were sent last are kept in `history`, lost ones included, without ICRC.
    pub keep: usize,
    pub history: VecDeque<Vec<u8>>,
    /// Packets that arrived with a wrong ICRC.
    pub corrupt_dropped: u64,
    rng: Rng,
    /// Packets on their way, by time of arrival and number.
    flying: BTreeMap<(u64, u64), Vec<u8>>,
    number: u64,
    free_at: u64,
}

impl Link {
    pub fn new(config: LinkConfig, seed: u64) -> Self {
        Self {
            config,
            lose: Vec::new(),
            sent: 0,
            keep: 0,
            history: VecDeque::new(),
            corrupt_dropped: 0,
            rng: Rng::new(seed),
            flying: BTreeMap::new(),
            number: 0,
            free_at: 0,
        }
    }

    /// Takes a packet without ICRC.
    pub fn send(&mut self, now: u64, transport: &[u8]) {
        let number = self.sent;
        self.sent += 1;
        if self.keep != 0 {
            if self.history.len() == self.keep {
                self.history.pop_front();
            }
            self.history.push_back(transport.to_vec());
        }
        self.free_at =
            self.free_at.max(now) + (transport.len() as u64 + 62) * 1000 / self.config.bytes_per_us;
        if self.lose.contains(&number) || self.rng.chance(self.config.loss) {
            return;
        }
        let mut bytes = transport.to_vec();
        let random = !self.config.identification_known && self.rng.chance(0.5);
        let identification = if random { self.rng.next() as u16 } else { 0 };
        bytes.extend_from_slice(&icrc(transport, identification).to_bytes());
        let copies = if self.rng.chance(self.config.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            let mut at = self.free_at + self.config.delay_ns;
            if self.rng.chance(self.config.reorder) {
                at += self.rng.below(8 * self.config.delay_ns);
            }
            let mut copy = bytes.clone();
            if self.rng.chance(self.config.corrupt) {
                for _ in 0..=self.rng.below(3) {
                    let bit = self.rng.below(copy.len() as u64 * 8);
                    copy[(bit / 8) as usize] ^= 1 << (bit % 8);
                }
            }
            self.number += 1;
            self.flying.insert((at, self.number), copy);
        }
    }

    /// When the next packet arrives.
    pub fn next_arrival(&self) -> Option<u64> {
        self.flying.first_key_value().map(|((at, _), _)| *at)
    }

    /// When the receiver looks next.
    pub fn next_look(&self) -> Option<u64> {
        self.next_arrival().map(|at| at + self.config.batch_ns)
    }

    /// The next packet that has arrived at `now` with a good ICRC, which is still at its end.
    pub fn receive(&mut self, now: u64) -> Option<Vec<u8>> {
        loop {
            if self.next_arrival()? > now {
                return None;
            }
            let (_, bytes) = self.flying.pop_first()?;
            let (transport, received) = bytes.split_last_chunk()?;
            let (with_zero, received) = (icrc(transport, 0), Icrc::from_bytes(*received));
            let good = if self.config.identification_known {
                with_zero == received
            } else {
                UnknownIdentification::explain(with_zero, received, transport.len()).is_some()
            };
            if good {
                return Some(bytes);
            }
            self.corrupt_dropped += 1;
        }
    }
}

fn icrc(transport: &[u8], identification: u16) -> Icrc {
    let len = transport.len() as u16 + 4 + UdpRepr::LEN as u16;
    let ip = Ipv4Repr {
        traffic_class: 0,
        total_len: len + Ipv4Repr::LEN as u16,
        identification,
        dont_fragment: true,
        hop_limit: 64,
        src: [127, 0, 0, 1],
        dst: [127, 0, 0, 2],
    };
    let udp = UdpRepr { src_port: 0xc000, dst_port: ROCE_V2_PORT, len, checksum: 0 };
    Icrc::ipv4(&ip, &udp, transport)
}
