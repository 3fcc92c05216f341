//! What the features `tracing` and `metrics` tell of a connection.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    io::{self, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use rdma_async::{Config, Domain, RcConnection, connect_over};
use rdma_core::Device;
use tracing::level_filters::LevelFilter;

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Two connected ends of the built-in device, after `rounds` messages of one to the other.
async fn talk(rounds: u64) -> (RcConnection, RcConnection) {
    let domain = Domain::new(&Device::named("soft0").unwrap().open().unwrap()).unwrap();
    let config = Config::rc();
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, b) = (a.unwrap(), b.unwrap());
    let mut buffer = a.pool().acquire().await;
    buffer.set_len(16);
    for _ in 0..rounds {
        let (sent, returned) = a.send(buffer).await;
        sent.unwrap();
        buffer = returned;
        drop(b.recv().await.unwrap());
    }
    (a, b)
}

/// One test for both, for what is recorded is the process's.
#[tokio::test]
async fn a_connections_life_is_counted_and_logged() {
    const ROUNDS: u64 = 5;
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();

    let (a, b) = talk(ROUNDS).await;
    let (a_num, b_num) = (a.qp_num(), b.qp_num());
    let (counted, received) = (a.counters(), b.counters());
    assert_eq!((counted.posted, counted.completed, received.received), (ROUNDS, ROUNDS, ROUNDS));
    a.close().await.unwrap();
    // It ends because its peer said goodbye, and its last figures are published then.
    b.recv().await.unwrap_err();
    b.close().await.unwrap();

    // The largest value of each counter, by name and queue pair; an entry of errors has a status as well.
    let mut published = BTreeMap::new();
    let of = |name: &str, qp_num: u32| (name.to_owned(), format!("{qp_num:#x}"));
    let mut expected = vec![
        (of("rdma_async_completed", a_num), ROUNDS),
        (of("rdma_async_failed", a_num), 0),
        (of("rdma_async_received", b_num), ROUNDS),
        (of("rdma_async_failed", b_num), 0),
    ];
    // The connection's task publishes when it is done, which is after `close`.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !expected.is_empty() && Instant::now() < deadline {
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let DebugValue::Counter(value) = value else { panic!("{key:?} is {value:?}") };
            let qp = key.key().labels().find(|label| label.key() == "qp").unwrap().value().to_owned();
            let known = published.entry((key.key().name().to_owned(), qp)).or_insert(value);
            *known = value.max(*known);
        }
        expected.retain(|(key, at_least)| published.get(key).is_none_or(|value| value < at_least));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(expected.is_empty(), "{expected:?} is missing in {published:#?}");
    assert_eq!(published[&of("rdma_async_received", b_num)], ROUNDS);
    assert_eq!(published[&of("rdma_async_received", a_num)], 0);

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for qp_num in [a_num, b_num] {
        let ended = log.lines().find(|line| line.contains(&format!("ended qp_num={qp_num} reason=")));
        let ended = ended.unwrap_or_else(|| panic!("no end of {qp_num} in:\n{log}"));
        assert!(ended.contains("DEBUG"), "{ended}");
    }
    let closed = log.lines().find(|line| line.contains(&format!("ended qp_num={b_num} ")));
    assert!(closed.is_some_and(|line| line.contains("peer")), "{log}");
}
