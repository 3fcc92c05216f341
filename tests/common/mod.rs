//! What the integration tests share.
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "each test uses a part of it, and fails by panicking"
)]

#[path = "../support/device.rs"]
mod device;

pub(crate) use device::{Difference, differs};
use rdma_async::{Config, Connected, Connection, Domain, Listener, connect};

/// A domain on the device that `RDMA_TEST_DEVICE` names; else on the one the library chooses.
pub(crate) fn domain() -> Domain {
    Domain::open(std::env::var("RDMA_TEST_DEVICE").ok().as_deref()).unwrap()
}

/// Two ends of a connection.
pub(crate) async fn pair<T: Connected>(
    domain: &Domain,
    config: &Config<T>,
) -> (Connection<T>, Connection<T>) {
    let listener = Listener::bind("127.0.0.1:0", domain, config).await.unwrap();
    let (a, b) = tokio::join!(connect(listener.local_addr(), domain, config), listener.accept());
    (a.unwrap(), b.unwrap())
}

/// Sends a message each way.
pub(crate) async fn greet<T: Connected>(a: &Connection<T>, b: &Connection<T>) {
    for (from, to) in [(a, b), (b, a)] {
        let (sent, received) = tokio::join!(from.send(bytes::Bytes::from_static(b"hello")), to.recv());
        sent.0.unwrap();
        assert_eq!(&received.unwrap()[..], b"hello");
    }
}

/// A number of repetitions: `usual`, times `RDMA_TEST_SCALE` where that is set (0.1 for a quick look, 10 for a long night).
pub(crate) fn count(usual: u64) -> u64 {
    let scale = std::env::var("RDMA_TEST_SCALE").map_or(1.0, |scale| scale.parse::<f64>().unwrap());
    ((usual as f64 * scale) as u64).max(1)
}
