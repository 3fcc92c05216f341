//! What a domain offers beside connections: pools that find one another, pools of several sizes, asynchronous events.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{future::Future, time::Duration};

use bytes::Bytes;
use rdma_async::{Config, Ended, OperationError};
use rdma_core::{Event, EventKind, RemoteAccess};

#[tokio::test]
async fn bytes_of_another_pool_of_the_domain_are_sent_as_they_are() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc().message_size(64)).await;
    let pool = domain.buffer_pool(1, 64).unwrap();
    let mut buffer = pool.try_acquire().unwrap();
    buffer[..4].copy_from_slice(b"here");
    let bytes = Bytes::from_owner(buffer).slice(..4);
    let idle = a.pool().idle();
    let mut send = Box::pin(a.send(bytes.clone()));
    // A copy would hold a buffer of the connection's pool, whatever becomes of the operation.
    let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(send.as_mut().poll(cx))).await;
    assert_eq!(a.pool().idle(), idle);
    if let std::task::Poll::Ready((result, _)) = polled {
        result.unwrap();
    } else {
        send.await.0.unwrap();
    }
    assert_eq!(&b.recv().await.unwrap()[..], b"here");
    // The memory outlives its pool, which nobody finds any more: now it is copied.
    drop(pool);
    let (result, bytes) = a.send(bytes).await;
    result.unwrap();
    assert_eq!(&bytes[..], b"here");
    assert_eq!(&b.recv().await.unwrap()[..], b"here");
}

#[tokio::test]
async fn a_message_takes_the_smallest_buffer_that_is_idle() {
    let domain = common::domain();
    let pools = domain.buffer_pools(&[(1, 4096), (1, 64)]).unwrap();
    assert_eq!(pools.classes().iter().map(|pool| pool.buffer_size()).collect::<Vec<_>>(), [64, 4096]);
    let small = pools.try_acquire(10).unwrap();
    assert_eq!((small.len(), small.capacity()), (10, 64));
    let large = pools.try_acquire(10).unwrap();
    assert_eq!((large.len(), large.capacity()), (10, 4096));
    assert!(pools.try_acquire(10).is_none());
    assert!(pools.acquire(5000).await.is_none());
    let waiting = tokio::spawn({
        let pools = pools.clone();
        async move { pools.acquire(64).await.unwrap() }
    });
    tokio::task::yield_now().await;
    drop(small);
    assert_eq!(tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap().capacity(), 64);
}

/// A peer that writes where it may not: the responder's device reports it, before the connection's exchange says anything.
#[tokio::test]
async fn an_event_ends_the_connection_that_it_is_fatal_to_and_reaches_every_subscriber() {
    let domain = common::domain();
    let readable = domain.protection_domain().share(vec![0; 64], RemoteAccess::READ).unwrap();
    let mut subscribers = [domain.events(), domain.events()];
    let (a, b) = common::pair(&domain, &Config::rc()).await;
    assert!(b.ended().is_none());
    let mut buffer = a.pool().acquire().await;
    buffer.set_len(64);
    let (result, _) = a.write(buffer, readable.remote()).await;
    assert!(matches!(result, Err(OperationError::Completion(_))), "{result:?}");
    for events in &mut subscribers {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(10), events.next()).await.unwrap().unwrap();
            if let Event::QueuePair(EventKind::QpAccessError, pair) = event {
                assert_eq!(pair.map(|pair| pair.num()), Some(b.qp_num()));
                break;
            }
        }
        assert_eq!(events.missed(), 0);
    }
    let ended = tokio::time::timeout(Duration::from_secs(10), b.until_ended()).await.unwrap();
    assert!(matches!(ended, Ended::Event { .. } | Ended::Failed(_) | Ended::PeerFailed { .. }), "{ended}");
    assert!(a.ended().is_some());
}

/// Nobody reads the events any more: whoever waits for one is told.
#[test]
fn events_end_with_the_runtime_of_their_domain() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let domain = runtime.block_on(async { common::domain() });
    let before = domain.events();
    runtime.shutdown_background();
    let other = tokio::runtime::Runtime::new().unwrap();
    other.block_on(async {
        for mut events in [before, domain.events()] {
            let next = tokio::time::timeout(Duration::from_secs(10), events.next()).await;
            assert!(next.unwrap().is_none());
        }
    });
}
