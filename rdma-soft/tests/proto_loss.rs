//! RC under loss, duplication, reordering and corruption: what `Done when` of the device promises.

mod sim;

use rdma_soft::proto::PathMtu;
use sim::{Cell, LinkConfig, Op, run};

fn lossy(loss: f64) -> LinkConfig {
    LinkConfig { loss, ..LinkConfig::default() }
}

/// At 10 % loss each way every operation completes intact, whatever the seed.
#[test]
fn ten_percent_loss_completes_everything() {
    let (mut cells, mut operations) = (0, 0);
    for seed in 0..100 {
        for op in Op::ALL {
            for size in if op.is_atomic() { vec![8] } else { vec![0, 1, 4096, 65536] } {
                for mtu in [PathMtu::Mtu1024, PathMtu::Mtu4096] {
                    let cell = Cell { op, size, mtu, depth: 16, count: 20, link: lossy(0.1), seed };
                    let outcome = run(&cell).unwrap_or_else(|error| panic!("{cell:?}: {error}"));
                    assert_eq!(outcome.completed, cell.count, "{cell:?}");
                    cells += 1;
                    operations += outcome.completed;
                }
            }
        }
    }
    println!("10 % loss: {operations} operations in {cells} cells, all intact");
}

/// At 30 % loss each way nearly all single-packet operations complete; the rest fails cleanly.
#[test]
fn thirty_percent_loss_completes_or_fails_cleanly() {
    for op in Op::ALL {
        for depth in [1, 16] {
            let mut complete = 0;
            for seed in 0..100 {
                let size = if op.is_atomic() { 8 } else { 1024 };
                let cell = Cell { op, size, mtu: PathMtu::Mtu1024, depth, count: 16, link: lossy(0.3), seed };
                let outcome = run(&cell).unwrap_or_else(|error| panic!("{cell:?}: {error}"));
                complete += u32::from(outcome.completed == cell.count);
            }
            println!("30 % loss, {} at depth {depth}: {complete} of 100 seeds complete", op.name());
        }
    }
}
