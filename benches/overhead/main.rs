//! What the library costs on top of a device: the same operation in a loop over the C interface, through `rdma_core`, and awaited
//! through `rdma_async`, on a device that completes everything at once (`null0`) and on the built-in one (`soft0`).
//!
//! One queue pair, connected to itself (for `rdma_async`: two, connected to each other); one operation of 64 bytes at a time,
//! and all its completions taken.
//!
//! `cargo bench --bench overhead` measures time. `ci/instructions.sh` counts instructions: it runs
//! `overhead count DEVICE API OPERATION ITERATIONS`.

mod awaited;
mod raw;
mod safe;

use std::time::{Duration, Instant};

use criterion::Criterion;
use rdma_core::{Context, Device};

/// Bytes of a message; 8 for an atomic operation.
const SIZE: usize = 64;
const DEPTH: u32 = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    /// SEND and the receive it takes.
    Send,
    /// The same, the receive awaited first: pending once, where it is awaited.
    RecvFirst,
    Write,
    Read,
    FetchAdd,
}

const OPERATIONS: [(&str, Operation); 5] = [
    ("send", Operation::Send),
    ("recv-first", Operation::RecvFirst),
    ("write", Operation::Write),
    ("read", Operation::Read),
    ("fetch-add", Operation::FetchAdd),
];

/// Sets up and runs a number of iterations: how long they took, without the set-up.
type Loop = fn(Which, Operation, u64) -> Duration;

const LOOPS: [(&str, Loop); 3] =
    [("c-like", raw::run), ("rdma-core", safe::run), ("rdma-async", awaited::run)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Null,
    Soft,
}

const DEVICES: [(&str, Which); 2] = [("null0", Which::Null), ("soft0", Which::Soft)];

impl Which {
    fn open(self) -> Context {
        let device = match self {
            Which::Null => Device::null(),
            Which::Soft => Device::named("soft0"),
        };
        device.and_then(|device| device.open()).expect("a built-in device")
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [count, device, api, operation, iterations] = &arguments[..]
        && count == "count"
    {
        let device = named(&DEVICES, device);
        let (run, operation) = (named(&LOOPS, api), named(&OPERATIONS, operation));
        run(device, operation, iterations.parse().expect("a number of iterations"));
        return;
    }
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(10)
        .configure_from_args();
    for (device_name, device) in DEVICES {
        for (operation_name, operation) in OPERATIONS {
            let mut group = criterion.benchmark_group(format!("overhead/{device_name}/{operation_name}"));
            for (api, run) in LOOPS {
                group.bench_function(api, |bencher| bencher.iter_custom(|n| run(device, operation, n)));
            }
            group.finish();
        }
    }
    criterion.final_summary();
}

fn named<T: Copy>(list: &[(&str, T)], name: &str) -> T {
    let names: Vec<_> = list.iter().map(|(name, _)| *name).collect();
    let found = list.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("{name:?} is none of {names:?}")).1
}

/// How long `body` takes.
fn timed(body: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    body();
    begin.elapsed()
}
