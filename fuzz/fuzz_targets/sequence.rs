//! A sequence of posts, packets, losses, timeouts and state changes into a live pair.
//!
//! Whatever happens, each request completes at most once and in order, each is accounted for at the end, and
//! memory that nobody may access stays as it was.

#![no_main]

#[path = "../../rdma-soft/tests/sim/mod.rs"]
mod sim;

use libfuzzer_sys::fuzz_target;
use rdma_soft::proto::{Attributes, CompletionKind, Data, SendFlags, SendOperation, Sge, State, Time};
use rdma_soft::wire::{Psn, Transport};
use sim::{Pair, PairConfig, Rights, Side, atomic_write, compare_swap, fetch_add, read_from, write_to};

const GUARD: u8 = 0xa5;

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// What one side has posted and seen.
#[derive(Default)]
struct Account {
    next: u64,
    completed: u64,
    receives: u64,
    received: u64,
}

struct World {
    pair: Pair,
    buffers: [Sge; 2],
    guards: [Sge; 2],
    accounts: [Account; 2],
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(setup) = input.byte() else { return };
    let transport = [Transport::Rc, Transport::Rc, Transport::Uc, Transport::Ud][usize::from(setup & 3)];
    let mut config = PairConfig { depth: 8, ..PairConfig::new(transport) };
    config.attributes.retry_count = 2;
    config.attributes.rnr_retry = 2;
    config.attributes.max_dest_rd_atomic = setup >> 2 & 7;
    let mut world = World::new(&config);
    while world.step(&mut input).is_some() {
        world.check();
    }
    world.finish();
});

impl World {
    fn new(config: &PairConfig) -> Self {
        let mut pair = Pair::new(config);
        let register = |side: &mut Side| {
            let buffer = side.host.register(vec![1; 8192], Rights::ALL);
            (buffer, side.host.register(vec![GUARD; 256], Rights::default()))
        };
        let (client, server) = (register(&mut pair.client), register(&mut pair.server));
        Self {
            pair,
            buffers: [client.0, server.0],
            guards: [client.1, server.1],
            accounts: Default::default(),
        }
    }

    fn side(&mut self, index: usize) -> &mut Side {
        if index == 0 { &mut self.pair.client } else { &mut self.pair.server }
    }

    /// Carries out the next command; `None` at the end of the input.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let command = input.byte()?;
        let index = usize::from(command >> 7);
        match command & 0x0f {
            0..=5 => self.post(index, input)?,
            6 | 7 => {
                let length = u32::from(input.byte()?) * 32;
                let id = self.accounts[index].receives;
                self.accounts[index].receives += 1;
                let sge = Sge { length, ..self.buffers[index] };
                self.side(index).host.post_receive(id, &[sge]);
            }
            8 => self.inject(index, input)?,
            9 => {
                let number = self.pair.links[index].sent + u64::from(input.byte()?);
                self.pair.links[index].lose.push(number);
            }
            10 | 11 => {
                for _ in 0..input.byte()? & 0x3f {
                    self.pair.step();
                }
            }
            12 => self.pair.hold_acks = command & 0x10 != 0,
            13 => {
                let now = self.pair.now.nanoseconds() + (u64::from(input.byte()?) << 14);
                self.pair.now = Time::from_nanoseconds(now);
                self.pair.step();
            }
            14 => self.modify(index, input)?,
            _ => self.pair.transmit(),
        }
        Some(())
    }

    fn post(&mut self, index: usize, input: &mut Input<'_>) -> Option<()> {
        let [kind, length, place] = *input.bytes(3).first_chunk()?;
        let local = Sge { length: u32::from(length) * 24, ..self.buffers[index] };
        let mut remote = self.buffers[1 - index];
        remote.addr = remote.addr.wrapping_add(u64::from(place) * 8);
        if kind & 0x80 != 0 {
            remote = self.guards[1 - index];
        }
        let immediate = [kind, length, place, 1];
        let operation = match kind & 0xf {
            0 | 1 => SendOperation::Send,
            2 => SendOperation::SendWithImmediate(immediate),
            3 => SendOperation::SendWithInvalidate(u32::from(place)),
            4 | 5 => write_to(remote),
            6 => SendOperation::WriteWithImmediate { va: remote.addr, rkey: remote.lkey, immediate },
            7 | 8 => read_from(remote),
            9 => compare_swap(remote, 1, 2),
            10 => fetch_add(remote, 1),
            12 => atomic_write(remote),
            11 => SendOperation::LocalInvalidate(u32::from(place)),
            _ => SendOperation::Send,
        };
        let flags = SendFlags::SIGNALED | SendFlags::from_bits_truncate(kind >> 4);
        let sges = if kind & 0xf == 15 { [Sge { lkey: 1, ..local }] } else { [local] };
        let id = self.accounts[index].next;
        if self.side(index).try_post(id, operation, Data::Gather(&sges), flags).is_ok() {
            self.accounts[index].next += 1;
        }
        Some(())
    }

    /// A packet out of nowhere: raw bytes, with the first PSN made to be near what the target expects.
    fn inject(&mut self, index: usize, input: &mut Input<'_>) -> Option<()> {
        let [near, len] = *input.bytes(2).first_chunk()?;
        let mut bytes = input.bytes(usize::from(len)).to_vec();
        if bytes.len() < 12 {
            return Some(());
        }
        let to_server = index == 0;
        let qp = &self.side(1 - index).qp;
        let base = if near & 1 == 0 { qp.receive_psn() } else { qp.send_psn() };
        let psn: Psn = base + u32::from(near >> 1) + (Psn::MODULUS - 16);
        bytes[9..12].copy_from_slice(&psn.value().to_be_bytes()[1..]);
        self.pair.inject(to_server, &bytes);
        Some(())
    }

    fn modify(&mut self, index: usize, input: &mut Input<'_>) -> Option<()> {
        let byte = input.byte()?;
        let now = self.pair.now;
        let side = self.side(index);
        let attributes = Attributes { max_dest_rd_atomic: byte >> 4, ..*side.qp.attributes() };
        let to = [State::Rts, State::Sqd, State::Err, State::Rts][usize::from(byte & 3)];
        let _ = side.qp.modify(now, &mut side.host, to, &attributes);
        Some(())
    }

    fn check(&mut self) {
        for index in 0..2 {
            for completion in self.side(index).host.take(CompletionKind::Send) {
                assert_eq!(completion.wr_id, self.accounts[index].completed, "in order, once");
                self.accounts[index].completed += 1;
            }
            for completion in self.side(index).host.take(CompletionKind::Receive) {
                assert_eq!(completion.wr_id, self.accounts[index].received, "in order, once");
                self.accounts[index].received += 1;
            }
            let guard = self.guards[index];
            if self.side(index).host.regions.iter().any(|region| region.key == guard.lkey) {
                assert_eq!(self.side(index).host.bytes(guard), [GUARD; 256]);
            }
        }
    }

    /// Lets things calm down, then flushes: every request must be accounted for.
    fn finish(&mut self) {
        for _ in 0..2_000 {
            if !self.pair.step() {
                break;
            }
        }
        for index in 0..2 {
            let side = self.side(index);
            side.qp.to_error(&mut side.host);
            assert_eq!(side.qp.poll_timeout(), None);
        }
        self.check();
        for (index, account) in self.accounts.iter().enumerate() {
            assert_eq!(account.completed, account.next, "requests of side {index}");
        }
    }
}
