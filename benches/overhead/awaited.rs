//! The loop awaited through `rdma_async`.

use std::time::{Duration, Instant};

use rdma_async::{Config, Domain, RcConnection, connect_over};
use rdma_core::RemoteAccess;

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
            .regions([shared.remote()]);
        let (left, right) = tokio::io::duplex(4096);
        let (a, b) =
            tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
        let (a, b) = (a.expect("a connection"), b.expect("its other side"));
        // The null provider's queue pairs are their own peers.
        let receiver = if device == Which::Null { &a } else { &b };
        let begin = Instant::now();
        measured(&a, receiver, operation, iterations).await;
        begin.elapsed()
    })
}

#[inline(never)]
async fn measured(a: &RcConnection, b: &RcConnection, operation: Operation, iterations: u64) {
    let remote = a.peer_regions()[0];
    let word = remote.slice(0, 8).expect("inside");
    let mut buffer = a.pool().acquire().await;
    buffer.set_len(SIZE);
    for _ in 0..iterations {
        let (result, back) = match operation {
            Operation::Send => a.send(buffer).await,
            Operation::Write => a.write(buffer, remote).await,
            Operation::Read => a.read(buffer, remote).await,
            Operation::FetchAdd => (a.fetch_and_add(word, 1).await.map(drop), buffer),
        };
        result.expect("a success");
        buffer = back;
        if operation == Operation::Send {
            assert_eq!(b.recv().await.expect("a message").len(), SIZE);
        }
    }
}
