//! Connections made and ended thousands of times leave nothing behind. Alone in its process, whose memory and files it counts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use rdma_async::{Config, Listener, connect};

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn many_connections_one_after_the_other_leave_nothing_behind() {
    let cycles = common::count(1_000);
    let domain = common::domain();
    let config = Config::rc().receive_depth(4).spare_buffers(4).send_depth(4);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await.unwrap();
    let cycle = async |i: u64| {
        let (a, b) = tokio::join!(connect(listener.local_addr(), &domain, &config), listener.accept());
        let (a, b) = (a.unwrap(), b.unwrap());
        common::greet(&a, &b).await;
        if i.is_multiple_of(3) {
            drop((a, b));
        } else {
            a.close().await.unwrap();
            b.close().await.unwrap();
        }
    };
    for i in 0..cycles / 4 {
        cycle(i).await;
    }
    let (files, memory) = (open_files(), resident());
    for i in 0..cycles {
        cycle(i).await;
    }
    // Connections that were only dropped are wound up by their tasks.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (more_files, more_memory) = (open_files(), resident());
    println!("{cycles} cycles: {files} then {more_files} files, {memory} then {more_memory} KiB");
    assert!(more_files <= files + 4, "{files} files grew to {more_files}");
    assert!(more_memory <= memory + memory / 4 + 4096, "{memory} KiB grew to {more_memory} KiB");
}
