//! Round trips between two processes, one after the other: verbs, sizes and ways to wait; UDP, TCP and shared memory beside them.
//!
//! `cargo bench --bench latency`. A SEND or WRITE with immediate is answered by the same of the same size; a READ and an atomic are round
//! trips by themselves. Latency in the sense of perftest is half of the first two. See `common` for other devices and hosts.

mod common;

use std::time::{Duration, Instant};

use common::{Client, ECHO};
use criterion::{BenchmarkId, Criterion};
use rdma_async::{RcConnection, WaitMode};
use rdma_workbench::baseline::{self, Wait};
use rdma_workbench::peer::Outcome;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Send,
    WriteImm,
    Read,
    FetchAdd,
}

const VERBS: [(&str, Verb, &[usize]); 4] = [
    ("send", Verb::Send, &[64, 4096, 65536]),
    ("write-imm", Verb::WriteImm, &[64, 4096, 65536]),
    ("read", Verb::Read, &[64, 4096, 65536]),
    ("fetch-add", Verb::FetchAdd, &[8]),
];
const MODES: [(&str, WaitMode); 3] =
    [("busy", WaitMode::Busy), ("event", WaitMode::Event), ("adaptive", WaitMode::Adaptive)];

fn main() -> Outcome {
    if common::was_server() {
        return Ok(());
    }
    let client = Client::new()?;
    let mut criterion = common::criterion();
    if client.is_local() {
        baselines(&mut criterion, &client)?;
    }
    for (name, verb, sizes) in VERBS {
        let mut group = criterion.benchmark_group(format!("round trip/{name}"));
        for &size in sizes {
            for (mode_name, mode) in MODES {
                let connection = client.runtime.block_on(client.connect(ECHO, mode, size, 4))?;
                group.bench_function(BenchmarkId::new(mode_name, size), |bencher| {
                    bencher.iter_custom(|n| {
                        client.runtime.block_on(round_trips(&connection, verb, size, n)).expect("round trips")
                    });
                });
                client.runtime.block_on(connection.close())?;
            }
        }
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}

async fn round_trips(
    connection: &RcConnection,
    verb: Verb,
    size: usize,
    iterations: u64,
) -> Outcome<Duration> {
    let remote = connection.peer_regions()[0];
    let word = remote.slice(0, 8).ok_or("a region of at least a word")?;
    let mut buffer = connection.pool().acquire().await;
    buffer.set_len(size);
    let begin = Instant::now();
    for _ in 0..iterations {
        let (result, back) = match verb {
            Verb::Send => connection.send(buffer).await,
            Verb::WriteImm => connection.write_with_imm(buffer, remote, 0).await,
            Verb::Read => connection.read(buffer, remote).await,
            Verb::FetchAdd => (connection.fetch_and_add(word, 1).await.map(drop), buffer),
        };
        result?;
        buffer = back;
        if matches!(verb, Verb::Send | Verb::WriteImm) {
            connection.recv().await?;
        }
    }
    Ok(begin.elapsed())
}

fn baselines(criterion: &mut Criterion, client: &Client) -> Outcome {
    let mut group = criterion.benchmark_group("round trip/baseline");
    for (name, word, wait) in [("UDP, spinning", "spin", Wait::Spin), ("UDP, blocking", "block", Wait::Block)]
    {
        let (_server, address) = common::baseline_server(&["udp", word])?;
        let socket = baseline::socket(wait)?;
        // As long as the packets of a message of 64 bytes: with BTH and ICRC.
        group.bench_function(BenchmarkId::new(name, 64), |bencher| {
            bencher.iter_custom(|n| {
                baseline::udp_round_trips(&socket, wait, address, 80, n).expect("round trips")
            });
        });
    }
    let (_server, address) = common::baseline_server(&["tcp"])?;
    let mut stream = client.runtime.block_on(tokio::net::TcpStream::connect(address))?;
    stream.set_nodelay(true)?;
    for size in [64, 4096, 65536] {
        group.bench_function(BenchmarkId::new("TCP, tokio", size), |bencher| {
            bencher.iter_custom(|n| {
                let trips = baseline::tcp_round_trips(&mut stream, size, n);
                client.runtime.block_on(trips).expect("round trips")
            });
        });
    }
    group.bench_function(BenchmarkId::new("shared memory, two threads", 8), |bencher| {
        bencher.iter_custom(baseline::shared_memory_round_trips);
    });
    group.finish();
    Ok(())
}
