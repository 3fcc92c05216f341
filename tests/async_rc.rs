//! Reliable connections: every operation, on the device that `RDMA_TEST_DEVICE` names.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use rdma_async::{Config, Ended, OperationError, WaitMode};
use rdma_core::{PostErrorKind, RemoteAccess};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);
const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

#[tokio::test]
async fn ping_pong() {
    for mode in MODES {
        let domain = common::domain();
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let echo = tokio::spawn(async move {
            for _ in 0..500 {
                let message = b.recv().await.unwrap();
                b.send(message).await.0.unwrap();
            }
            b
        });
        for i in 0..500u64 {
            let mut buffer = a.pool().acquire().await;
            buffer.set_len(64);
            buffer[..8].copy_from_slice(&i.to_le_bytes());
            let (result, _) = a.send(buffer).await;
            result.unwrap();
            let answer = a.recv().await.unwrap();
            assert_eq!(answer.len(), 64);
            assert_eq!(answer[..8], i.to_le_bytes());
        }
        echo.await.unwrap().close().await.unwrap();
        a.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_on_many_connections_share_a_queue() {
    for mode in MODES {
        let domain = common::domain();
        let queue = domain.completion_queue(8 * 2 * 40, mode).unwrap();
        let config = Config::rc().completion_queue(&queue).send_depth(4).receive_depth(16);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (a, b) = common::pair(&domain, &config).await;
            let (a, b) = (Arc::new(a), Arc::new(b));
            let sum = Arc::new(std::sync::atomic::AtomicU64::new(0));
            for task in 0..16u64 {
                let (a, b, sum) = (Arc::clone(&a), Arc::clone(&b), Arc::clone(&sum));
                tasks.spawn(async move {
                    for i in 0..20 {
                        let mut buffer = a.pool().acquire().await;
                        buffer.set_len(8);
                        buffer.copy_from_slice(&(task * 20 + i).to_le_bytes());
                        let (sent, received) = tokio::join!(a.send(buffer), b.recv());
                        sent.0.unwrap();
                        let number = u64::from_le_bytes(received.unwrap()[..].try_into().unwrap());
                        sum.fetch_add(number, std::sync::atomic::Ordering::Relaxed);
                    }
                    (a, b, sum)
                });
            }
        }
        while let Some(done) = tasks.join_next().await {
            let (a, b, sum) = done.unwrap();
            if Arc::strong_count(&sum) == 1 {
                assert_eq!(sum.load(std::sync::atomic::Ordering::Relaxed), (0..320).sum());
                assert_eq!((a.counters().posted, b.counters().received), (320, 320));
            }
        }
    }
}

#[tokio::test]
async fn immediate_data_and_empty_messages() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc()).await;
    let mut buffer = a.pool().acquire().await;
    buffer.set_len(3);
    buffer.copy_from_slice(b"abc");
    let (result, mut buffer) = a.send_with_imm(buffer, 0xdead_beef).await;
    result.unwrap();
    assert_eq!(&buffer[..], b"abc");
    let message = b.recv().await.unwrap();
    assert_eq!((&message[..], message.imm(), message.written()), (&b"abc"[..], Some(0xdead_beef), None));
    buffer.truncate(0);
    a.send(buffer).await.0.unwrap();
    let message = b.recv().await.unwrap();
    assert_eq!((&message[..], message.imm()), (&b""[..], None));
}

#[tokio::test]
async fn writes_reads_and_atomics() {
    let domain = common::domain();
    let shared = domain.protection_domain().share(vec![0; 4096], RemoteAccess::all()).unwrap();
    let config = Config::rc().regions([shared.remote()]).private_data(&b"a word"[..]);
    let (a, b) = common::pair(&domain, &config).await;
    assert_eq!((a.peer_data(), b.peer_data()), (&b"a word"[..], &b"a word"[..]));
    let remote = a.peer_regions()[0];
    assert_eq!(remote, shared.remote());

    let mut buffer = a.pool().acquire().await;
    buffer.set_len(100);
    buffer.fill(7);
    let (result, buffer) = a.write(buffer, remote.slice(1000, 100).unwrap()).await;
    result.unwrap();
    let mut seen = [0; 102];
    shared.copy_out(999, &mut seen).unwrap();
    assert_eq!((seen[0], &seen[1..101], seen[101]), (0, &[7; 100][..], 0));

    let (result, buffer) = a.write_with_imm(buffer, remote.slice(2000, 100).unwrap(), 42).await;
    result.unwrap();
    let message = b.recv().await.unwrap();
    assert_eq!((message.len(), message.imm(), message.written()), (0, Some(42), Some(100)));

    shared.copy_in(0, b"read me!").unwrap();
    let mut target = buffer;
    target.set_len(8);
    let (result, target) = a.read(target, remote).await;
    result.unwrap();
    assert_eq!(&target[..], b"read me!");

    shared.store(8, 40).unwrap();
    let word = remote.slice(8, 8).unwrap();
    assert_eq!(a.fetch_and_add(word, 2).await.unwrap(), 40);
    assert_eq!(a.compare_and_swap(word, 41, 1).await.unwrap(), 42);
    assert_eq!(a.compare_and_swap(word, 42, 1).await.unwrap(), 42);
    assert_eq!(shared.load(8).unwrap(), 1);

    // Refused before it reaches the device: the connection goes on.
    let (result, target) = a.read(target, remote.slice(0, 4).unwrap()).await;
    assert!(matches!(result, Err(OperationError::Post(PostErrorKind::OutOfBounds { asked: 8, limit: 4 }))));
    let odd = remote.slice(4, 8).unwrap();
    assert!(matches!(a.fetch_and_add(odd, 1).await, Err(OperationError::Post(PostErrorKind::BadAtomic))));
    a.send(target).await.0.unwrap();
    assert_eq!(&b.recv().await.unwrap()[..], b"read me!");
}

#[tokio::test]
async fn gather_and_bytes() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc().max_sge(3)).await;
    let mut parts = [a.pool().acquire().await, a.pool().acquire().await, a.pool().acquire().await];
    for (i, part) in (1u8..).zip(&mut parts) {
        part.set_len(usize::from(i));
        part.fill(i);
    }
    let (result, parts) = a.send(parts).await;
    result.unwrap();
    assert_eq!(parts.each_ref().map(|part| part.len()), [1, 2, 3]);
    let message = b.recv().await.unwrap();
    assert_eq!(&message[..], &[1, 2, 2, 3, 3, 3]);

    // Received bytes are sent on from where they lie; others are copied; too many for a buffer as well.
    let free = b.pool().idle();
    let bytes = message.into_bytes().slice(1..3);
    let (result, bytes) = b.send(bytes).await;
    result.unwrap();
    assert_eq!(&bytes[..], &[2, 2]);
    assert_eq!(&a.recv().await.unwrap()[..], &[2, 2]);
    assert_eq!(b.pool().idle(), free, "sent without a buffer of the pool");
    drop(bytes);
    assert_eq!(b.pool().idle(), free + 1, "back in the pool with its last clone");

    b.send(Bytes::from_static(b"static")).await.0.unwrap();
    assert_eq!(&a.recv().await.unwrap()[..], b"static");
    assert_eq!(b.pool().idle(), free + 1);
    b.send(Bytes::new()).await.0.unwrap();
    assert!(a.recv().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_message_too_long_for_the_peer_is_refused_and_the_connection_goes_on() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc().message_size(256)).await;
    let long = domain.protection_domain().allocate(257).unwrap().into_buffer();
    let (result, mut long) = a.send(long).await;
    assert!(matches!(result, Err(OperationError::TooLong { length: 257, limit: 256 })));
    long.truncate(256);
    a.send(long).await.0.unwrap();
    assert_eq!(b.recv().await.unwrap().len(), 256);
}

#[tokio::test]
async fn a_failed_operation_ends_the_connection_with_its_reason() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc()).await;
    let nowhere = rdma_core::RemoteSlice { addr: 4096, rkey: 1, len: 4096 };
    let (result, buffer) = a.write(a.pool().acquire().await, nowhere).await;
    let error = result.unwrap_err();
    assert!(matches!(&error, OperationError::Completion(e) if !e.is_flush()), "{error}");
    let (result, _buffer) = a.send(buffer).await;
    // The peer's device tells it of the write that it refused, so that its failure may be known here first.
    assert!(
        matches!(result, Err(OperationError::Ended(Ended::Failed(_) | Ended::PeerFailed { .. }))),
        "{result:?}"
    );
    assert!(a.recv().await.is_err());
    let ended = tokio::time::timeout(Duration::from_secs(5), b.recv()).await.unwrap().unwrap_err();
    assert!(matches!(ended, OperationError::Ended(_) | OperationError::Completion(_)), "{ended}");
}

#[tokio::test]
async fn what_arrived_before_a_close_is_received_after_it() {
    let domain = common::domain();
    for mode in MODES {
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        for i in 0..10u8 {
            let mut buffer = a.pool().acquire().await;
            buffer.set_len(1);
            buffer[0] = i;
            a.send(buffer).await.0.unwrap();
        }
        a.close().await.unwrap();
        assert!(matches!(b.until_ended().await, Ended::ClosedByPeer));
        for i in 0..10u8 {
            assert_eq!(&b.recv().await.unwrap()[..], &[i]);
        }
        assert!(matches!(b.recv().await, Err(OperationError::Ended(Ended::ClosedByPeer))));
        let (result, _) = b.send(Bytes::from_static(b"late")).await;
        assert!(matches!(result, Err(OperationError::Ended(Ended::ClosedByPeer))));
        b.close().await.unwrap();
        assert!(matches!(a.recv().await, Err(OperationError::Ended(Ended::Closed))));
    }
}

#[tokio::test]
async fn a_receiver_without_receives_is_back_pressure() {
    let domain = common::domain();
    let config = Config::rc().receive_depth(2).spare_buffers(2).send_depth(2);
    let (a, b) = common::pair(&domain, &config).await;
    let a = Arc::new(a);
    let sender = tokio::spawn({
        let a = Arc::clone(&a);
        async move {
            for i in 0..20u8 {
                a.send(Bytes::copy_from_slice(&[i])).await.0.unwrap();
            }
        }
    });
    // All buffers are held: four messages get through, the rest waits.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(b.recv().await.unwrap());
    }
    assert!(tokio::time::timeout(Duration::from_millis(100), b.recv()).await.is_err());
    assert!(!sender.is_finished());
    held.clear();
    for i in 4..20u8 {
        assert_eq!(&b.recv().await.unwrap()[..], &[i]);
    }
    sender.await.unwrap();
}

#[tokio::test]
async fn a_deadline_ends_the_connection_and_gives_the_buffer_back() {
    let domain = common::domain();
    let config = Config::rc().receive_depth(1).spare_buffers(1);
    let (a, b) = common::pair(&domain, &config).await;
    // The peer's one receive is used up, and its pool is held: the second message has nowhere to go.
    a.send(Bytes::from_static(b"1")).await.0.unwrap();
    let _held = (b.recv().await.unwrap(), b.pool().try_acquire());
    let mut results = Vec::new();
    for _ in 0..3 {
        let mut buffer = a.pool().acquire().await;
        buffer.set_len(8);
        let limit = Duration::from_millis(200);
        let start = std::time::Instant::now();
        let (result, buffer) = a.with_deadline(limit, a.send(buffer)).await;
        assert_eq!(buffer.len(), 8);
        assert!(start.elapsed() < Duration::from_secs(3));
        results.push(result);
    }
    assert!(
        results.iter().any(|result| matches!(
            result,
            Err(OperationError::Ended(Ended::Deadline { limit })) if limit.as_millis() == 200
        )),
        "{results:?}"
    );
}

#[tokio::test]
async fn batches_arrive_in_order_and_complete_once() {
    for mode in MODES {
        let domain = common::domain();
        let config = Config::rc().wait_mode(mode).send_depth(8).receive_depth(64).spare_buffers(64);
        let (a, b) = common::pair(&domain, &config).await;
        // Fewer than the queue holds, as many, and more.
        for count in [0u64, 1, 2, 7, 8, 9, 40] {
            let mut batch = a.batch();
            for i in 0..count {
                let mut buffer = a.pool().acquire().await;
                buffer.set_len(8);
                buffer.copy_from_slice(&i.to_le_bytes());
                batch = if i % 2 == 0 { batch.send(buffer) } else { batch.send_with_imm(buffer, 7) };
            }
            let before = a.counters();
            let receive = async {
                for i in 0..count {
                    let message = b.recv().await.unwrap();
                    assert_eq!(
                        (&message[..], message.imm()),
                        (&i.to_le_bytes()[..], (i % 2 == 1).then_some(7))
                    );
                }
            };
            let ((result, buffers), ()) = tokio::join!(batch.post(), receive);
            result.unwrap();
            let numbers: Vec<_> =
                buffers.iter().map(|b| u64::from_le_bytes(b[..].try_into().unwrap())).collect();
            assert_eq!(numbers, (0..count).collect::<Vec<_>>());
            let after = a.counters();
            assert_eq!((after.posted - before.posted, after.completed - before.completed), (count, count));
        }
        a.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_batch_that_fails_gives_its_buffers_back_and_counts_the_errors() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc().message_size(64)).await;
    let long = domain.buffer_pool(1, 128).unwrap().acquire().await;
    let short = a.pool().acquire().await;
    let (result, buffers) = a.batch().send(short).send(long).post().await;
    assert!(matches!(result, Err(OperationError::TooLong { length: 128, limit: 64 })), "{result:?}");
    assert_eq!(buffers.iter().map(|buffer| buffer.len()).collect::<Vec<_>>(), [64, 128]);

    let nowhere = rdma_core::RemoteSlice { addr: 8, rkey: 1, len: 64 };
    let mut batch = a.batch();
    for buffer in buffers.into_iter().take(1).chain([a.pool().acquire().await]) {
        batch = batch.write(buffer, nowhere);
    }
    let (result, buffers) = batch.post().await;
    assert!(matches!(result, Err(OperationError::Completion(_))), "{result:?}");
    assert_eq!(buffers.len(), 2);
    let errors = a.errors_by_status();
    assert_eq!(errors.iter().map(|(_, count)| count).sum::<u64>(), 2, "{errors:?}");
    assert_eq!(errors[0].0, rdma_core::Status::REMOTE_ACCESS);
    drop(b);
}

/// What stands before a work request that is refused was posted without a completion of its own.
#[tokio::test]
async fn a_batch_that_is_refused_in_the_middle_ends() {
    let domain = common::domain();
    let region = domain.protection_domain().share(vec![0; 64], RemoteAccess::all()).unwrap();
    let short = rdma_core::RemoteSlice { len: 1, ..region.remote() };
    for depth in [1, 2, 8] {
        let (a, _b) = common::pair(&domain, &Config::rc().send_depth(depth)).await;
        for refused in 0..6 {
            let mut batch = a.batch();
            for i in 0..6 {
                let mut buffer = a.pool().acquire().await;
                buffer.set_len(8 + i);
                batch = batch.write(buffer, if i == refused { short } else { region.remote() });
            }
            let (result, buffers) = timeout(LIMIT, batch.post()).await.unwrap();
            assert!(matches!(result, Err(OperationError::Post(_))), "{result:?}");
            let lengths = buffers.iter().map(|buffer| buffer.len()).collect::<Vec<_>>();
            assert_eq!(lengths, (8..14).collect::<Vec<_>>(), "depth {depth}, {refused} refused");
        }
        assert!(a.ended().is_none());
    }
}

#[tokio::test]
async fn a_batch_that_is_dropped_half_posted_gives_its_buffers_back() {
    let domain = common::domain();
    let config = Config::rc().send_depth(8).wait_mode(WaitMode::Event).keep_alive(None);
    let (a, b) = common::pair(&domain, &config).await;
    let idle = a.pool().idle();
    let mut batch = a.batch();
    for _ in 0..32 {
        batch = batch.send(a.pool().acquire().await);
    }
    let mut post = Box::pin(batch.post());
    let polled = std::future::poll_fn(|cx| Poll::Ready(post.as_mut().poll(cx))).await;
    assert!(polled.is_pending(), "the queue has not that many places");
    drop(post);
    let home = async {
        while a.pool().idle() < idle {
            a.completion_queue().dispatch().unwrap();
            b.completion_queue().dispatch().unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, home).await.unwrap_or_else(|_| panic!("{} of {idle} came back", a.pool().idle()));
}

#[tokio::test]
async fn the_path_mtu_is_that_of_both_sides() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc()).await;
    let port = domain.context().port(1).unwrap();
    assert_eq!((a.path_mtu(), b.path_mtu()), (port.active_mtu.bytes(), port.active_mtu.bytes()));
}
