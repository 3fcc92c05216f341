//! Reliable connections: every operation, on the device that `RDMA_TEST_DEVICE` names.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use rdma_async::{Config, WaitMode};

#[tokio::test]
async fn ping_pong() {
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let domain = common::domain();
        let config = Config::rc().wait_mode(mode);
        let (a, b) = common::pair(&domain, &config).await;
        let echo = tokio::spawn(async move {
            for _ in 0..1000 {
                let message = b.recv().await.unwrap();
                b.send(message).await.0.unwrap();
            }
            b
        });
        let start = std::time::Instant::now();
        for i in 0..1000u64 {
            let mut buffer = a.pool().acquire().await;
            buffer.set_len(64);
            buffer[..8].copy_from_slice(&i.to_le_bytes());
            let (result, _) = a.send(buffer).await;
            result.unwrap();
            let answer = a.recv().await.unwrap();
            assert_eq!(answer.len(), 64);
            assert_eq!(answer[..8], i.to_le_bytes());
        }
        println!("{mode:?}: {:?} per round trip, {:?}", start.elapsed() / 1000, a.completion_queue().counters());
        echo.await.unwrap().close().await.unwrap();
        a.close().await.unwrap();
    }
}
