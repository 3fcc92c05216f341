//! One cell of the matrix: a stream of equal operations over a faulty link, with every effect checked.

use rdma_soft::proto::{
    Completion, CompletionKind, Counter, Data, ImmediateOrKey, PathMtu, PostError, SendFlags, SendOperation,
    Sge, State, Status,
};

use super::{LinkConfig, Pair, PairConfig, Rights, Rng};

/// RC operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Send,
    SendWithImmediate,
    Write,
    WriteWithImmediate,
    Read,
    CompareSwap,
    FetchAdd,
    AtomicWrite,
}

impl Op {
    pub const ALL: [Self; 8] = [
        Self::Send,
        Self::SendWithImmediate,
        Self::Write,
        Self::WriteWithImmediate,
        Self::Read,
        Self::CompareSwap,
        Self::FetchAdd,
        Self::AtomicWrite,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::SendWithImmediate => "send_imm",
            Self::Write => "write",
            Self::WriteWithImmediate => "write_imm",
            Self::Read => "read",
            Self::CompareSwap => "cmp_swap",
            Self::FetchAdd => "fetch_add",
            Self::AtomicWrite => "atomic_write",
        }
    }

    /// Whether messages have eight bytes.
    pub fn is_atomic(self) -> bool {
        self.fetches() || self == Self::AtomicWrite
    }

    /// Whether the answer brings what was there before.
    fn fetches(self) -> bool {
        matches!(self, Self::CompareSwap | Self::FetchAdd)
    }

    fn takes_receive(self) -> bool {
        matches!(self, Self::Send | Self::SendWithImmediate | Self::WriteWithImmediate)
    }

    fn has_immediate(self) -> bool {
        matches!(self, Self::SendWithImmediate | Self::WriteWithImmediate)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Cell {
    pub op: Op,
    /// Bytes per message; atomics have eight.
    pub size: usize,
    pub mtu: PathMtu,
    pub depth: u32,
    pub count: u32,
    pub link: LinkConfig,
    pub seed: u64,
}

/// How a cell ended when nothing was wrong.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Operations that completed intact. The rest was flushed behind one that exceeded its retries.
    pub completed: u32,
    pub nanoseconds: u64,
    pub packets: u64,
    pub retransmitted: u64,
    pub timeouts: u64,
    pub corrupt_dropped: u64,
}

/// Source offsets differ from message to message, so that no two of a window carry the same bytes.
const SHIFTS: usize = 509;

struct Run {
    cell: Cell,
    pair: Pair,
    /// What messages are cut from: at the client, or at the server for READ.
    pattern: Vec<u8>,
    source: Sge,
    /// Where messages go, one slot of `size` after the other.
    target: Sge,
    slots: u32,
    /// The word that atomics work on.
    word: Sge,
    posted: u32,
    completed: u32,
    received: u32,
    failed: bool,
}

/// Runs a cell to its end; an error is a violation of what RC promises.
pub fn run(cell: &Cell) -> Result<Outcome, String> {
    let mut run = Run::new(*cell);
    let mut steps = 0u64;
    loop {
        run.post()?;
        let busy = run.pair.step();
        run.check_completions()?;
        if run.completed == cell.count || run.failed {
            break;
        }
        if !busy && run.pair.client.qp.send_queue_len() != 0 {
            return Err(format!("hang: {} of {} complete", run.completed, cell.count));
        }
        steps += 1;
        if steps > 50_000_000 {
            return Err("no end after 50 million steps".into());
        }
    }
    run.check_end()?;
    let host = &run.pair.client.host;
    Ok(Outcome {
        completed: run.completed,
        nanoseconds: run.pair.now.nanoseconds().max(1),
        packets: run.pair.links.iter().map(|link| link.sent).sum(),
        retransmitted: host.counter(Counter::Retransmitted),
        timeouts: host.counter(Counter::Timeout),
        corrupt_dropped: run.pair.links.iter().map(|link| link.corrupt_dropped).sum(),
    })
}

impl Run {
    fn new(cell: Cell) -> Self {
        let config = PairConfig {
            mtu: cell.mtu,
            depth: cell.depth,
            link: cell.link,
            seed: cell.seed,
            ..PairConfig::rc()
        };
        let mut pair = Pair::new(&config);
        let mut rng = Rng::new(!cell.seed);
        let pattern: Vec<u8> =
            (0..cell.size.div_ceil(8) + SHIFTS).flat_map(|_| rng.next().to_le_bytes()).collect();
        let slots = cell.count.min(2 * cell.depth);
        let room = vec![0; cell.size * slots as usize];
        let (client, server) = (&mut pair.client.host, &mut pair.server.host);
        let (reader, writer) = if cell.op == Op::Read { (server, client) } else { (client, server) };
        let source = reader.register(pattern.clone(), Rights::ALL);
        let target = writer.register(room, Rights::ALL);
        let word = pair.server.host.register(vec![0; 8], Rights::ALL);
        if cell.op.fetches() {
            pair.client.host.register(vec![0xff; 8 * slots as usize], Rights::ALL);
        }
        let mut run = Self {
            cell,
            pair,
            pattern,
            source,
            target,
            slots,
            word,
            posted: 0,
            completed: 0,
            received: 0,
            failed: false,
        };
        if cell.op.takes_receive() {
            for n in 0..slots {
                run.post_receive(n);
            }
        }
        run
    }

    fn slot(&self, n: u32) -> Sge {
        let size = self.cell.size;
        Sge {
            addr: self.target.addr + u64::from(n % self.slots) * size as u64,
            length: size as u32,
            ..self.target
        }
    }

    fn message(&self, n: u32) -> std::ops::Range<usize> {
        let start = n as usize * 31 % SHIFTS;
        start..start + self.cell.size
    }

    fn message_sge(&self, n: u32) -> Sge {
        let range = self.message(n);
        Sge { addr: self.source.addr + range.start as u64, length: range.len() as u32, ..self.source }
    }

    /// Where the original value of atomic `n` goes, at the client.
    fn result(&self, n: u32) -> Sge {
        let region = self.pair.client.host.regions.last().expect("registered");
        Sge { addr: region.addr + u64::from(n % self.slots) * 8, length: 8, lkey: region.key }
    }

    fn post_receive(&mut self, n: u32) {
        let sges = if self.cell.op == Op::WriteWithImmediate { vec![] } else { vec![self.slot(n)] };
        self.pair.server.host.post_receive(n.into(), &sges);
    }

    fn post(&mut self) -> Result<(), String> {
        while self.posted < self.cell.count && !self.failed {
            let n = self.posted;
            let (slot, word, message) = (self.slot(n), self.word, self.message_sge(n));
            let immediate = n.to_be_bytes();
            let (operation, sge) = match self.cell.op {
                Op::Send => (SendOperation::Send, message),
                Op::SendWithImmediate => (SendOperation::SendWithImmediate(immediate), message),
                Op::Write => (SendOperation::Write { va: slot.addr, rkey: slot.lkey }, message),
                Op::WriteWithImmediate => {
                    (SendOperation::WriteWithImmediate { va: slot.addr, rkey: slot.lkey, immediate }, message)
                }
                Op::AtomicWrite => (SendOperation::AtomicWrite { va: slot.addr, rkey: slot.lkey }, message),
                Op::Read => (SendOperation::Read { va: message.addr, rkey: message.lkey }, slot),
                Op::FetchAdd => {
                    (SendOperation::FetchAdd { va: word.addr, rkey: word.lkey, add: 1 }, self.result(n))
                }
                Op::CompareSwap => {
                    let (compare, swap) = (u64::from(n), u64::from(n) + 1);
                    let operation =
                        SendOperation::CompareSwap { va: word.addr, rkey: word.lkey, compare, swap };
                    (operation, self.result(n))
                }
            };
            let posted =
                self.pair.client.try_post(n.into(), operation, Data::Gather(&[sge]), SendFlags::SIGNALED);
            match posted {
                Ok(()) => self.posted += 1,
                Err(PostError::QueueFull) => break,
                Err(error) => return Err(format!("post {n}: {error}")),
            }
        }
        Ok(())
    }

    fn check_completions(&mut self) -> Result<(), String> {
        for completion in self.pair.server.host.take(CompletionKind::Receive) {
            self.check_receive(&completion)?;
        }
        for completion in self.pair.client.host.take(CompletionKind::Send) {
            self.check_send(&completion)?;
        }
        Ok(())
    }

    /// Receives complete in order, with the bytes and the immediate data of their message.
    fn check_receive(&mut self, completion: &Completion) -> Result<(), String> {
        let n = self.received;
        let op = self.cell.op;
        if completion.status != Status::Success || completion.wr_id != n.into() {
            return Err(format!("receive {n}: {completion:?}"));
        }
        let immediate = if op.has_immediate() {
            ImmediateOrKey::Immediate(n.to_be_bytes())
        } else {
            ImmediateOrKey::None
        };
        if completion.immediate != immediate || completion.byte_len as usize != self.cell.size {
            return Err(format!("receive {n}: {completion:?}"));
        }
        self.check_bytes(n, "receive")?;
        self.received += 1;
        if n + self.slots < self.cell.count {
            self.post_receive(n + self.slots);
        }
        Ok(())
    }

    fn check_bytes(&self, n: u32, what: &str) -> Result<(), String> {
        let slot = self.slot(n);
        let host = if self.cell.op == Op::Read { &self.pair.client.host } else { &self.pair.server.host };
        if host.bytes(slot) == &self.pattern[self.message(n)] {
            return Ok(());
        }
        Err(format!("{what} {n}: wrong bytes"))
    }

    /// Sends complete in order; a success means that the operation took effect, and an error comes once.
    fn check_send(&mut self, completion: &Completion) -> Result<(), String> {
        let n = self.completed;
        let op = self.cell.op;
        if self.failed {
            return if completion.status == Status::WrFlush {
                Ok(())
            } else {
                Err(format!("{completion:?}"))
            };
        }
        if completion.wr_id != n.into() {
            return Err(format!("send {n}: {completion:?}"));
        }
        match completion.status {
            Status::Success => {}
            Status::RetryExceeded => {
                self.failed = true;
                return Ok(());
            }
            _ => return Err(format!("send {n}: {completion:?}")),
        }
        if op.fetches() {
            let original = self.pair.client.host.bytes(self.result(n));
            if original != u64::from(n).to_ne_bytes() {
                return Err(format!("atomic {n}: answered {original:?}"));
            }
        } else if matches!(op, Op::Write | Op::Read | Op::AtomicWrite) {
            self.check_bytes(n, "send")?;
        } else if self.received <= n {
            return Err(format!("send {n} complete before its receive"));
        }
        self.completed += 1;
        Ok(())
    }

    fn check_end(&mut self) -> Result<(), String> {
        let qp = &self.pair.client.qp;
        if self.failed != (qp.state() == State::Err) || (self.failed && qp.send_queue_len() != 0) {
            return Err(format!("failed: {}, state {:?}", self.failed, qp.state()));
        }
        if self.cell.op.fetches() {
            let bytes = self.pair.server.host.bytes(self.word);
            let value = u64::from_ne_bytes(bytes.try_into().map_err(|_| "eight bytes")?);
            // Each posted operation was executed once, or not at all.
            let most = if self.failed { self.posted } else { self.completed };
            if !(u64::from(self.completed)..=u64::from(most)).contains(&value) {
                return Err(format!("word is {value} after {} operations", self.completed));
            }
        }
        if matches!(self.cell.op, Op::Write | Op::WriteWithImmediate | Op::AtomicWrite) {
            self.check_partial_writes()?;
        }
        Ok(())
    }

    /// A write that did not complete left old or new bytes, nothing else.
    fn check_partial_writes(&self) -> Result<(), String> {
        for n in self.completed..self.posted {
            let old = n.checked_sub(self.slots).map(|old| &self.pattern[self.message(old)]);
            let new = &self.pattern[self.message(n)];
            let bytes = self.pair.server.host.bytes(self.slot(n));
            let wrong = bytes
                .iter()
                .enumerate()
                .any(|(place, byte)| *byte != new[place] && *byte != old.map_or(0, |old| old[place]));
            if wrong {
                return Err(format!("write {n}: wrong bytes after a failure"));
            }
        }
        Ok(())
    }
}
