//! An awaited SEND and RECV make no system call of their own, in whatever way the queue waits and whether or not it had to. On the null
//! provider, so that what would be counted is this library's.
//!
//! A child of this test runs the loops under the kernel's strict secure computing mode (`man 2 seccomp`), in which a thread may read,
//! write and exit, and is killed at any other call: the thread that got to the end made none. It does fewer operations than may be ready in a
//! row (4096): then other tasks get their turn, and tokio looks for I/O.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    pin::pin,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use rdma_async::{Config, Domain, RcConnection, WaitMode, connect_over};
use rdma_core::Device;
use rustix::thread::{SecureComputingMode, set_secure_computing_mode};

/// Set for the child: how many rounds.
const ROUNDS: &str = "RDMA_TEST_ROUNDS";

/// The loops came to their end.
static IS_DONE: AtomicBool = AtomicBool::new(false);
const PATIENCE: Duration = Duration::from_secs(20);

const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

/// A connection that is its own peer, as all queue pairs of the null provider are, and another one.
async fn connections(mode: WaitMode) -> (RcConnection, RcConnection) {
    let domain = Domain::new(&Device::null().unwrap().open().unwrap()).unwrap();
    let config = Config::rc().wait_mode(mode).keep_alive(None);
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    (a.unwrap(), b.unwrap())
}

/// What is awaited is there at the first poll; and, unless the mode spins, a receive is pending once: spinning reads the processor's
/// clock, which is no system call but forbidden as well.
async fn rounds(connection: &RcConnection, count: u64) {
    let mut buffer = connection.pool().acquire().await;
    let mut noop = Context::from_waker(Waker::noop());
    for _ in 0..count {
        let (result, returned) = connection.send(buffer).await;
        result.unwrap();
        drop(connection.recv().await.unwrap());
        if connection.completion_queue().wait_mode() != WaitMode::Event {
            buffer = returned;
            continue;
        }
        let mut receive = pin!(connection.recv());
        assert!(receive.as_mut().poll(&mut noop).is_pending());
        let (result, returned) = connection.send(returned).await;
        result.unwrap();
        let Poll::Ready(message) = receive.as_mut().poll(&mut noop) else { panic!("not woken") };
        drop(message.unwrap());
        buffer = returned;
    }
}

#[test]
fn a_send_and_a_receive_make_no_system_call() {
    if let Ok(count) = std::env::var(ROUNDS) {
        child(count.parse().unwrap());
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_send_and_a_receive_make_no_system_call", "--nocapture", "--test-threads=1"]);
    let output = command.env(ROUNDS, "400").output().unwrap();
    assert!(output.status.success(), "the thread was killed at a system call: {output:?}");
}

/// Ends the process: the mode cannot be left, nor a test end in it.
fn child(count: u64) -> ! {
    thread::spawn(|| {
        let start = Instant::now();
        while !IS_DONE.load(SeqCst) {
            if start.elapsed() > PATIENCE {
                std::process::exit(1);
            }
            thread::sleep(Duration::from_millis(1));
        }
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut all = Vec::new();
        for mode in MODES {
            let pair = connections(mode).await;
            // What grows once does so now.
            rounds(&pair.0, 50).await;
            all.push(pair);
        }
        set_secure_computing_mode(SecureComputingMode::Strict).unwrap();
        for (connection, _) in &all {
            rounds(connection, count).await;
        }
        IS_DONE.store(true, SeqCst);
        loop {
            std::hint::spin_loop();
        }
    })
}
