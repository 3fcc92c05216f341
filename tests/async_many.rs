//! Several operations or messages with one call: batches, `recv_many`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    future::Future,
    pin::pin,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use rdma_async::{Config, Domain, Ended, Message, OperationError, RcConnection, WaitMode, connect_over};
use rdma_core::{Buffer, Device, RemoteAccess};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);
const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

/// Sends messages with these numbers as one batch.
async fn send(from: &RcConnection, numbers: impl IntoIterator<Item = u32>) {
    let mut batch = from.batch();
    for number in numbers {
        let mut buffer = from.pool().acquire().await;
        buffer.set_len(4);
        buffer.copy_from_slice(&number.to_le_bytes());
        batch = batch.send(buffer);
    }
    let (result, _buffers) = timeout(LIMIT, batch.post()).await.unwrap();
    result.unwrap();
}

fn numbers(messages: &[Message]) -> Vec<u32> {
    messages.iter().map(|message| u32::from_le_bytes(message[..].try_into().unwrap())).collect()
}

#[tokio::test]
async fn messages_come_in_order_and_no_more_than_asked_for() {
    let domain = common::domain();
    for mode in MODES {
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let mut messages = Vec::new();
        assert_eq!(b.recv_many(&mut messages, 0).await.unwrap(), 0, "without a wait");
        send(&a, 0..20).await;
        // When the sends are done the messages have arrived; what is read at a time is less than that.
        let mut calls = 0;
        while messages.len() < 20 {
            let before = messages.len();
            let count = timeout(LIMIT, b.recv_many(&mut messages, 6)).await.unwrap().unwrap();
            assert!((1..=6).contains(&count) && messages.len() == before + count, "{mode:?}: {count}");
            calls += 1;
        }
        assert_eq!(numbers(&messages), (0..20).collect::<Vec<_>>());
        assert!(calls < 12, "{mode:?}: {calls} calls for 20 messages: one each");
        let counters = b.counters();
        assert_eq!((counters.received, counters.receives_posted), (20, 52), "{mode:?}: receives stay posted");
    }
}

/// Batches of more messages than the queue pair has receives, again and again, each kept until all of it is there.
#[tokio::test]
async fn the_places_of_all_messages_are_filled_again() {
    let domain = common::domain();
    let config = Config::rc().receive_depth(4).spare_buffers(8).send_depth(8);
    let (a, b) = common::pair(&domain, &config).await;
    let mut expected = 0..;
    for _ in 0..50 {
        let mut messages = Vec::new();
        let sent = send(&a, expected.clone().take(8));
        let received = async {
            while messages.len() < 8 {
                let left = 8 - messages.len();
                b.recv_many(&mut messages, left).await.unwrap();
            }
        };
        timeout(LIMIT, async { tokio::join!(sent, received) }).await.unwrap();
        assert_eq!(numbers(&messages), expected.by_ref().take(8).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_dropped_call_takes_no_message_and_the_end_is_an_error() {
    let domain = common::domain();
    for mode in MODES {
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let mut messages = Vec::new();
        let polled = pin!(b.recv_many(&mut messages, 8)).poll(&mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
        send(&a, 0..3).await;
        a.close().await.unwrap();
        assert!(matches!(b.until_ended().await, Ended::ClosedByPeer));
        // What arrived before the end is received after it.
        while messages.len() < 3 {
            timeout(LIMIT, b.recv_many(&mut messages, 8)).await.unwrap().unwrap();
        }
        assert_eq!(numbers(&messages), [0, 1, 2]);
        let end = timeout(LIMIT, b.recv_many(&mut messages, 8)).await.unwrap();
        assert!(matches!(end, Err(OperationError::Ended(Ended::ClosedByPeer))), "{end:?}");
        assert_eq!(messages.len(), 3, "nothing is appended");
    }
}

/// Several tasks take all messages between them, each once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_tasks_share_the_messages() {
    const MESSAGES: u32 = 5000;
    let domain = common::domain();
    for mode in MODES {
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let b = std::sync::Arc::new(b);
        let tasks: Vec<_> = (0..4)
            .map(|task| {
                let b = std::sync::Arc::clone(&b);
                tokio::spawn(async move {
                    let (mut all, mut messages) = (Vec::new(), Vec::new());
                    loop {
                        let received = if task % 2 == 0 {
                            b.recv_many(&mut messages, 5).await.map(drop)
                        } else {
                            b.recv().await.map(|message| messages.push(message))
                        };
                        if received.is_err() {
                            return all;
                        }
                        let numbers = numbers(&messages);
                        assert!(numbers.is_sorted());
                        all.extend(numbers);
                        messages.clear();
                    }
                })
            })
            .collect();
        let mut next = 0;
        while next < MESSAGES {
            send(&a, next..next + 10).await;
            next += 10;
        }
        a.close().await.unwrap();
        let mut all = Vec::new();
        for task in tasks {
            all.extend(timeout(LIMIT, task).await.unwrap().unwrap());
        }
        all.sort_unstable();
        assert_eq!(all, (0..MESSAGES).collect::<Vec<_>>(), "{mode:?}");
    }
}

/// A connection of the null provider, whose queue pairs are their own peers.
async fn null(config: &Config<rdma_core::qp::transport::Rc>) -> (RcConnection, RcConnection) {
    let domain = Domain::new(&Device::null().unwrap().open().unwrap()).unwrap();
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, config), connect_over(right, &domain, config));
    (a.unwrap(), b.unwrap())
}

/// On a thread of its own a loop of batches, or of messages that are received many at a time, lets other tasks run.
#[tokio::test]
async fn others_get_their_turn() {
    for mode in MODES {
        let config = Config::rc().wait_mode(mode).keep_alive(None).send_depth(64).receive_depth(64);
        let domain = common::domain();
        let region = domain.protection_domain().share(vec![0; 4096], RemoteAccess::all()).unwrap();
        let (soft, peer) = common::pair(&domain, &config).await;
        let (null, _open) = null(&config).await;
        for (from, to, is_message) in
            [(&soft, &peer, false), (&soft, &peer, true), (&null, &null, false), (&null, &null, true)]
        {
            let others = tokio::spawn(async {
                for _ in 0..20 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            let start = Instant::now();
            let (mut buffers, mut messages): (Vec<Buffer>, _) = (Vec::new(), Vec::new());
            for _ in 0..8 {
                buffers.push(from.pool().acquire().await);
            }
            while !others.is_finished() {
                assert!(start.elapsed() < LIMIT, "{mode:?}, {is_message}: the other task did not run");
                let batch = buffers.drain(..).fold(from.batch(), |batch, buffer| match is_message {
                    true => batch.send(buffer),
                    false => batch.write(buffer, region.remote()),
                });
                let (result, returned) = batch.post().await;
                result.unwrap();
                buffers = returned;
                while is_message && messages.len() < 8 {
                    to.recv_many(&mut messages, 8).await.unwrap();
                }
                messages.clear();
            }
        }
    }
}
