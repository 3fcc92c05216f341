//! Two processes, one of which dies, stops or hangs: the other side's operations resolve, and say why.
//!
//! The peer is this program again, with a role in its environment; hence no libtest harness.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rdma_async::{Config, Connected, Ended, Listener, OperationError, RcConnection, WaitMode, connect};
use rdma_core::qp::transport::{Rc, Uc};
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinSet;

const ROLE: &str = "RDMA_TEST_ROLE";

fn config(mode: WaitMode) -> Config<Rc> {
    Config::rc().wait_mode(mode).keep_alive(Some(Duration::from_millis(300)))
}

/// As `config`, without acknowledgements.
fn unreliable(mode: WaitMode) -> Config<Uc> {
    Config::uc().wait_mode(mode).keep_alive(Some(Duration::from_millis(300)))
}

/// A process of this program; killed when dropped.
struct Peer(Child);

impl Peer {
    fn start(role: &str) -> (Peer, SocketAddr) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (Peer(child), line.trim().parse().unwrap())
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Stops it: it neither answers nor closes anything, as if the network between had gone.
    fn stop(&self) {
        kill_process(Pid::from_child(&self.0), Signal::STOP).unwrap();
        // The signal is only on its way then: wait until every thread has stopped.
        let tasks = format!("/proc/{}/task", self.0.id());
        let stopped = || {
            std::fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
                stat.rsplit(')').next().is_some_and(|fields| fields.trim_start().starts_with('T'))
            })
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !stopped() {
            assert!(Instant::now() < deadline, "the peer does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The peer's side: serves one connection as `role` says until it ends.
async fn serve(role: &str) {
    match role.strip_prefix("unreliable ") {
        Some(role) => serve_over(role, &unreliable(WaitMode::Adaptive)).await,
        None => serve_over(role, &config(WaitMode::Adaptive)).await,
    }
}

async fn serve_over<T: Connected>(role: &str, config: &Config<T>) {
    let domain = common::domain();
    let listener = Listener::bind("127.0.0.1:0", &domain, config).await.unwrap();
    println!("{}", listener.local_addr());
    let connection = listener.accept().await.unwrap();
    match role {
        "talk" => loop {
            if connection.send(Bytes::from_static(b"tick")).await.0.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        },
        "echo" => {
            while let Ok(message) = connection.recv().await {
                if connection.send(message).await.0.is_err() {
                    return;
                }
            }
        }
        "listen" => while connection.recv().await.is_ok() {},
        role => panic!("no role {role}"),
    }
}

/// Receives until there is an error; gives it and how long after `since` it came.
async fn receive_to_the_end(connection: &RcConnection, since: Instant) -> (OperationError, Duration) {
    loop {
        match tokio::time::timeout(Duration::from_secs(20), connection.recv()).await.expect("recv hangs") {
            Ok(_) => {}
            Err(error) => return (error, since.elapsed()),
        }
    }
}

async fn a_sender_killed_while_the_receiver_only_waits(mode: WaitMode) {
    let (mut peer, address) = Peer::start("talk");
    let domain = common::domain();
    let connection = connect(address, &domain, &config(mode)).await.unwrap();
    for _ in 0..5 {
        assert_eq!(&connection.recv().await.unwrap()[..], b"tick");
    }
    peer.kill();
    let (error, after) = receive_to_the_end(&connection, Instant::now()).await;
    assert!(matches!(&error, OperationError::Ended(Ended::PeerLost { .. })), "{error}");
    assert!(after < Duration::from_secs(2), "noticed after {after:?}");
    println!("  {mode:?}: after {after:?}: {error}");
}

/// What a peer over UC is lost by, though nothing is acknowledged: on a side that only receives, and on one that only sends.
async fn an_unreliable_peer_that_stops_or_dies(mode: WaitMode) {
    let domain = common::domain();
    for dies in [false, true] {
        for receives in [true, false] {
            let (mut peer, address) =
                Peer::start(if receives { "unreliable talk" } else { "unreliable listen" });
            let connection = connect(address, &domain, &unreliable(mode)).await.unwrap();
            // A live peer answers, however long nothing else happens.
            let quiet = tokio::time::timeout(Duration::from_secs(2), connection.until_ended());
            assert!(quiet.await.is_err());
            if dies {
                peer.kill();
            } else {
                peer.stop();
            }
            let start = Instant::now();
            let ended = async {
                loop {
                    let result = if receives {
                        connection.recv().await.map(drop)
                    } else {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        connection.send(Bytes::from_static(b"tick")).await.0
                    };
                    if let Err(error) = result {
                        return error;
                    }
                }
            };
            let error =
                tokio::time::timeout(Duration::from_secs(20), ended).await.expect("nothing is noticed");
            assert!(matches!(&error, OperationError::Ended(Ended::PeerLost { .. })), "{error}");
            println!("  {mode:?}: after {:?}: {error}", start.elapsed());
        }
    }
}

async fn a_server_killed_under_load(mode: WaitMode) {
    let (mut peer, address) = Peer::start("echo");
    let domain = common::domain();
    let connection = Arc::new(connect(address, &domain, &config(mode)).await.unwrap());
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let connection = Arc::clone(&connection);
        tasks.spawn(async move {
            let mut round_trips = 0u64;
            loop {
                let buffer = connection.pool().acquire().await;
                let (result, _buffer) = connection.send(buffer).await;
                if let Err(error) = result {
                    return (round_trips, error);
                }
                match connection.recv().await {
                    Ok(_) => round_trips += 1,
                    Err(error) => return (round_trips, error),
                }
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    peer.kill();
    let start = Instant::now();
    let mut total = 0;
    while let Some(done) =
        tokio::time::timeout(Duration::from_secs(20), tasks.join_next()).await.expect("an operation hangs")
    {
        let (round_trips, error) = done.unwrap();
        assert!(matches!(error, OperationError::Ended(_) | OperationError::Completion(_)), "{error}");
        total += round_trips;
    }
    let after = start.elapsed();
    assert!(total > 0);
    assert!(after < Duration::from_secs(3), "resolved after {after:?}");
    connection.abort();
    let pool = connection.pool().clone();
    let _ = connection.close().await;
    drop(connection);
    assert_eq!(pool.idle(), pool.capacity(), "every buffer came back");
    println!("  {mode:?}: {total} round trips, all resolved after {after:?}");
}

/// Waits for messages that do not come until so many keep-alives were answered: soon, but on a machine that has other things to do.
async fn idle_for_keep_alives(connection: &RcConnection, count: u64) {
    let start = Instant::now();
    while connection.counters().keep_alives < count {
        let received = tokio::time::timeout(Duration::from_millis(500), connection.recv()).await;
        assert!(received.is_err(), "{received:?} after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", connection.counters());
    }
    assert!(connection.ended().is_none(), "{:?}", connection.ended());
}

async fn a_peer_that_hangs_while_this_side_only_waits(mode: WaitMode) {
    let (peer, address) = Peer::start("listen");
    let domain = common::domain();
    let connection = connect(address, &domain, &config(mode)).await.unwrap();
    connection.send(Bytes::from_static(b"there?")).await.0.unwrap();
    // A live peer answers keep-alives, however long nothing else happens.
    idle_for_keep_alives(&connection, 2).await;
    peer.stop();
    if common::differs(&domain.context(), common::Difference::AnswersForStoppedProcesses) {
        // Nothing tells this side, and it goes on: keep-alives are answered.
        idle_for_keep_alives(&connection, connection.counters().keep_alives + 2).await;
        return;
    }
    let (error, after) = receive_to_the_end(&connection, Instant::now()).await;
    assert!(error.to_string().contains("retr"), "{error}");
    assert!(after < Duration::from_secs(8), "noticed after {after:?}");
    println!("  {mode:?}: after {after:?}: {error}");
}

async fn a_peer_that_hangs_under_load(mode: WaitMode) {
    let (mut peer, address) = Peer::start("listen");
    let domain = common::domain();
    let connection = connect(address, &domain, &config(mode)).await.unwrap();
    connection.send(Bytes::from_static(b"1")).await.0.unwrap();
    peer.stop();
    let mut answers = common::differs(&domain.context(), common::Difference::AnswersForStoppedProcesses);
    let start = Instant::now();
    let sends = (0..40).map(|_| connection.send(Bytes::from_static(b"2")));
    let mut sends: Vec<_> = sends.map(Box::pin).collect();
    let mut taken = 0;
    for send in &mut sends {
        if answers {
            // The receives that the peer had posted take some; the rest waits until it is gone.
            if tokio::time::timeout(Duration::from_secs(1), &mut *send).await.is_ok() {
                taken += 1;
                continue;
            }
            peer.kill();
            answers = false;
        }
        let (result, _) = tokio::time::timeout(Duration::from_secs(20), send).await.expect("a send hangs");
        result.unwrap_err();
    }
    assert!(taken <= 32, "more than there were receives");
    let after = start.elapsed();
    assert!(after < Duration::from_secs(8), "resolved after {after:?}");
    println!("  {mode:?}: after {after:?}: {}", connection.ended().unwrap());
}

async fn a_deadline_against_a_peer_that_hangs(mode: WaitMode) {
    let (peer, address) = Peer::start("listen");
    let domain = common::domain();
    let connection = connect(address, &domain, &config(mode)).await.unwrap();
    peer.stop();
    if common::differs(&domain.context(), common::Difference::AnswersForStoppedProcesses) {
        // The receives that the peer had posted take some; then a message has nowhere to go.
        let limit = Duration::from_millis(500);
        for _ in 0..32 {
            let send = connection.send(Bytes::from_static(b"taken"));
            if tokio::time::timeout(limit, send).await.is_err() {
                break;
            }
        }
    }
    let start = Instant::now();
    let buffer = connection.pool().acquire().await;
    let (result, buffer) = connection.with_deadline(Duration::from_millis(50), connection.send(buffer)).await;
    let after = start.elapsed();
    assert!(matches!(result, Err(OperationError::Ended(Ended::Deadline { .. }))), "{result:?}");
    assert!(after >= Duration::from_millis(50) && after < Duration::from_secs(2), "after {after:?}");
    drop(buffer);
    println!("  {mode:?}: after {after:?}");
}

macro_rules! tests {
    ($($name:ident)*) => {{
        let filter: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
        $(
            let name = stringify!($name);
            if filter.is_empty() || filter.iter().any(|part| name.contains(part.as_str())) {
                println!("{name} ...");
                for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
                    runtime().block_on($name(mode));
                }
                println!("{name} ok");
            }
        )*
    }};
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn main() {
    if let Ok(role) = std::env::var(ROLE) {
        return runtime().block_on(serve(&role));
    }
    tests! {
        a_sender_killed_while_the_receiver_only_waits
        an_unreliable_peer_that_stops_or_dies
        a_server_killed_under_load
        a_peer_that_hangs_while_this_side_only_waits
        a_peer_that_hangs_under_load
        a_deadline_against_a_peer_that_hangs
    }
}
