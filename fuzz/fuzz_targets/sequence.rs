//! A sequence of posts, packets, losses, timeouts and state changes into a live pair.
//!
//! Packets come from the pair itself, through links that may lose, repeat, delay and corrupt them; from the input as
//! they stand; and from what was sent before, again or changed in one place, which gets past more checks.
//!
//! Whatever happens, each request completes at most once and in order, each is accounted for at the end, and
//! memory that nobody may access stays as it was.

#![no_main]

#[path = "../../rdma-soft/tests/sim/mod.rs"]
mod sim;

use libfuzzer_sys::fuzz_target;
use rdma_soft::proto::{
    Attributes, BindRequest, CompletionKind, CongestionConfig, Data, PathMtu, SendFlags, SendOperation, Sge,
    State, Time,
};
use rdma_soft::wire::{Psn, Transport};
use sim::{
    LinkConfig, Pair, PairConfig, Rights, Side, atomic_write, bring_up, compare_swap, fetch_add, read_from,
    write_to,
};

const GUARD: u8 = 0xa5;
/// Packets of each direction that can be sent again.
const HISTORY: usize = 16;

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
    if setup & 0x20 != 0 {
        config.mtu = PathMtu::Mtu256;
    }
    if setup & 0x40 != 0 {
        // A window that closes, and READs in pieces.
        config.congestion = CongestionConfig { initial: 1024, max: 4096, read_chunk: 1024 };
    }
    if setup & 0x80 != 0 {
        config.link =
            LinkConfig { loss: 0.1, duplicate: 0.1, reorder: 0.2, corrupt: 0.05, ..LinkConfig::default() };
        config.seed = u64::from(setup);
    }
    let mut world = World::new(&config);
    while world.step(&mut input).is_some() {
        world.check();
    }
    world.finish();
});

impl World {
    fn new(config: &PairConfig) -> Self {
        let mut pair = Pair::new(config);
        pair.links.iter_mut().for_each(|link| link.keep = HISTORY);
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
            0..=4 => self.post(index, input)?,
            5 => self.again(index, input)?,
            6 | 7 => {
                let length = u32::from(input.byte()?) * 32;
                if self.side(index).qp.state() == State::Err {
                    // Nobody would flush it.
                    return Some(());
                }
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
            11 => SendOperation::LocalInvalidate(u32::from(place)),
            12 => atomic_write(remote),
            13 => SendOperation::BindWindow(BindRequest {
                window: if length == 0 { u32::MAX } else { length.into() },
                rkey: place.into(),
                lkey: local.lkey,
                access: 0,
                addr: local.addr,
                length: local.length.into(),
            }),
            _ => SendOperation::Send,
        };
        let flags = SendFlags::SIGNALED | SendFlags::from_bits_truncate(kind >> 4);
        let sges = if kind & 0xf == 15 { [Sge { lkey: 1, ..local }] } else { [local] };
        let inline = vec![place; usize::from(length)];
        let data = if kind & 0xf == 14 { Data::Inline(&[&inline]) } else { Data::Gather(&sges) };
        let id = self.accounts[index].next;
        if self.side(index).try_post(id, operation, data, flags).is_ok() {
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

    /// One of the last packets again, as it was or changed in one place, to where it went or back to its sender.
    fn again(&mut self, index: usize, input: &mut Input<'_>) -> Option<()> {
        let [which, how, place, value] = *input.bytes(4).first_chunk()?;
        let history = &self.pair.links[index].history;
        let Some(sent) = history.iter().rev().nth(usize::from(which) % HISTORY) else { return Some(()) };
        let mut bytes = sent.clone();
        match how & 3 {
            0 => {}
            // Another operation of the same transport.
            1 => bytes[0] = bytes[0] & 0xe0 | value & 0x1f,
            // Another PSN, not far away.
            2 => {
                let psn = Psn::new(u32::from_be_bytes([0, bytes[9], bytes[10], bytes[11]]))
                    + u32::from(value)
                    + (Psn::MODULUS - 128);
                bytes[9..12].copy_from_slice(&psn.value().to_be_bytes()[1..]);
            }
            // Something in the headers or the first bytes behind them.
            _ => {
                let place = usize::from(place) % bytes.len().min(48);
                bytes[place] = value;
            }
        }
        if how & 8 != 0 {
            bytes.truncate(bytes.len() - usize::from(place) % bytes.len());
        }
        bytes.extend_from_slice(&[0; 4]);
        let to_server = (index == 0) ^ (how & 4 != 0);
        self.pair.inject(to_server, &bytes);
        Some(())
    }

    fn modify(&mut self, index: usize, input: &mut Input<'_>) -> Option<()> {
        let byte = input.byte()?;
        let now = self.pair.now;
        if byte & 3 == 3 {
            self.reconnect(index);
            return Some(());
        }
        let side = self.side(index);
        let attributes = Attributes { max_dest_rd_atomic: byte >> 4, ..*side.qp.attributes() };
        let to = [State::Rts, State::Sqd, State::Err][usize::from(byte & 3)];
        let _ = side.qp.modify(now, &mut side.host, to, &attributes);
        Some(())
    }

    /// RESET, which forgets all work, and from there to RTS with the PSNs that the other side is at.
    fn reconnect(&mut self, index: usize) {
        self.check();
        let now = self.pair.now;
        let other = &self.side(1 - index).qp;
        let (receive_psn, send_psn) = (other.send_psn(), other.receive_psn());
        let side = self.side(index);
        let attributes = Attributes { receive_psn, send_psn, ..*side.qp.attributes() };
        side.qp.modify(now, &mut side.host, State::Reset, &attributes).expect("from every state");
        side.host.forget();
        side.host.receives.clear();
        bring_up(&mut side.qp, now, &mut side.host, &attributes);
        let account = &mut self.accounts[index];
        account.completed = account.next;
        account.received = account.receives;
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
            assert_eq!(account.received, account.receives, "receives of side {index}");
        }
    }
}
