//! RC over a simulated link: the whole matrix of loss, faults, sizes, path MTUs, queue depths and operations.
//!
//! ```text
//! cargo run --release -p rdma-soft --example sim_matrix -- --seed 7 --seeds 3
//! cargo run --release -p rdma-soft --example sim_matrix -- --replay "send size=4097 mtu=1024 depth=16 loss=10 faults=all seed=7"
//! cargo run --release -p rdma-soft --example sim_matrix -- --single-packet --seeds 100
//! cargo run --release -p rdma-soft --example sim_matrix -- --ten-percent --seed 1000 --seeds 100
//! cargo run --release -p rdma-soft --example sim_matrix -- --table
//! ```
//!
//! Every byte, immediate and atomic is checked, and the order of completions. A cell may end early only with
//! "transport retry counter exceeded". Exits with 1 if anything was wrong, and says how to replay it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rdma_soft::proto::PathMtu;

#[path = "../tests/sim/mod.rs"]
mod sim;

use sim::{Cell, Faults, LOSSES, MTUS, Op, Outcome, cells, goodput_table, operations, run};

/// A cell with the names that its replay needs.
#[derive(Clone, Copy)]
struct Named {
    cell: Cell,
    loss: u32,
    faults: Faults,
}

impl Named {
    fn replay(&self) -> String {
        let Cell { op, size, mtu, depth, seed, .. } = self.cell;
        let (loss, faults) = (self.loss, self.faults.name());
        format!(
            "{} size={size} mtu={} depth={depth} loss={loss} faults={faults} seed={seed}",
            op.name(),
            mtu.bytes()
        )
    }
}

#[derive(Default)]
struct Summary {
    cells: u32,
    complete: u32,
    operations: u64,
    packets: u64,
    retransmitted: u64,
    timeouts: u64,
    corrupt_dropped: u64,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let place = arguments.iter().position(|argument| argument == name)?;
        arguments.get(place + 1)
    };
    let number = |name: &str, default: u64| match value(name) {
        Some(text) => text.parse().unwrap_or_else(|_| panic!("{name} wants a number, not {text:?}")),
        None => default,
    };
    if arguments.iter().any(|argument| argument == "--table") {
        print!("{}", goodput_table(number("--seeds", 5)));
        return ExitCode::SUCCESS;
    }
    if let Some(text) = value("--replay") {
        let named = parse(text).unwrap_or_else(|| panic!("cannot read the cell {text:?}"));
        let outcome = run(&named.cell);
        println!("{}: {outcome:?}", named.replay());
        return if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let seeds = number("--seed", 0)..number("--seed", 0) + number("--seeds", 1);
    if arguments.iter().any(|argument| argument == "--single-packet") {
        return single_packet(seeds);
    }
    if arguments.iter().any(|argument| argument == "--ten-percent") {
        return ten_percent(seeds);
    }
    let mut wrong = 0;
    for loss in LOSSES {
        let mut work = Vec::new();
        for seed in seeds.clone() {
            for faults in Faults::ALL {
                for op in Op::ALL {
                    let named = |cell| Named { cell, loss, faults };
                    work.extend(cells(op, loss, faults, seed).into_iter().map(named));
                }
            }
        }
        wrong += report(&format!("loss {loss:>2} %"), &work);
    }
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Operations of one packet at 30 % loss, by operation: how many seeds complete.
fn single_packet(seeds: std::ops::Range<u64>) -> ExitCode {
    let mut wrong = 0;
    for op in Op::ALL {
        for depth in [1, 16] {
            let cell = |seed| {
                let size = if op.is_atomic() { 8 } else { 1024 };
                let link = Faults::None.link(30);
                let cell = Cell { op, size, mtu: PathMtu::Mtu1024, depth, count: 16, link, seed };
                Named { cell, loss: 30, faults: Faults::None }
            };
            let work: Vec<_> = seeds.clone().map(cell).collect();
            wrong += report(&format!("loss 30 %, {:<9} depth {depth:>2}", op.name()), &work);
        }
    }
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Messages to 64 KiB at 10 % loss, by operation: everything completes, whatever the seed.
fn ten_percent(seeds: std::ops::Range<u64>) -> ExitCode {
    let mut wrong = 0;
    for op in Op::ALL {
        let mut work = Vec::new();
        for seed in seeds.clone() {
            let named = |cell| Named { cell, loss: 10, faults: Faults::None };
            let fits = |cell: &Cell| cell.size <= 65536 && cell.mtu != PathMtu::Mtu256;
            work.extend(cells(op, 10, Faults::None, seed).into_iter().filter(fits).map(named));
        }
        wrong += report(&format!("loss 10 %, {:<12}", op.name()), &work);
    }
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs all cells on all processors, prints a line, and returns how many were wrong.
fn report(title: &str, work: &[Named]) -> usize {
    let next = AtomicUsize::new(0);
    let summary = Mutex::new((Summary::default(), Vec::new()));
    let worker = || {
        while let Some(named) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result =
                std::panic::catch_unwind(|| run(&named.cell)).unwrap_or_else(|_| Err("panic".into()));
            let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(outcome) => summary.0.add(named, &outcome),
                Err(error) => summary.1.push(format!("--replay \"{}\": {error}", named.replay())),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    let (summary, wrong) = summary.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{title}: {} of {} cells complete, {} ended by retry exceeded, {} wrong; {} operations intact, \
         {} packets, {} sent again, {} timeouts, {} corrupt dropped",
        summary.complete,
        work.len(),
        summary.cells - summary.complete,
        wrong.len(),
        summary.operations,
        summary.packets,
        summary.retransmitted,
        summary.timeouts,
        summary.corrupt_dropped,
    );
    for line in &wrong {
        println!("  WRONG {line}");
    }
    wrong.len()
}

impl Summary {
    fn add(&mut self, named: &Named, outcome: &Outcome) {
        self.cells += 1;
        self.complete += u32::from(outcome.completed == named.cell.count);
        self.operations += u64::from(outcome.completed);
        self.packets += outcome.packets;
        self.retransmitted += outcome.retransmitted;
        self.timeouts += outcome.timeouts;
        self.corrupt_dropped += outcome.corrupt_dropped;
    }
}

/// The inverse of [`Named::replay`].
fn parse(text: &str) -> Option<Named> {
    let mut words = text.split_whitespace();
    let name = words.next()?;
    let op = Op::ALL.into_iter().find(|op| op.name() == name)?;
    let words: Vec<(&str, &str)> = words.map(|word| word.split_once('=')).collect::<Option<_>>()?;
    let value = |key: &str| words.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
    let number = |key: &str| value(key).and_then(|text| text.parse::<u32>().ok());
    let mtu = MTUS.into_iter().find(|mtu| Some(mtu.bytes()) == number("mtu"))?;
    let faults = Faults::ALL.into_iter().find(|faults| Some(faults.name()) == value("faults"))?;
    let (size, depth, loss) = (number("size")? as usize, number("depth")?, number("loss")?);
    let seed = value("seed")?.parse().ok()?;
    let cell = Cell { op, size, mtu, depth, count: operations(size, depth), link: faults.link(loss), seed };
    Some(Named { cell, loss, faults })
}
