//! The loop of `c-loop.c` with rdma-async, where what is awaited is there when it is first polled.
//!
//! usage: async-ready ITERATIONS

use rdma_async::{Config, Connection, Domain, connect_over};
use rdma_core::qp::transport::Rc;

const SIZE: usize = 64;

#[inline(never)]
async fn measured(connection: &Connection<Rc>, iterations: u64) -> usize {
    let mut buffer = connection.pool().acquire().await;
    buffer.set_len(SIZE);
    let mut received = 0;
    for _ in 0..iterations {
        let (sent, returned) = connection.send(buffer).await;
        sent.expect("a send");
        buffer = returned;
        received += connection.recv().await.expect("a receive").len();
    }
    received
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let iterations = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1000);
    let domain = Domain::open(Some("null0")).expect("the null provider stands in for libibverbs");
    let config = Config::rc().send_depth(64).receive_depth(64).keep_alive(None);
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, _b) = (a.expect("a connection"), b.expect("its other side"));
    assert_eq!(measured(&a, iterations).await as u64, iterations * SIZE as u64);
}
