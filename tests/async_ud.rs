//! Datagrams, on the device that `RDMA_TEST_DEVICE` names.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use bytes::Bytes;
use rdma_async::{OperationError, UdAddress, UdConfig, UdEndpoint, WaitMode};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(10);

fn endpoint(domain: &rdma_async::Domain, wait_mode: WaitMode) -> UdEndpoint {
    let mut config = UdConfig::default();
    config.wait_mode = wait_mode;
    UdEndpoint::new(domain, &config).unwrap()
}

#[tokio::test]
async fn answers_find_their_sender() {
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let domain = common::domain();
        let server = endpoint(&domain, mode);
        let address = server.address();
        let echo = tokio::spawn(async move {
            for _ in 0..400 {
                let datagram = server.recv_from().await.unwrap();
                let sender = datagram.sender();
                server.send_to(datagram.into_buffer(), &sender).await.0.unwrap();
            }
        });
        let clients = [endpoint(&domain, mode), endpoint(&domain, mode)];
        for i in 0..200u64 {
            for (number, client) in (0u64..).zip(&clients) {
                let text = format!("datagram {i} of client {number}");
                let (result, _) = client.send_to(Bytes::from(text.clone()), &address).await;
                result.unwrap();
                let answer = timeout(LIMIT, client.recv_from()).await.unwrap().unwrap();
                assert_eq!(answer.sender(), address);
                assert_eq!(&answer[..], text.as_bytes());
                assert_eq!(answer.into_bytes(), text.as_bytes());
            }
        }
        echo.await.unwrap();
    }
}

#[tokio::test]
async fn sizes_up_to_the_path_mtu_and_no_more() {
    let domain = common::domain();
    let (a, b) = (endpoint(&domain, WaitMode::Event), endpoint(&domain, WaitMode::Event));
    for length in [0, 1, 63, a.max_message()] {
        let message: Vec<u8> = (0..=255).cycle().take(length).collect();
        a.send_to(Bytes::from(message.clone()), &b.address()).await.0.unwrap();
        let datagram = timeout(LIMIT, b.recv_from()).await.unwrap().unwrap();
        assert_eq!((&datagram[..], datagram.sender(), datagram.imm()), (&message[..], a.address(), None));
    }
    let (result, message) = a.send_to(Bytes::from(vec![0; a.max_message() + 1]), &b.address()).await;
    let error = result.unwrap_err();
    assert!(
        matches!(error, OperationError::DatagramTooLong { limit, .. } if limit == a.max_message()),
        "{error}"
    );
    assert!(!error.to_string().contains("Config::"), "advice for connections: {error}");
    assert_eq!(message.len(), a.max_message() + 1);
}

#[tokio::test]
async fn another_key_is_not_heard_and_a_dropped_receive_consumes_nothing() {
    let domain = common::domain();
    let (a, b) = (endpoint(&domain, WaitMode::Event), endpoint(&domain, WaitMode::Event));
    let mut config = UdConfig::default();
    config.qkey = 0x2222_2222;
    let stranger = UdEndpoint::new(&domain, &config).unwrap();
    stranger.send_to(Bytes::from_static(b"hello?"), &b.address()).await.0.unwrap();
    assert!(timeout(Duration::from_millis(50), b.recv_from()).await.is_err());
    for i in 0..100u32 {
        let cancelled = timeout(Duration::from_micros(u64::from(i)), b.recv_from()).await;
        assert!(cancelled.is_err(), "nothing was sent");
        a.send_to(Bytes::copy_from_slice(&i.to_le_bytes()), &b.address()).await.0.unwrap();
        let datagram = timeout(LIMIT, b.recv_from()).await.unwrap().unwrap();
        assert_eq!(datagram[..], i.to_le_bytes());
    }
}

#[tokio::test]
async fn more_sends_than_the_queue_holds_wait_their_turn() {
    let domain = common::domain();
    let mut config = UdConfig::default();
    (config.send_depth, config.receive_depth) = (4, 64);
    let a = std::sync::Arc::new(UdEndpoint::new(&domain, &config).unwrap());
    let b = UdEndpoint::new(&domain, &config).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..40u8 {
        let (a, to) = (std::sync::Arc::clone(&a), b.address());
        tasks.spawn(async move { a.send_to(Bytes::copy_from_slice(&[i]), &to).await.0.unwrap() });
    }
    let mut seen = [false; 40];
    for _ in 0..40 {
        let datagram = timeout(LIMIT, b.recv_from()).await.unwrap().unwrap();
        assert!(!std::mem::replace(&mut seen[usize::from(datagram[0])], true));
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test]
async fn immediate_data() {
    let domain = common::domain();
    let (a, b) = (endpoint(&domain, WaitMode::Event), endpoint(&domain, WaitMode::Event));
    a.send_to_with_imm(Bytes::from_static(b"x"), &b.address(), 0x0102_0304).await.0.unwrap();
    let datagram = timeout(LIMIT, b.recv_from()).await.unwrap().unwrap();
    assert_eq!(
        (&datagram[..], datagram.imm(), datagram.sender()),
        (&b"x"[..], Some(0x0102_0304), a.address())
    );
    let (sent, received) = (a.counters(), b.counters());
    assert_eq!((sent.posted, sent.completed, sent.failed), (1, 1, 0));
    assert_eq!((received.received, received.unreadable), (1, 0));
}

#[tokio::test]
async fn the_smallest_configuration_sends_and_receives() {
    let domain = common::domain();
    let mut config = UdConfig::default();
    (config.send_depth, config.receive_depth, config.spare_buffers) = (0, 0, 0);
    let endpoint = UdEndpoint::new(&domain, &config).unwrap();
    let address = endpoint.address();
    for _ in 0..3 {
        let send = endpoint.send_to(Bytes::from_static(b"copied"), &address);
        timeout(LIMIT, send).await.unwrap().0.unwrap();
        assert_eq!(&timeout(LIMIT, endpoint.recv_from()).await.unwrap().unwrap()[..], b"copied");
    }
}

/// A device takes the lower bits of a number that has too many, and reaches somebody else.
#[tokio::test]
async fn an_address_that_nobody_has_is_refused() {
    let domain = common::domain();
    let endpoint = endpoint(&domain, WaitMode::Event);
    let own = endpoint.address();
    for nobody in [
        UdAddress { qp_num: own.qp_num | 1 << 24, ..own },
        UdAddress { qp_num: u32::MAX, ..own },
        UdAddress { service_level: 16, ..own },
    ] {
        let (result, message) = endpoint.send_to(Bytes::from_static(b"to nobody"), &nobody).await;
        assert!(matches!(result, Err(OperationError::Verb(_))), "{nobody:?}: {result:?}");
        assert_eq!(message, "to nobody");
    }
    assert_eq!(endpoint.counters().posted, 0);
}

#[tokio::test]
async fn many_datagrams_with_one_call() {
    let domain = common::domain();
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let (a, b) = (endpoint(&domain, mode), endpoint(&domain, mode));
        let mut datagrams = Vec::new();
        assert_eq!(b.recv_many_from(&mut datagrams, 0).await.unwrap(), 0, "without a wait");
        for i in 0..20u8 {
            a.send_to(Bytes::from(vec![i; usize::from(i)]), &b.address()).await.0.unwrap();
        }
        let mut calls = 0;
        while datagrams.len() < 20 {
            let before = datagrams.len();
            let count = timeout(LIMIT, b.recv_many_from(&mut datagrams, 6)).await.unwrap().unwrap();
            assert!((1..=6).contains(&count) && datagrams.len() == before + count, "{mode:?}: {count}");
            calls += 1;
        }
        assert!(calls < 20, "{mode:?}: one each");
        for (i, datagram) in (0..20u8).zip(&datagrams) {
            assert_eq!((&datagram[..], datagram.sender()), (&vec![i; usize::from(i)][..], a.address()));
        }
        assert_eq!(b.counters().received, 20);
    }
}
