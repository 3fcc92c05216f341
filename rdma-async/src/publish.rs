//! Counters for the `metrics` facade; without the feature `metrics`, nothing.

use std::{convert::Infallible, time::Duration};

use rdma_core::Status;

use crate::counters::{ConnectionCounters, QueueCounters};

/// How often the counters of a connection are published.
const INTERVAL: Duration = Duration::from_secs(1);

/// What a connection counted so far.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "read for the facade alone"))]
pub(crate) struct Snapshot {
    pub(crate) qp_num: u32,
    pub(crate) connection: ConnectionCounters,
    pub(crate) errors: Vec<(Status, u64)>,
    pub(crate) queue: QueueCounters,
}

/// Publishes what `snapshot` gives, regularly: so an operation pays nothing for it.
pub(crate) async fn regularly(snapshot: impl Fn() -> Snapshot) -> Infallible {
    if cfg!(not(feature = "metrics")) {
        return std::future::pending().await;
    }
    loop {
        now(&snapshot());
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Publishes counters, labelled with the queue pair's number and, for errors, the status.
pub(crate) fn now(snapshot: &Snapshot) {
    #[cfg(feature = "metrics")]
    {
        let Snapshot { qp_num, connection, errors, queue } = snapshot;
        let qp = format!("{qp_num:#x}");
        for (name, value) in [
            ("rdma_async_posted", connection.posted),
            ("rdma_async_completed", connection.completed),
            ("rdma_async_failed", connection.failed),
            ("rdma_async_receives_posted", connection.receives_posted),
            ("rdma_async_received", connection.received),
            ("rdma_async_keep_alives", connection.keep_alives),
            ("rdma_async_spins", queue.spins),
            ("rdma_async_sleeps", queue.sleeps),
            ("rdma_async_arms", queue.arms),
            ("rdma_async_events", queue.events),
        ] {
            metrics::counter!(name, "qp" => qp.clone()).absolute(value);
        }
        for (status, count) in errors {
            let status = status.to_string();
            metrics::counter!("rdma_async_errors", "qp" => qp.clone(), "status" => status).absolute(*count);
        }
    }
    let _ = snapshot;
}
