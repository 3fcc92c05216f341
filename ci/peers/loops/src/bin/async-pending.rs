//! The loop of `c-loop.c` with rdma-async, where the receive is awaited before the message is sent: it is pending once,
//! registers its waker, and the waker is called.
//!
//! usage: async-pending ITERATIONS

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use rdma_async::{Config, Connection, Domain, WaitMode, connect_over};
use rdma_core::qp::transport::Rc;

const SIZE: usize = 64;

#[inline(never)]
async fn measured(connection: &Connection<Rc>, iterations: u64) -> usize {
    let mut buffer = connection.pool().acquire().await;
    buffer.set_len(SIZE);
    let mut received = 0;
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..iterations {
        let mut receive = pin!(connection.recv());
        assert!(receive.as_mut().poll(&mut cx).is_pending());
        let (sent, returned) = connection.send(buffer).await;
        sent.expect("a send");
        buffer = returned;
        let Poll::Ready(message) = receive.as_mut().poll(&mut cx) else { panic!("pending twice") };
        received += message.expect("a receive").len();
    }
    received
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let iterations = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1000);
    let domain = Domain::open(Some("null0")).expect("the null provider stands in for libibverbs");
    // Without spinning, which would count polls in vain.
    let config =
        Config::rc().wait_mode(WaitMode::Event).send_depth(64).receive_depth(64).keep_alive(None);
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, _b) = (a.expect("a connection"), b.expect("its other side"));
    assert_eq!(measured(&a, iterations).await as u64, iterations * SIZE as u64);
}
