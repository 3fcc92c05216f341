//! The loop awaited through `rdma_async`.

use std::{
    future::Future,
    pin::pin,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use rdma_async::{Config, Domain, OperationError, RcConnection, WaitMode, connect_over};
use rdma_core::{Buffer, RemoteAccess, RemoteSlice};

use crate::{DEPTH, Operation, SIZE, Which};

pub(crate) fn run(device: Which, operation: Operation, iterations: u64) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let domain = Domain::new(&device.open()).expect("a domain");
        let shared = domain.protection_domain().share(vec![0; SIZE], RemoteAccess::all()).expect("a region");
        let config = Config::rc()
            .send_depth(DEPTH)
            .receive_depth(DEPTH)
            .message_size(SIZE)
            .keep_alive(None)
            // What spins for a time falls asleep under valgrind, where time goes by faster than work.
            .wait_mode(if operation == Operation::RecvFirst { WaitMode::Event } else { WaitMode::Busy })
            .regions([shared.remote()]);
        let (left, right) = tokio::io::duplex(4096);
        let (a, b) =
            tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
        let (a, b) = (a.expect("a connection"), b.expect("its other side"));
        // The null provider's queue pairs are their own peers.
        let receiver = if device == Which::Null { &a } else { &b };
        let begin = Instant::now();
        match operation {
            Operation::Send => messages(&a, receiver, iterations).await,
            Operation::RecvFirst => recv_first(&a, receiver, iterations).await,
            Operation::Write => one_sided(&a, iterations, |buffer, remote| a.write(buffer, remote)).await,
            Operation::Read => one_sided(&a, iterations, |buffer, remote| a.read(buffer, remote)).await,
            Operation::FetchAdd => atomics(&a, iterations).await,
        }
        begin.elapsed()
    })
}

async fn output(a: &RcConnection) -> Buffer {
    let mut buffer = a.pool().acquire().await;
    buffer.set_len(SIZE);
    buffer
}

#[inline(never)]
async fn messages(a: &RcConnection, b: &RcConnection, iterations: u64) {
    let mut buffer = output(a).await;
    for _ in 0..iterations {
        let (result, back) = a.send(buffer).await;
        result.expect("a success");
        buffer = back;
        assert_eq!(b.recv().await.expect("a message").len(), SIZE);
    }
}

/// The first poll finds nothing; who woke the runtime is not what is counted.
#[inline(never)]
async fn recv_first(a: &RcConnection, b: &RcConnection, iterations: u64) {
    let mut buffer = output(a).await;
    for _ in 0..iterations {
        let mut message = pin!(b.recv());
        assert!(message.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let (result, back) = a.send(buffer).await;
        result.expect("a success");
        buffer = back;
        assert_eq!(message.await.expect("a message").len(), SIZE);
    }
}

#[inline(never)]
async fn one_sided<F: Future<Output = (Result<(), OperationError>, Buffer)>>(
    a: &RcConnection,
    iterations: u64,
    operate: impl Fn(Buffer, RemoteSlice) -> F,
) {
    let remote = a.peer_regions()[0];
    let mut buffer = output(a).await;
    for _ in 0..iterations {
        let (result, back) = operate(buffer, remote).await;
        result.expect("a success");
        buffer = back;
    }
}

#[inline(never)]
async fn atomics(a: &RcConnection, iterations: u64) {
    let word = a.peer_regions()[0].slice(0, 8).expect("inside");
    for _ in 0..iterations {
        a.fetch_and_add(word, 1).await.expect("a success");
    }
}
