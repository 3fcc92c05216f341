//! Messages of one size, 16 in flight, between two processes; UDP with GSO beside them.
//!
//! `cargo bench --bench bandwidth`. See `common` for other devices and hosts.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Client, SINK};
use criterion::{BenchmarkId, Throughput};
use rdma_async::WaitMode;
use rdma_workbench::bandwidth::{Verb, stream};
use rdma_workbench::peer::Outcome;
use rdma_workbench::udp_stream;

const DEPTH: u32 = 16;
const SIZES: [usize; 3] = [4096, 65536, common::LARGEST];

fn main() -> Outcome {
    if common::was_server() {
        return Ok(());
    }
    let client = Client::new()?;
    let mut criterion = common::criterion();
    if client.is_local() {
        let mut group = criterion.benchmark_group("bandwidth/baseline");
        group.throughput(Throughput::Bytes(udp_stream::DATAGRAM as u64));
        group.bench_function("UDP with GSO and GRO", |bencher| {
            bencher.iter_custom(|n| {
                let (_server, address) = common::baseline_server(&["udp-stream"]).expect("a server");
                // The stream runs for a time, not for a number of datagrams.
                let rate = udp_stream::sender(address, Duration::from_millis(50)).expect("a stream");
                Duration::from_secs_f64(n as f64 * udp_stream::DATAGRAM as f64 / rate.max(1.0))
            });
        });
        group.finish();
    }
    for (name, verb) in [("send", Verb::Send), ("write", Verb::Write), ("read", Verb::Read)] {
        let mut group = criterion.benchmark_group(format!("bandwidth/{name}"));
        for size in SIZES {
            group.throughput(Throughput::Bytes(size as u64));
            let connection =
                Arc::new(client.runtime.block_on(client.connect(SINK, WaitMode::Adaptive, size, DEPTH))?);
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter_custom(|n| {
                    let started = Arc::new(AtomicU64::new(0));
                    let more = move || started.fetch_add(1, Ordering::Relaxed) < n;
                    let run = stream(&connection, verb, size, DEPTH, more);
                    let (operations, time) = client.runtime.block_on(run).expect("operations");
                    assert_eq!(operations, n);
                    time
                });
            });
            client.runtime.block_on(connection.close())?;
        }
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}
