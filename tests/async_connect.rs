//! Making and ending connections: malformed peers, both transports, any stream.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use rdma_async::{
    Config, ConnectError, Connected, Ended, Listener, OperationError, connect, connect_over,
    exchange::{Exchange, ExchangeError, MAX_FRAME},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn unreliable_connections() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::uc()).await;
    common::greet(&a, &b).await;
    let (result, _) = a.send_with_imm(Bytes::from_static(b"x"), 5).await;
    result.unwrap();
    assert_eq!(b.recv().await.unwrap().imm(), Some(5));
    a.close().await.unwrap();
    assert!(matches!(b.until_ended().await, Ended::ClosedByPeer));
}

#[tokio::test]
async fn over_a_stream_of_the_callers() {
    let domain = common::domain();
    let config = Config::rc();
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, b) = (a.unwrap(), b.unwrap());
    common::greet(&a, &b).await;
    assert_eq!(a.peer_addr(), None);
    drop(a);
    assert!(matches!(b.until_ended().await, Ended::ClosedByPeer));
}

#[tokio::test]
async fn the_end_of_the_stream_ends_the_connection() {
    let domain = common::domain();
    let config = Config::rc();
    let (left, mut middle_left) = tokio::io::duplex(64);
    let (right, mut middle_right) = tokio::io::duplex(64);
    let relay =
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut middle_left, &mut middle_right).await });
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    let (a, b) = (a.unwrap(), b.unwrap());
    common::greet(&a, &b).await;
    relay.abort();
    for side in [&a, &b] {
        let error = tokio::time::timeout(Duration::from_secs(2), side.recv()).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("lost the peer"), "{error}");
    }
}

#[tokio::test]
async fn a_side_that_fails_tells_the_peer_how() {
    let domain = common::domain();
    let (a, b) = common::pair(&domain, &Config::rc()).await;
    let received = a.with_deadline(Duration::from_millis(10), a.recv()).await;
    assert!(matches!(received, Err(OperationError::Ended(Ended::Deadline { .. }))), "{received:?}");
    let end = timeout(LIMIT, b.until_ended()).await.unwrap();
    let Ended::PeerFailed { reason } = &end else { panic!("{end}") };
    assert_eq!(*reason, a.ended().unwrap().to_string());
}

/// Whatever a peer says of its failure ends the connection in bounded time and memory, and is fit to be printed.
#[tokio::test]
async fn a_failure_that_is_told_badly() {
    let domain = common::domain();
    let cases: [(&[u8], bool, &str); 5] = [
        (b"F\0\x05short", true, "short"),
        (b"F\0\x07a\x1b[2J\xff\n", true, "a [2J\u{fffd} "),
        (b"F", true, "it does not say how"),
        (b"F\0\x05shor", true, "it does not say how"),
        (b"F\xff\xffmore than may be said", false, "it does not say how"),
    ];
    for (told, closes, expected) in cases {
        let config = Config::rc();
        let (left, mut middle_left) = tokio::io::duplex(64);
        let (right, mut middle_right) = tokio::io::duplex(64);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let relay = tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut middle_left, &mut middle_right) => {}
                _ = stopped => {}
            }
            (middle_left, middle_right)
        });
        let (a, b) =
            tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
        let (a, _b) = (a.unwrap(), b.unwrap());
        stop.send(()).unwrap();
        let (mut to_a, _to_b) = relay.await.unwrap();
        to_a.write_all(told).await.unwrap();
        if closes {
            to_a.shutdown().await.unwrap();
        }
        let end = timeout(LIMIT, a.until_ended()).await.unwrap();
        let Ended::PeerFailed { reason } = &end else { panic!("{end}") };
        assert_eq!(reason, expected);
    }
}

#[tokio::test]
async fn peers_of_different_transports() {
    let domain = common::domain();
    let listener = Listener::bind("127.0.0.1:0", &domain, &Config::uc()).await.unwrap();
    let config = Config::rc();
    let (a, b) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
    let (a, b) = (a.unwrap_err(), b.unwrap_err());
    assert!(a.to_string().contains("not configured for RC"), "{a}");
    assert!(b.to_string().contains("not configured for UC"), "{b}");
    assert!(matches!((a, b), (ConnectError::Mismatch { .. }, ConnectError::Mismatch { .. })));
}

#[tokio::test]
async fn a_side_that_cannot_make_its_queue_pair_tells_the_peer() {
    let domain = common::domain();
    let listener = Listener::bind("127.0.0.1:0", &domain, &Config::rc()).await.unwrap();
    let config = Config::rc().gid_index(255);
    let (a, b) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
    let (a, b) = (a.unwrap_err(), b.unwrap_err());
    assert!(matches!(a, ConnectError::Verb(_)), "{a}");
    assert!(matches!(&b, ConnectError::Refused { peer: Some(_), reason } if *reason == a.to_string()), "{b}");
}

/// What the listener says of a peer that sends `bytes`, and then closes or waits.
async fn malformed(bytes: &[u8], close: bool) -> ConnectError {
    let domain = common::domain();
    let config = Config::rc().handshake_timeout(Duration::from_secs(2));
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
    // The listener may hang up before it has read all.
    let _ = stream.write_all(bytes).await;
    if close {
        stream.shutdown().await.unwrap();
    }
    let error = timeout(LIMIT, listener.accept()).await.unwrap().unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&stream.local_addr().unwrap().to_string()), "names the peer: {text}");
    // The listener is as good as new.
    let (a, b) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
    common::greet(&a.unwrap(), &b.unwrap()).await;
    error
}

fn exchange_error(error: ConnectError) -> ExchangeError {
    let ConnectError::Exchange { source, .. } = error else { panic!("{error}") };
    source
}

#[tokio::test]
async fn peers_that_speak_something_else() {
    let http = exchange_error(malformed(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", false).await);
    assert!(matches!(http, ExchangeError::NotOurProtocol { .. }), "{http}");
    let tls = exchange_error(malformed(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3], true).await);
    assert!(matches!(tls, ExchangeError::NotOurProtocol { .. }), "{tls}");
    let flood = exchange_error(malformed(&vec![0x5a; 1 << 20], false).await);
    assert!(matches!(flood, ExchangeError::NotOurProtocol { .. }), "{flood}");
}

#[tokio::test]
async fn peers_that_say_too_little_or_too_much() {
    assert!(matches!(exchange_error(malformed(b"", true).await), ExchangeError::Closed));
    let (nothing, some) = tokio::join!(malformed(b"", false), malformed(b"RDMX\0", false));
    assert!(matches!(exchange_error(nothing), ExchangeError::TimedOut { received: 0, .. }));
    assert!(matches!(exchange_error(some), ExchangeError::TimedOut { received: 5, .. }));
    assert!(matches!(
        exchange_error(malformed(b"RDMX\0\x01\0", true).await),
        ExchangeError::Truncated { received: 7, .. }
    ));
    assert!(matches!(
        exchange_error(malformed(b"RDMX\0\x01\0\0\xff\xff\xff\xff", false).await),
        ExchangeError::TooLong { .. }
    ));
    assert!(matches!(
        exchange_error(malformed(b"RDMX\xff\xff\0\0\0\0\0\0", false).await),
        ExchangeError::VersionMismatch { theirs: 0xffff, .. }
    ));
    let mut rubbish = b"RDMX\0\x01\0\0\0\0\0\x40".to_vec();
    rubbish.extend([0xff; 0x40]);
    assert!(matches!(exchange_error(malformed(&rubbish, false).await), ExchangeError::Malformed { .. }));
}

#[tokio::test]
async fn a_server_that_speaks_something_else() {
    let domain = common::domain();
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let config = Config::rc();
    let (error, _stream) = tokio::join!(connect(address, &domain, &config), async {
        let (mut stream, _) = server.accept().await.unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH\r\n").await.unwrap();
        stream
    });
    let error = exchange_error(error.unwrap_err());
    assert!(matches!(error, ExchangeError::NotOurProtocol { .. }), "{error}");
    drop(server);
    let error = connect(address, &domain, &config).await.unwrap_err();
    assert!(matches!(error, ConnectError::Stream { .. }), "{error}");
}

#[tokio::test]
async fn private_data_that_is_too_long_is_an_error_of_this_side() {
    let domain = common::domain();
    let listener = Listener::bind("127.0.0.1:0", &domain, &Config::rc()).await.unwrap();
    let config = Config::rc().private_data(vec![0; MAX_FRAME]);
    let (error, told) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
    let (error, told) = (error.unwrap_err(), told.unwrap_err());
    assert!(matches!(&told, ConnectError::Refused { reason, .. } if *reason == error.to_string()), "{told}");
    assert!(matches!(exchange_error(error), ExchangeError::OursTooLong { .. }));
}

/// A listener finds it out before any peer does; what it accepts fits with every peer.
#[tokio::test]
async fn private_data_of_a_listener_is_too_long_from_the_start() {
    let domain = common::domain();
    let config = |length| Config::rc().private_data(vec![7; length]);
    let mut longest = MAX_FRAME;
    let listener = loop {
        match Listener::bind("127.0.0.1:0", &domain, &config(longest)).await {
            Ok(listener) => break listener,
            Err(error) => assert!(matches!(exchange_error(error), ExchangeError::OursTooLong { .. })),
        }
        longest -= 1;
    };
    assert!(longest >= 4000, "{longest}");
    let config = config(longest);
    let (a, b) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
    assert_eq!((a.unwrap().peer_data().len(), b.unwrap().peer_data().len()), (longest, longest));
}

/// A peer that speaks the protocol in another way is told why it gets no connection; what does not speak it at all gets no answer.
#[tokio::test]
async fn peers_that_are_not_understood_are_told_why() {
    let domain = common::domain();
    let listener = Listener::bind("127.0.0.1:0", &domain, &Config::rc()).await.unwrap();
    for (said, expected) in [
        (&b"RDMX\0\x02\0\0\0\0\0\x05more behind it"[..], "version 2"),
        (b"RDMX\0\x01\0\0\xff\xff\xff\xff", "frame of"),
        (b"RDMX\0\x01\0\0\0\0\0\x02\xff\xff", "cannot be decoded"),
        (b"RDMX\0\x01\0\x01\0\0\0\0", "reserved"),
        (b"GET / HTTP/1.1\r\n\r\n", ""),
    ] {
        let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
        stream.write_all(said).await.unwrap();
        let mut told = Vec::new();
        let end = timeout(LIMIT, stream.read_to_end(&mut told)).await.unwrap();
        if expected.is_empty() {
            assert!(told.is_empty(), "{}", told.escape_ascii());
        } else {
            assert!(end.is_ok() && told.starts_with(b"RDMX\0\x01"), "{end:?} {}", told.escape_ascii());
            let told = String::from_utf8_lossy(&told);
            assert!(told.contains(expected), "{told}");
        }
        let error = timeout(LIMIT, listener.accept()).await.unwrap().unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn slow_peers_do_not_hold_up_others() {
    let domain = common::domain();
    let config = Config::rc().handshake_timeout(10 * LIMIT);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let mut slow = Vec::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
        stream.write_all(b"RD").await.unwrap();
        slow.push(stream);
    }
    let both = async { tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept()) };
    let (a, b) = timeout(LIMIT, both).await.unwrap();
    common::greet(&a.unwrap(), &b.unwrap()).await;
}

#[tokio::test]
async fn a_peer_that_leaves_between_the_frames() {
    let domain = common::domain();
    let config = Config::rc();
    let (left, right) = tokio::io::duplex(8192);
    let peer = async {
        // Any frame will do as the first one; the second never comes.
        let mut exchange = Exchange::new(right, Duration::from_secs(5));
        let _: Result<(), _> = exchange.swap::<Result<(), String>, ()>(&Err("no".to_owned())).await;
    };
    let (result, ()) = tokio::join!(connect_over(left, &domain, &config), peer);
    assert!(matches!(result, Err(ConnectError::Refused { reason, .. }) if reason == "no"));
}

#[tokio::test]
async fn several_tasks_may_close_a_connection() {
    for depth in [1, 32] {
        let domain = common::domain();
        let (a, _b) = common::pair(&domain, &Config::rc().send_depth(depth)).await;
        let a = Arc::new(a);
        let mut closes = JoinSet::new();
        for _ in 0..8 {
            let a = Arc::clone(&a);
            closes.spawn(async move {
                a.close().await.unwrap();
                assert_eq!(a.pool().idle(), a.pool().capacity(), "its queue pair lives");
            });
        }
        timeout(LIMIT, closes.join_all()).await.unwrap();
    }
}

#[tokio::test]
async fn a_close_that_was_dropped_can_be_repeated() {
    let domain = common::domain();
    for polls in 1..8 {
        let (a, _b) = common::pair(&domain, &Config::rc()).await;
        let mut close = Box::pin(a.close());
        for _ in 0..polls {
            let polled = poll_fn(|cx| Poll::Ready(close.as_mut().poll(cx))).await;
            if polled.is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(close);
        timeout(LIMIT, a.close()).await.unwrap().unwrap();
        assert_eq!(a.pool().idle(), a.pool().capacity(), "its queue pair lives, {polls} polls");
    }
}

/// The options of a TCP socket, and the clock, have an end.
#[tokio::test]
async fn any_interval_of_keep_alives_will_do() {
    async fn ends<T: Connected>(config: Config<T>) {
        let domain = common::domain();
        let (a, b) = common::pair(&domain, &config).await;
        common::greet(&a, &b).await;
        assert!(a.ended().is_none() && b.ended().is_none());
        drop(a);
        let end = timeout(LIMIT, b.until_ended()).await.unwrap();
        assert!(matches!(end, Ended::ClosedByPeer), "{end}");
    }
    for interval in [Duration::MAX, Duration::from_secs(24 * 3600)] {
        ends(Config::rc().keep_alive(Some(interval))).await;
        ends(Config::uc().keep_alive(Some(interval))).await;
    }
    ends(Config::rc().keep_alive(Some(Duration::ZERO))).await;
}
