//! What waits for something scarce: memory, places in queues, a turn, a runtime. It goes on, or says why not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    future::Future,
    sync::{Arc, Mutex},
    task::{Context, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rdma_async::{
    Config, ConnectError, Domain, Ended, Listener, OperationError, RcConnection, WaitMode, connect,
    connect_over,
};
use rdma_core::{Device, RemoteAccess, RemoteSlice, SharedRegion, qp::transport::Rc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    task::JoinSet,
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(20);
const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

/// A word that atomics may change.
fn word(domain: &Domain) -> (SharedRegion, RemoteSlice) {
    let region = domain.protection_domain().share(vec![0; 8], RemoteAccess::all()).unwrap();
    let slice = region.remote();
    (region, slice)
}

/// Takes every buffer of a connection's pool.
fn hoard(connection: &RcConnection) -> Vec<rdma_core::Buffer> {
    std::iter::from_fn(|| connection.pool().try_acquire()).collect()
}

#[tokio::test]
async fn a_deadline_ends_what_waits_for_memory() {
    for mode in MODES {
        let domain = common::domain();
        let (_region, remote) = word(&domain);
        let deadline = Duration::from_millis(50);
        let (a, _b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let kept = hoard(&a);
        let added = timeout(LIMIT, a.with_deadline(deadline, a.fetch_and_add(remote, 1))).await.unwrap();
        assert!(matches!(added, Err(OperationError::Ended(Ended::Deadline { .. }))), "{mode:?}: {added:?}");
        drop(kept);

        let (a, _b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let _kept = hoard(&a);
        let send = a.send(Bytes::from_static(b"copied"));
        let (sent, back) = timeout(LIMIT, a.with_deadline(deadline, send)).await.unwrap();
        assert!(matches!(sent, Err(OperationError::Ended(Ended::Deadline { .. }))), "{mode:?}: {sent:?}");
        assert_eq!(back, "copied");
    }
}

#[tokio::test]
async fn the_peers_end_ends_what_waits_for_memory() {
    for mode in MODES {
        let domain = common::domain();
        let (_region, remote) = word(&domain);
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let _kept = hoard(&a);
        let (added, ()) = timeout(LIMIT, async {
            tokio::join!(a.fetch_and_add(remote, 1), async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                drop(b);
            })
        })
        .await
        .unwrap();
        assert!(matches!(added, Err(OperationError::Ended(Ended::ClosedByPeer))), "{mode:?}: {added:?}");
    }
}

#[tokio::test]
async fn atomics_need_no_spare_buffer_of_the_program() {
    let domain = common::domain();
    let (_region, remote) = word(&domain);
    let (a, _b) = common::pair(&domain, &Config::rc().spare_buffers(0)).await;
    assert_eq!(timeout(LIMIT, a.fetch_and_add(remote, 5)).await.unwrap().unwrap(), 0);
    assert_eq!(timeout(LIMIT, a.fetch_and_add(remote, 5)).await.unwrap().unwrap(), 5);
}

/// Receives hold their places in the completion queue. Those of many connections must leave some for sends.
#[tokio::test]
async fn a_shared_queue_takes_as_many_connections_as_it_has_places_for() {
    for mode in MODES {
        let domain = common::domain();
        let small = domain.completion_queue(8, mode).unwrap();
        let config = Config::rc().completion_queue(&small).receive_depth(500);
        let error = end(&domain, &config).await.unwrap_err();
        assert!(error.to_string().contains("500 receives"), "{error}");

        let queue = domain.completion_queue(64, mode).unwrap();
        let config = Config::rc().completion_queue(&queue).receive_depth(4).send_depth(4);
        let mut pairs = Vec::new();
        let refusal = loop {
            let (left, right) = tokio::io::duplex(64);
            match tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config)) {
                (Ok(a), Ok(b)) => pairs.push((a, b)),
                (Err(error), _) | (_, Err(error)) => break error,
            }
            assert!(pairs.len() <= 64, "the queue has no end");
        };
        assert!(refusal.to_string().contains("completion queue"), "{refusal}");
        assert!(pairs.len() >= 6, "{} pairs", pairs.len());
        // Full as the queue is, all of them get on.
        let mut talks = JoinSet::new();
        for (a, b) in pairs {
            talks.spawn(async move {
                for i in 0..200u32 {
                    let text = Bytes::copy_from_slice(&i.to_le_bytes());
                    let ((sent, _), received) = tokio::join!(a.send(text), b.recv());
                    sent.unwrap();
                    assert_eq!(received.unwrap()[..], i.to_le_bytes());
                }
            });
        }
        timeout(LIMIT, talks.join_all()).await.unwrap_or_else(|_| panic!("{mode:?}: they stand still"));
    }
}

async fn end(domain: &Domain, config: &Config<Rc>) -> Result<(), ConnectError> {
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, domain, config), connect_over(right, domain, config));
    drop(b);
    a.map(drop)
}

#[tokio::test]
async fn sends_leave_in_the_order_of_their_first_polls() {
    for mode in MODES {
        let domain = common::domain();
        let config = Config::rc().wait_mode(mode).send_depth(2).spare_buffers(64);
        let (a, b) = common::pair(&domain, &config).await;
        let (a, b) = (Arc::new(a), Arc::new(b));
        for round in 0..common::count(20) {
            let mut sends = JoinSet::new();
            let local = tokio::task::LocalSet::new();
            let order = Arc::new(Mutex::new(Vec::new()));
            let receiver = Arc::clone(&b);
            let received = Arc::clone(&order);
            let all = async {
                // Polled for the first time in this order, on one thread.
                for i in 0..24u8 {
                    let a = Arc::clone(&a);
                    sends.spawn_local(async move {
                        let mut buffer = a.pool().acquire().await;
                        buffer.set_len(1);
                        buffer[0] = i;
                        a.send(buffer).await.0.unwrap();
                    });
                }
                for _ in 0..24 {
                    let message = receiver.recv().await.unwrap();
                    received.lock().unwrap().push(message[0]);
                }
                while let Some(sent) = sends.join_next().await {
                    sent.unwrap();
                }
            };
            timeout(LIMIT, local.run_until(all)).await.unwrap();
            assert_eq!(*order.lock().unwrap(), (0..24).collect::<Vec<u8>>(), "{mode:?}, round {round}");
        }
    }
}

#[tokio::test]
async fn receives_are_served_in_the_order_of_asking() {
    for mode in MODES {
        let domain = common::domain();
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let b = Arc::new(b);
        for _ in 0..common::count(50) {
            let mut receives = Vec::new();
            for i in 0..4u8 {
                let b = Arc::clone(&b);
                let receive = tokio::spawn(async move { b.recv().await.unwrap()[0] });
                receives.push((i, receive));
                // It asks before the next one does.
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            for i in 0..4u8 {
                a.send(Bytes::copy_from_slice(&[i])).await.0.unwrap();
            }
            for (i, receive) in receives {
                assert_eq!(timeout(LIMIT, receive).await.unwrap().unwrap(), i, "{mode:?}");
            }
        }
    }
}

/// On a thread of its own a loop of operations that are ready, or found by spinning, lets other tasks run, and so does one of messages.
#[tokio::test]
async fn others_get_their_turn() {
    for is_soft in [false, true] {
        for mode in MODES {
            let config = Config::rc().wait_mode(mode).keep_alive(None).receive_depth(64);
            let (domain, pair);
            if is_soft {
                domain = common::domain();
                pair = common::pair(&domain, &config).await;
            } else {
                // Whose queue pairs are their own peers.
                domain = Domain::new(&Device::null().unwrap().open().unwrap()).unwrap();
                let (left, right) = tokio::io::duplex(64);
                let (a, b) =
                    tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
                pair = (a.unwrap(), b.unwrap());
            }
            let (a, b) = if is_soft { (&pair.0, &pair.1) } else { (&pair.0, &pair.0) };
            let others = tokio::spawn(async {
                for _ in 0..20 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            let start = Instant::now();
            let mut buffer = a.pool().acquire().await;
            buffer.set_len(8);
            while !others.is_finished() {
                assert!(start.elapsed() < LIMIT, "{mode:?}: the other task did not run");
                let (result, returned) = a.send(buffer).await;
                result.unwrap();
                buffer = returned;
                b.recv().await.unwrap();
            }
        }
    }
}

/// A receive that lets others run and is dropped for it does not leave its turn to the next one: who polls once a time gets all messages.
#[tokio::test]
async fn a_turn_is_given_once() {
    let domain = Domain::new(&Device::null().unwrap().open().unwrap()).unwrap();
    let config = Config::rc().wait_mode(WaitMode::Event).keep_alive(None);
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, _b) = (a.unwrap(), b.unwrap());
    let mut buffer = a.pool().acquire().await;
    let mut in_vain = 0;
    for _ in 0..10_000 {
        let (result, returned) = a.send(buffer).await;
        result.unwrap();
        buffer = returned;
        for attempt in 0.. {
            assert!(attempt < 3, "the message is there");
            let polled = std::pin::pin!(a.recv()).poll(&mut Context::from_waker(Waker::noop()));
            if polled.is_ready() {
                break;
            }
            in_vain += 1;
        }
    }
    assert_eq!((in_vain, a.counters().received, a.counters().completed), (2, 10_000, 10_000));
}

#[tokio::test]
async fn a_thousand_sends_wait_for_four_places() {
    for mode in MODES {
        let domain = common::domain();
        let config = Config::rc().wait_mode(mode).send_depth(4).spare_buffers(64);
        let (a, b) = common::pair(&domain, &config).await;
        let a = Arc::new(a);
        let receiver = tokio::spawn(async move {
            for _ in 0..1000 {
                drop(b.recv().await.unwrap());
            }
            b
        });
        let mut sends = JoinSet::new();
        for _ in 0..1000 {
            let a = Arc::clone(&a);
            sends.spawn(async move { a.send(Bytes::from_static(b"one of many")).await.0.unwrap() });
        }
        timeout(LIMIT, sends.join_all()).await.unwrap_or_else(|_| panic!("{mode:?}: they stand still"));
        drop(receiver.await.unwrap());
    }
}

#[tokio::test]
async fn numbers_that_no_device_can_grant_are_errors() {
    let domain = common::domain();
    let config = Config::rc;
    for (what, config) in [
        ("send_depth", config().send_depth(u32::MAX)),
        ("receive_depth", config().receive_depth(u32::MAX)),
        ("spare_buffers", config().spare_buffers(usize::MAX)),
        ("many spare_buffers", config().spare_buffers(1 << 40)),
        ("message_size", config().message_size(usize::MAX)),
        ("5 GiB messages", config().message_size(5 << 30)),
        ("max_sge", config().max_sge(u32::MAX)),
        ("port", config().port(200)),
        ("gid_index", config().gid_index(u32::MAX)),
    ] {
        let error = timeout(LIMIT, end(&domain, &config)).await.unwrap().unwrap_err();
        assert!(matches!(error, ConnectError::Verb(_)), "{what}: {error}");
    }
    for config in [
        config().keep_alive(Some(Duration::MAX)),
        config().handshake_timeout(Duration::MAX),
        config().message_size(0),
        config().send_depth(0).receive_depth(0),
    ] {
        timeout(LIMIT, end(&domain, &config)).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn peers_that_say_nothing_do_not_lock_out_others() {
    let domain = common::domain();
    // As long as nobody waits for.
    let config = Config::rc().handshake_timeout(10 * LIMIT);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let address = listener.local_addr();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let both = async { tokio::join!(connect(address, &domain, &config), listener.accept()) };
    let (a, b) = timeout(LIMIT, both).await.unwrap();
    common::greet(&a.unwrap(), &b.unwrap()).await;
    // The oldest had to go.
    let end = timeout(LIMIT, silent[0].read_to_end(&mut Vec::new())).await;
    assert!(end.is_ok(), "it is still open");
    assert!((40..=60).contains(&listener.crowded_out()), "{}", listener.crowded_out());
}

/// Nor do those that begin an exchange and do not end it, of which each holds a queue pair, and buffers, while it lasts.
#[tokio::test]
async fn peers_that_stop_after_their_first_word_do_not_lock_out_others() {
    const SLOW: usize = 130;
    let domain = common::domain();
    let config = small().handshake_timeout(10 * LIMIT);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let address = listener.local_addr();
    let word = first_word(&domain).await;
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&word).await.unwrap();
        slow.push(stream);
    }
    let both = async { tokio::join!(connect(address, &domain, &config), listener.accept()) };
    let (a, b) = timeout(LIMIT, both).await.unwrap();
    common::greet(&a.unwrap(), &b.unwrap()).await;
    // No more than had to go.
    assert!(listener.crowded_out() <= SLOW as u64 + 1 - 64, "{}", listener.crowded_out());
    // Nobody else wants a place: who is slow is left alone.
    let left = listener.crowded_out();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(listener.crowded_out(), left);
    let (a, b) = tokio::join!(connect(address, &domain, &config), listener.accept());
    common::greet(&a.unwrap(), &b.unwrap()).await;
}

/// The first frame of an honest peer.
async fn first_word(domain: &Domain) -> Vec<u8> {
    const HEADER: usize = 12;
    let (left, mut right) = tokio::io::duplex(8192);
    let (domain, config) = (domain.clone(), small());
    let peer = tokio::spawn(async move { connect_over(left, &domain, &config).await.map(drop) });
    let mut word = vec![0; HEADER];
    right.read_exact(&mut word).await.unwrap();
    word.resize(HEADER + usize::from(word[11]), 0);
    right.read_exact(&mut word[HEADER..]).await.unwrap();
    drop(right);
    peer.await.unwrap().unwrap_err();
    word
}

/// A program that is behind with accepting keeps the connections that are being made.
#[tokio::test]
async fn a_program_that_accepts_late_loses_no_connection() {
    const PEERS: usize = 100;
    let domain = common::domain();
    let config = small().handshake_timeout(LIMIT);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let address = listener.local_addr();
    let mut peers = JoinSet::new();
    for _ in 0..PEERS {
        let (domain, config) = (domain.clone(), config.clone());
        peers.spawn(async move { connect(address, &domain, &config).await });
    }
    // Until the listener has made as many ahead as it does.
    while peers.len() > PEERS - 64 {
        timeout(LIMIT, peers.join_next()).await.unwrap().unwrap().unwrap().unwrap();
    }
    for _ in 0..PEERS {
        timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    }
    assert_eq!(peers.join_all().await.into_iter().filter(Result::is_ok).count(), PEERS - 64);
    assert_eq!(listener.crowded_out(), 0);
}

/// One that accepts nothing at all is told what it did not accept.
#[tokio::test]
async fn connections_that_are_never_accepted_time_out() {
    const PEERS: usize = 70;
    let domain = common::domain();
    let config = small().handshake_timeout(LIMIT);
    let listener =
        Listener::bind("127.0.0.1:0", &domain, &small().handshake_timeout(LIMIT / 4)).await.unwrap();
    let address = listener.local_addr();
    let mut peers = JoinSet::new();
    for _ in 0..PEERS {
        let (domain, config) = (domain.clone(), config.clone());
        peers.spawn(async move { connect(address, &domain, &config).await });
    }
    let made = timeout(LIMIT, peers.join_all()).await.unwrap().into_iter().filter(Result::is_ok).count();
    // The places, and the one that is about to be accepted.
    assert_eq!(made, 65);
    let mut accepted = 0;
    for _ in 0..PEERS {
        match timeout(LIMIT, listener.accept()).await.unwrap() {
            Ok(_) => accepted += 1,
            Err(error) => assert!(matches!(error, ConnectError::NotAccepted { made: 64, .. }), "{error}"),
        }
    }
    assert_eq!(accepted, made);
}

fn small() -> Config<Rc> {
    Config::rc().receive_depth(2).send_depth(2).spare_buffers(2).message_size(64)
}

/// A domain belongs to the runtime it was opened on.
#[test]
fn a_domain_whose_runtime_is_gone_says_so() {
    for mode in [WaitMode::Event, WaitMode::Adaptive] {
        let domain = Runtime::new().unwrap().block_on(async { common::domain() });
        let error =
            Runtime::new().unwrap().block_on(end(&domain, &Config::rc().wait_mode(mode))).unwrap_err();
        assert!(error.to_string().contains("runtime"), "{mode:?}: {error}");
    }
    let domain = Runtime::new().unwrap().block_on(async { common::domain() });
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(WaitMode::Busy)).await;
        common::greet(&a, &b).await;
    });
}

/// One that was made while the runtime lived ends when a future would have to sleep.
#[test]
fn a_connection_whose_domain_lost_its_runtime_says_so() {
    for mode in [WaitMode::Event, WaitMode::Adaptive] {
        let other = Runtime::new().unwrap();
        let first = Runtime::new().unwrap();
        let domain = first.block_on(async { common::domain() });
        other.block_on(async {
            let (_a, b) = common::pair(&domain, &Config::rc().wait_mode(mode).keep_alive(None)).await;
            first.shutdown_background();
            let received = timeout(LIMIT, b.recv()).await.unwrap();
            let Err(OperationError::Ended(Ended::Queue { reason })) = received else {
                panic!("{mode:?}: {received:?}")
            };
            assert!(reason.contains("runtime"), "{reason}");
        });
    }
}

/// One that was made on a runtime that lives, but that nobody drives, as one of a single thread between two calls of `block_on`: neither its
/// task runs, nor that of its domain.
#[test]
fn a_runtime_that_nobody_drives_holds_up_no_deadline_and_no_close() {
    const DEADLINE: Duration = Duration::from_millis(50);
    fn is_deadline(result: &Result<(), OperationError>) -> bool {
        matches!(result, Err(OperationError::Ended(Ended::Deadline { .. })))
    }
    for mode in MODES {
        let still = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let lively = Runtime::new().unwrap();
        // The one receive of a peer that is left without memory is used up.
        let config = Config::rc().wait_mode(mode).keep_alive(None).receive_depth(1).spare_buffers(4);
        let make = || {
            still.block_on(async {
                let (a, b) = common::pair(&common::domain(), &config).await;
                let held = hoard(&b);
                a.send(a.pool().acquire().await).await.0.unwrap();
                let message = b.recv().await.unwrap();
                (a, (b, held, message))
            })
        };
        let ((a, _a), (b, _b), (c, _c), (d, _d)) = (make(), make(), make(), make());
        lively.block_on(async move {
            let start = Instant::now();
            let received = timeout(LIMIT, a.with_deadline(DEADLINE, a.recv())).await.unwrap().map(drop);
            assert!(is_deadline(&received), "{mode:?}: {received:?}");
            let buffer = b.pool().acquire().await;
            let (sent, _buffer) = timeout(LIMIT, b.with_deadline(DEADLINE, b.send(buffer))).await.unwrap();
            assert!(is_deadline(&sent), "{mode:?}: {sent:?}");
            // It waits for what was posted, which shows only where it looks for itself.
            let closed = timeout(LIMIT, c.with_deadline(DEADLINE, c.close())).await.unwrap();
            assert!(closed.is_ok() || is_deadline(&closed), "{mode:?}: {closed:?}");
            d.abort();
            timeout(LIMIT, d.close()).await.unwrap().unwrap();
            for connection in [&c, &d] {
                assert_eq!(connection.pool().idle(), connection.pool().capacity(), "its queue pair lives");
            }
            assert!(start.elapsed() < LIMIT / 4, "{mode:?}: {:?}", start.elapsed());
        });
    }
}

/// One that was made on a runtime that is gone would not hear of its peer's end.
#[test]
fn a_connection_whose_own_runtime_is_gone_says_so() {
    for mode in MODES {
        let (main, other) = (Runtime::new().unwrap(), Runtime::new().unwrap());
        let domain = main.block_on(async { common::domain() });
        let config = Config::rc().wait_mode(mode).keep_alive(None);
        let (left, right) = tokio::io::duplex(64);
        let a = other.spawn({
            let (domain, config) = (domain.clone(), config.clone());
            async move { connect_over(left, &domain, &config).await.unwrap() }
        });
        main.block_on(async {
            let b = connect_over(right, &domain, &config).await.unwrap();
            let a = a.await.unwrap();
            other.shutdown_background();
            let received = timeout(LIMIT, a.recv()).await.unwrap();
            assert!(
                matches!(received, Err(OperationError::Ended(Ended::RuntimeGone))),
                "{mode:?}: {received:?}"
            );
            let end = timeout(LIMIT, b.until_ended()).await.unwrap();
            assert!(matches!(end, Ended::PeerLost { .. }), "{mode:?}: {end}");
        });
    }
}

/// Sends many messages, all at once.
fn send_all(connection: &Arc<RcConnection>, count: u8) -> JoinSet<()> {
    let mut sends = JoinSet::new();
    for i in 0..count {
        let connection = Arc::clone(connection);
        sends.spawn(async move { connection.send(Bytes::from(vec![i])).await.0.unwrap() });
    }
    sends
}

/// Connections share a queue that has few places for sends: their receives keep theirs, so that every message finds one, and all get on.
#[tokio::test]
async fn connections_get_on_with_few_places_for_sends() {
    let domain = common::domain();
    for (depth, receives, pairs) in [(4, 1, 1), (18, 4, 2), (10, 1, 4)] {
        let queue = domain.completion_queue(depth, WaitMode::Adaptive).unwrap();
        let config = Config::rc().completion_queue(&queue).receive_depth(receives).send_depth(8);
        let mut running = JoinSet::new();
        // Each is made while those before it are at work.
        for _ in 0..pairs {
            let (a, b) = common::pair(&domain, &config).await;
            running.spawn(async move {
                let a = Arc::new(a);
                let sends = send_all(&a, 64);
                for _ in 0..64 {
                    b.recv().await.unwrap();
                }
                sends.join_all().await;
            });
        }
        let all = timeout(LIMIT, running.join_all()).await;
        assert!(all.is_ok(), "{pairs} pairs on a queue of {depth} stand still");
    }
}

/// Futures that wait for places of a shared queue sleep.
#[tokio::test]
async fn to_wait_for_places_is_not_to_spin() {
    let domain = common::domain();
    let queue = domain.completion_queue(18, WaitMode::Adaptive).unwrap();
    let config = Config::rc().completion_queue(&queue).receive_depth(1).send_depth(16);
    let (a, _b) = common::pair(&domain, &config).await;
    let (c, _d) = common::pair(&domain, &config).await;
    // Nobody receives: one message of each arrives, and the others wait, some on their way and some of both for a place.
    let _sends = [a, c].map(|connection| send_all(&Arc::new(connection), 20));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = queue.counters().sleeps;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let sleeps = queue.counters().sleeps - before;
    // Who spins goes to sleep a hundred thousand times a second.
    assert!(sleeps < 3000, "{sleeps} times to sleep");
}
