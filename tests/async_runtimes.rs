//! Runtimes that share a completion queue, and the end of the one that its poller runs on: nobody waits for ever.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{sync::Arc, thread, time::Duration};

use rdma_async::{CompletionQueue, Config, Domain, RcConnection, WaitMode};
use rdma_core::RemoteSlice;
use tokio::{runtime::Runtime, task::JoinSet};

/// How long nothing may happen before a wake-up counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Echoes in flight on each pair.
const TASKS: usize = 8;

const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

fn runtime(threads: usize) -> Runtime {
    let mut builder = match threads {
        0 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.worker_threads(threads.max(1)).enable_all().build().unwrap()
}

/// A domain whose tasks run on `runtime`.
fn domain(runtime: &Runtime) -> Domain {
    runtime.block_on(async { common::domain() })
}

/// A queue whose poller runs on `runtime`.
fn queue(runtime: &Runtime, domain: &Domain, mode: WaitMode) -> CompletionQueue {
    let _guard = runtime.enter();
    domain.completion_queue(2000, mode).unwrap()
}

/// Pairs on `queue`, whose servers answer as long as the connections live.
async fn pairs(domain: &Domain, queue: &CompletionQueue, count: usize) -> Vec<Arc<RcConnection>> {
    let config = Config::rc().completion_queue(queue).send_depth(16).receive_depth(16).keep_alive(None);
    let mut clients = Vec::new();
    for _ in 0..count {
        let (client, server) = common::pair(domain, &config).await;
        let server = Arc::new(server);
        for _ in 0..TASKS {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                while let Ok(message) = server.recv().await {
                    if server.send(message).await.0.is_err() {
                        break;
                    }
                }
            });
        }
        clients.push(Arc::new(client));
    }
    clients
}

/// `count` echoes by each of the tasks of `clients`.
async fn echo(clients: Vec<Arc<RcConnection>>, count: u64) {
    let mut tasks = JoinSet::new();
    for client in clients.iter().flat_map(|client| std::iter::repeat_n(client, TASKS)) {
        let client = Arc::clone(client);
        tasks.spawn(async move {
            let mut buffer = client.pool().acquire().await;
            for i in 0..count {
                buffer.set_len(8);
                buffer.copy_from_slice(&i.to_le_bytes());
                let (sent, returned) = client.send(buffer).await;
                sent.unwrap();
                client.recv().await.unwrap();
                buffer = returned;
            }
        });
    }
    let done = tokio::time::timeout(PATIENCE, tasks.join_all()).await;
    assert!(done.is_ok(), "a wake-up was lost: {:?}", clients[0].completion_queue().counters());
}

#[test]
fn two_runtimes_share_a_queue() {
    for (home, other) in [(2, 2), (2, 0), (0, 2), (0, 0)] {
        for mode in MODES {
            let (home, other) = (runtime(home), runtime(other));
            let domain = domain(&home);
            let queue = queue(&home, &domain, mode);
            let work = |runtime: Runtime| {
                let (domain, queue) = (domain.clone(), queue.clone());
                move || {
                    runtime.block_on(async {
                        let clients = pairs(&domain, &queue, 2).await;
                        echo(clients, common::count(200)).await;
                    });
                    runtime
                }
            };
            // Both go on until both are done: the home runtime serves the other as well.
            let (home, other) = (thread::spawn(work(home)), thread::spawn(work(other)));
            let home = home.join().unwrap();
            while !other.is_finished() {
                home.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
            }
            drop(other.join().unwrap());
        }
    }
}

/// A runtime of one thread that nobody drives cannot poll for others. Sleeping relies on the domain's runtime, which runs.
#[test]
fn a_queue_made_on_a_runtime_that_stands_still() {
    for mode in MODES {
        let (still, lively) = (runtime(0), runtime(2));
        let domain = domain(&lively);
        let queue = queue(&still, &domain, mode);
        lively.block_on(async {
            let clients = pairs(&domain, &queue, 2).await;
            echo(clients, common::count(200)).await;
        });
        // On the same thread as before, in turns.
        still.block_on(async {
            let clients = pairs(&domain, &queue, 1).await;
            echo(clients, common::count(50)).await;
        });
        let other = runtime(0);
        other.block_on(async {
            let clients = pairs(&domain, &queue, 1).await;
            echo(clients, common::count(50)).await;
        });
    }
}

#[test]
fn the_runtime_of_the_poller_ends_under_load() {
    for mode in MODES {
        for threads in [0, 1] {
            let (brief, lasting) = (runtime(threads), runtime(2));
            let domain = domain(&lasting);
            let queue = queue(&brief, &domain, mode);
            lasting.block_on(async {
                let clients = pairs(&domain, &queue, 2).await;
                let echoes = tokio::spawn(echo(clients, common::count(300)));
                tokio::time::sleep(Duration::from_millis(2)).await;
                brief.shutdown_background();
                echoes.await.unwrap();
            });
        }
    }
}

/// Nobody takes events any more: those who sleep hear of it, one or many, also of a poller that would have slept for them.
#[test]
fn the_runtime_of_the_domain_ends_while_futures_wait() {
    for mode in [WaitMode::Event, WaitMode::Adaptive] {
        for count in [1, TASKS] {
            let (brief, lasting) = (runtime(1), runtime(2));
            let domain = domain(&brief);
            let queue = queue(&lasting, &domain, mode);
            lasting.block_on(async {
                let client = pairs(&domain, &queue, 1).await.remove(0);
                echo(vec![Arc::clone(&client)], 10).await;
                let mut waiting = JoinSet::new();
                for _ in 0..count {
                    let client = Arc::clone(&client);
                    waiting.spawn(async move { client.recv().await.map(drop) });
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
                brief.shutdown_background();
                let ended = tokio::time::timeout(PATIENCE, waiting.join_all()).await;
                let ended = ended.expect("told that nobody takes events");
                assert!(ended.iter().all(Result::is_err), "{mode:?}: {ended:?}");
            });
        }
    }
}

/// The runtime of the domain and of the connection ends while operations are under way: nobody is left to read, but the futures themselves.
#[test]
fn the_runtime_of_all_ends_while_sends_wait() {
    for mode in MODES {
        let (brief, lasting) = (runtime(1), runtime(2));
        let config = Config::rc().wait_mode(mode).keep_alive(None).receive_depth(1).spare_buffers(4);
        let (a, b) = brief.block_on(async { common::pair(&common::domain(), &config).await });
        lasting.block_on(async move {
            // Its only receive was used, and there is no memory for another.
            a.send(vec![a.pool().acquire().await]).await.0.unwrap();
            let _held: Vec<_> = std::iter::from_fn(|| b.pool().try_acquire()).collect();
            let _message = b.recv().await.unwrap();
            let sends = tokio::spawn(async move {
                let (single, batched) = (a.pool().acquire().await, a.pool().acquire().await);
                tokio::join!(a.send(single), a.batch().send(batched).post())
            });
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!sends.is_finished());
            brief.shutdown_background();
            let ((sent, _), (posted, _)) = tokio::time::timeout(PATIENCE, sends).await.unwrap().unwrap();
            assert!(sent.is_err() && posted.is_err(), "{mode:?}: {sent:?} {posted:?}");
        });
    }
}

/// Whoever looks for others is dropped at any moment, also while they rely on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn futures_that_come_and_go() {
    for mode in MODES {
        let domain = common::domain();
        let queue = domain.completion_queue(2000, mode).unwrap();
        let clients = pairs(&domain, &queue, 2).await;
        let silent = pairs(&domain, &queue, 1).await.remove(0);
        let fickle = tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(5);
            loop {
                let limit = Duration::from_micros(random.u64(1..100));
                // Nothing was sent that could come back.
                assert!(tokio::time::timeout(limit, silent.recv()).await.is_err());
                let mut buffer = silent.pool().acquire().await;
                buffer.set_len(0);
                let nowhere = RemoteSlice { addr: 0, rkey: 0, len: 0 };
                let _ = tokio::time::timeout(limit, silent.write(buffer, nowhere)).await;
            }
        });
        echo(clients, common::count(1000)).await;
        fickle.abort();
        assert!(fickle.await.unwrap_err().is_cancelled());
    }
}
