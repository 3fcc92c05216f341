//! No wake-up is lost: operations that wait for one another in every wait mode, on a runtime of one and of two threads.
//!
//! `RDMA_STRESS_OPERATIONS` sets how many there are in each mode; `ci/async-stress.sh` runs a million.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rdma_async::{Config, RcConnection, WaitMode};
use tokio::task::JoinSet;

/// How long nothing may happen before a wake-up counts as lost. No keep-alive looks at the queues meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

fn operations() -> u64 {
    std::env::var("RDMA_STRESS_OPERATIONS").map_or(6_000, |count| count.parse().unwrap())
}

/// Sends `count` numbers and waits for each to come back; a sleeping side has nothing but its wake-up to go on.
async fn echo(client: Arc<RcConnection>, count: u64) -> u64 {
    let mut buffer = client.pool().acquire().await;
    for i in 0..count {
        buffer.set_len(8);
        buffer.copy_from_slice(&i.to_le_bytes());
        let exchange = async {
            let (sent, returned) = client.send(buffer).await;
            sent.unwrap();
            (returned, client.recv().await.unwrap())
        };
        let start = Instant::now();
        let result = tokio::time::timeout(PATIENCE, exchange).await;
        // What the timer's own wake-up found was not woken by anything else.
        let Some((returned, _message)) = result.ok().filter(|_| start.elapsed() < PATIENCE) else {
            panic!("a wake-up was lost at operation {i}: {:?}", client.completion_queue().counters());
        };
        buffer = returned;
    }
    count
}

/// `tasks` tasks on each of two connections share the operations, and a completion queue for each side of a connection.
async fn stress(mode: WaitMode, tasks: u64) {
    let operations = operations();
    let domain = common::domain();
    // An echo is two sends and two receives.
    let (connections, each) = (2, operations.div_ceil(4 * 2 * tasks));
    let mut clients = JoinSet::new();
    for _ in 0..connections {
        let (client, server) = common::pair(&domain, &Config::rc().wait_mode(mode).keep_alive(None)).await;
        let (client, server) = (Arc::new(client), Arc::new(server));
        for _ in 0..tasks {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                while let Ok(message) = server.recv().await {
                    if server.send(message).await.0.is_err() {
                        break;
                    }
                }
            });
            clients.spawn(echo(Arc::clone(&client), each));
        }
    }
    let mut done = 0;
    while let Some(count) = clients.join_next().await {
        done += count.unwrap();
    }
    assert_eq!(done, connections * tasks * each);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asleep_on_the_event() {
    stress(WaitMode::Event, 1).await;
    stress(WaitMode::Event, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spinning() {
    stress(WaitMode::Busy, 1).await;
    stress(WaitMode::Busy, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spinning_and_asleep() {
    stress(WaitMode::Adaptive, 1).await;
    stress(WaitMode::Adaptive, 8).await;
}

#[tokio::test]
async fn one_thread() {
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        stress(mode, 4).await;
    }
}
