//! Mixed operations in both directions at once, over a network that batches, delays, repeats and loses, with receivers
//! that are ready or late. Every byte, immediate datum, atomic and order of completions is checked.

#![allow(clippy::cast_possible_truncation, reason = "small numbers of a test")]

mod sim;

use std::collections::BTreeMap;

use rdma_soft::proto::{
    Acks, Completion, CompletionKind, Data, Event, ImmediateOrKey, MAX_PACKET_LEN, PacketMeta, PathMtu,
    SendFlags, SendOperation, Sge, Status, Time,
};
use rdma_soft::wire::Packet;
use sim::{PairConfig, Rights, Rng, Side, TestHost, connect};

/// The longest message, and the places for messages of each kind.
const ROOM: u64 = 33_000;
const SLOTS: u64 = 32;
/// Operations per side.
const TOTAL: usize = 60;
const DEPTH: u32 = 16;
const SIZES: [u32; 11] = [0, 1, 255, 256, 257, 1024, 4095, 4096, 4097, 9000, 33_000];

#[derive(Debug, Clone, Copy)]
struct Network {
    loss: f64,
    duplicate: f64,
    reorder: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Send,
    SendWithImmediate,
    Write,
    WriteWithImmediate,
    Read,
    FetchAdd,
}

const KINDS: [Kind; 6] =
    [Kind::Send, Kind::SendWithImmediate, Kind::Write, Kind::WriteWithImmediate, Kind::Read, Kind::FetchAdd];

/// A posted operation: bytes `shift..shift + size` of a source.
#[derive(Debug, Clone, Copy)]
struct Planned {
    kind: Kind,
    size: u32,
    shift: u64,
}

/// One side, its buffers and its accounts.
struct Party {
    side: Side,
    /// Read by its own SENDs and WRITEs, and by the peer's READs.
    source: Sge,
    /// Written by the peer's WRITEs, by its own READs, and by SENDs.
    written: Sge,
    read: Sge,
    received: Sge,
    word: Sge,
    results: Sge,
    plan: Vec<Planned>,
    completed: usize,
    atomics: u64,
    receives_posted: u64,
    receives_done: u64,
}

fn slot(of: Sge, n: u64, length: u32) -> Sge {
    Sge { addr: of.addr + n % SLOTS * ROOM, length, ..of }
}

impl Party {
    fn new(config: &PairConfig, number: u32) -> Self {
        let mut host = TestHost::new();
        let qp = connect(config, 17 + number, 18 - number, &mut host);
        let bytes = (0..ROOM + 1000).map(|n| (n * 13 + n / 256 * 7 + u64::from(number)) as u8).collect();
        let mut register = |bytes| host.register(bytes, Rights::ALL);
        let source = register(bytes);
        let [written, read, received] = [(); 3].map(|()| register(vec![0; (ROOM * SLOTS) as usize]));
        let word = register(vec![0; 8]);
        let results = register(vec![0xff; 8 * SLOTS as usize]);
        Self {
            side: Side { qp, host },
            source,
            written,
            read,
            received,
            word,
            results,
            plan: vec![],
            completed: 0,
            atomics: 0,
            receives_posted: 0,
            receives_done: 0,
        }
    }

    fn post_receive(&mut self) {
        let place = slot(self.received, self.receives_posted, ROOM as u32);
        self.side.host.post_receive(self.receives_posted, &[place]);
        self.receives_posted += 1;
    }

    /// The bytes of the source that an operation carries.
    fn message(&self, planned: Planned) -> &[u8] {
        let addr = self.source.addr + planned.shift;
        self.side.host.bytes(Sge { addr, length: planned.size, ..self.source })
    }

    fn post(&mut self, peer: &Self, rng: &mut Rng) {
        let planned = Planned {
            kind: KINDS[rng.below(6) as usize],
            size: SIZES[rng.below(11) as usize],
            shift: rng.below(1000),
        };
        let id = self.plan.len() as u64;
        let immediate = (id as u32).to_be_bytes();
        let own = Sge { addr: self.source.addr + planned.shift, length: planned.size, ..self.source };
        let (va, rkey) = (slot(peer.written, id, 0).addr, peer.written.lkey);
        let (operation, sge) = match planned.kind {
            Kind::Send => (SendOperation::Send, own),
            Kind::SendWithImmediate => (SendOperation::SendWithImmediate(immediate), own),
            Kind::Write => (SendOperation::Write { va, rkey }, own),
            Kind::WriteWithImmediate => (SendOperation::WriteWithImmediate { va, rkey, immediate }, own),
            Kind::Read => {
                let va = peer.source.addr + planned.shift;
                (SendOperation::Read { va, rkey: peer.source.lkey }, slot(self.read, id, planned.size))
            }
            Kind::FetchAdd => {
                let result = Sge { addr: self.results.addr + id % SLOTS * 8, length: 8, ..self.results };
                (sim::fetch_add(peer.word, 1), result)
            }
        };
        let fence = if rng.chance(0.2) { SendFlags::FENCE } else { SendFlags::empty() };
        self.side
            .try_post(id, operation, Data::Gather(&[sge]), SendFlags::SIGNALED | fence)
            .expect("there is room");
        self.plan.push(planned);
    }

    /// The operation that consumed receive `n` of the peer.
    fn sender_of(&self, n: u64) -> Option<(usize, Planned)> {
        let takes = |kind| matches!(kind, Kind::Send | Kind::SendWithImmediate | Kind::WriteWithImmediate);
        let mut senders = self.plan.iter().copied().enumerate().filter(|(_, planned)| takes(planned.kind));
        senders.nth(n as usize)
    }
}

struct Stress {
    network: Network,
    late_receives: bool,
    rng: Rng,
    now: u64,
    parties: [Party; 2],
    /// Packets on their way by time of arrival and number, and whom they go to.
    flying: BTreeMap<(u64, u64), (usize, Vec<u8>)>,
    number: u64,
}

impl Stress {
    fn new(seed: u64, network: Network, depth: u8, mtu: PathMtu, late_receives: bool) -> Self {
        let mut config = PairConfig { mtu, depth: DEPTH, ..PairConfig::rc() };
        config.attributes.max_rd_atomic = depth;
        config.attributes.max_dest_rd_atomic = depth;
        config.attributes.timeout = 10;
        let mut parties = [0, 1].map(|number| Party::new(&config, number));
        for party in &mut parties {
            for _ in 0..if late_receives { 2 } else { SLOTS } {
                party.post_receive();
            }
        }
        let (rng, flying) = (Rng::new(seed), BTreeMap::new());
        Self { network, late_receives, rng, now: 0, parties, flying, number: 0 }
    }

    /// Runs to the end; true if everything completed, false if a queue pair gave up after its retries.
    fn run(&mut self) -> Result<bool, String> {
        for _ in 0..400_000 {
            for from in 0..2 {
                self.post(from);
                self.transmit(from);
            }
            self.arrive();
            for to in 0..2 {
                if !self.check(to)? {
                    return Ok(false);
                }
                self.post_receives(to);
            }
            if self.parties.iter().all(|party| party.completed == TOTAL) {
                return Ok(true);
            }
        }
        Err(format!("no end: {:?} complete", self.parties.each_ref().map(|party| party.completed)))
    }

    fn post(&mut self, from: usize) {
        let [a, b] = &mut self.parties;
        let (party, peer) = if from == 0 { (a, b) } else { (b, a) };
        while party.plan.len() < TOTAL && party.side.qp.send_queue_len() < DEPTH && self.rng.chance(0.6) {
            party.post(peer, &mut self.rng);
        }
    }

    /// Now and then some packets leave, so that the next ones answer several at once.
    fn transmit(&mut self, from: usize) {
        if self.rng.chance(0.5) {
            return;
        }
        let acks = if self.rng.chance(0.7) { Acks::Flush } else { Acks::Hold };
        let mut buffer = vec![0; MAX_PACKET_LEN];
        for _ in 0..=self.rng.below(40) {
            let Side { qp, host } = &mut self.parties[from].side;
            let Some(sent) = qp.poll_transmit(Time::from_nanoseconds(self.now), host, acks, &mut buffer)
            else {
                return;
            };
            if self.rng.chance(self.network.loss) {
                continue;
            }
            for copy in 0..=u32::from(self.rng.chance(self.network.duplicate)) {
                let late = copy == 1 || self.rng.chance(self.network.reorder);
                let at = self.now + 5000 + if late { self.rng.below(200_000) } else { 0 };
                self.number += 1;
                self.flying.insert((at, self.number), (1 - from, buffer[..sent.len + 4].to_vec()));
            }
        }
    }

    /// Time passes, in small steps or to the next thing that happens.
    fn arrive(&mut self) {
        let timeouts = self.parties.iter().filter_map(|party| party.side.qp.poll_timeout());
        let arrival = self.flying.first_key_value().map(|((at, _), _)| *at);
        let next = timeouts.map(Time::nanoseconds).chain(arrival).min();
        self.now = match next {
            Some(next) if self.rng.chance(0.3) => self.now.max(next),
            _ => self.now + self.rng.below(3000),
        };
        let now = Time::from_nanoseconds(self.now);
        while let Some(entry) = self.flying.first_entry()
            && entry.key().0 <= self.now
        {
            let (to, bytes) = entry.remove();
            let Side { qp, host } = &mut self.parties[to].side;
            let packet = Packet::parse(&bytes).expect("own packets parse");
            qp.handle_packet(now, host, &packet, &PacketMeta::default());
        }
        for Party { side, .. } in &mut self.parties {
            side.qp.handle_timeout(now, &mut side.host);
        }
    }

    fn post_receives(&mut self, to: usize) {
        let party = &mut self.parties[to];
        if !self.late_receives {
            while party.receives_posted < party.receives_done + SLOTS {
                party.post_receive();
            }
        } else if party.receives_posted < party.receives_done + 8 && self.rng.chance(0.02) {
            party.post_receive();
        }
    }

    /// Looks at what completed; false if the retries ran out.
    fn check(&mut self, at: usize) -> Result<bool, String> {
        let [a, b] = &mut self.parties;
        let (party, peer) = if at == 0 { (a, b) } else { (b, a) };
        for completion in party.side.host.take(CompletionKind::Send) {
            if completion.status == Status::RetryExceeded {
                return Ok(false);
            }
            check_send(party, peer, &completion)?;
        }
        for completion in party.side.host.take(CompletionKind::Receive) {
            check_receive(party, peer, &completion)?;
        }
        let events = &party.side.host.events;
        if events.iter().all(|event| *event == Event::CommunicationEstablished) {
            return Ok(true);
        }
        Err(format!("{events:?}"))
    }
}

fn check_send(party: &mut Party, peer: &Party, completion: &Completion) -> Result<(), String> {
    let n = party.completed;
    if completion.status != Status::Success || completion.wr_id != n as u64 {
        return Err(format!("send {n}: {completion:?}"));
    }
    let planned = party.plan[n];
    let intact = match planned.kind {
        Kind::Write => {
            peer.side.host.bytes(slot(peer.written, n as u64, planned.size)) == party.message(planned)
        }
        Kind::Read => {
            party.side.host.bytes(slot(party.read, n as u64, planned.size)) == peer.message(planned)
        }
        Kind::FetchAdd => {
            let addr = party.results.addr + n as u64 % SLOTS * 8;
            let original = party.side.host.bytes(Sge { addr, length: 8, ..party.results });
            party.atomics += 1;
            original == (party.atomics - 1).to_ne_bytes()
        }
        _ => true,
    };
    party.completed += 1;
    if intact { Ok(()) } else { Err(format!("wrong bytes: {n}, {planned:?}")) }
}

fn check_receive(party: &mut Party, peer: &Party, completion: &Completion) -> Result<(), String> {
    let n = party.receives_done;
    let (id, planned) = peer.sender_of(n).ok_or("a receive without a sender")?;
    let immediate = match planned.kind {
        Kind::Send => ImmediateOrKey::None,
        _ => ImmediateOrKey::Immediate((id as u32).to_be_bytes()),
    };
    let right = completion.status == Status::Success
        && completion.wr_id == n
        && completion.byte_len == planned.size
        && completion.immediate == immediate;
    let place = match planned.kind {
        Kind::WriteWithImmediate => slot(party.written, id as u64, planned.size),
        _ => slot(party.received, n, planned.size),
    };
    party.receives_done += 1;
    if right && party.side.host.bytes(place) == peer.message(planned) {
        return Ok(());
    }
    Err(format!("receive {n}: {completion:?} of {planned:?}"))
}

fn stress(late_receives: bool) {
    let networks = [(0.0, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.05, 0.05, 0.1), (0.3, 0.1, 0.2)];
    let (mut complete, mut ended) = (0, 0);
    for (loss, duplicate, reorder) in networks {
        let network = Network { loss, duplicate, reorder };
        for mtu in [PathMtu::Mtu256, PathMtu::Mtu1024, PathMtu::Mtu4096] {
            for depth in [1, 2, 4] {
                for seed in 0..4 {
                    let done = Stress::new(seed, network, depth, mtu, late_receives).run();
                    let done = done
                        .unwrap_or_else(|e| panic!("seed {seed}, {network:?}, {mtu:?}, depth {depth}: {e}"));
                    assert!(done || loss >= 0.3, "seed {seed}, {network:?}, {mtu:?}, depth {depth}: gave up");
                    complete += u32::from(done);
                    ended += u32::from(!done);
                }
            }
        }
    }
    println!("{complete} runs complete, {ended} ended by retries");
}

#[test]
fn mixed_operations_survive_any_network() {
    stress(false);
}

#[test]
fn mixed_operations_survive_late_receives() {
    stress(true);
}
