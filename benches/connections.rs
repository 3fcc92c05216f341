//! What connections cost: the time to set one up and close it, and the memory of one that is idle.
//!
//! `cargo bench --bench connections`. See `common` for other devices and hosts.

mod common;

use std::time::Instant;

use common::{Client, SINK};
use rdma_async::WaitMode;
use rdma_workbench::peer::Outcome;

const MANY: usize = 64;

fn main() -> Outcome {
    if common::was_server() {
        return Ok(());
    }
    let client = Client::new()?;
    let connect = || client.connect(SINK, WaitMode::Event, 256, 4);

    let mut criterion = common::criterion();
    let mut group = criterion.benchmark_group("connections");
    group.bench_function("set up and close", |bencher| {
        bencher.iter_custom(|n| {
            client.runtime.block_on(async {
                let begin = Instant::now();
                for _ in 0..n {
                    connect().await.expect("a connection").close().await.expect("its end");
                }
                begin.elapsed()
            })
        });
    });
    group.finish();
    criterion.final_summary();

    // With 4 receives and 4 spare buffers of 256 bytes, a completion queue of its own, in event mode.
    let before = resident_kib()?;
    let connections = client.runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..MANY {
            connections.push(connect().await?);
        }
        Outcome::Ok(connections)
    })?;
    let each = resident_kib()?.saturating_sub(before) as f64 / MANY as f64;
    println!("connections/memory      {each:.1} KiB each, resident, of {MANY} on this side");
    drop(connections);
    Ok(())
}

/// Resident memory of this process (`man 5 proc_pid_status`).
fn resident_kib() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse()?)
}
