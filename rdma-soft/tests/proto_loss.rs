//! RC under loss, duplication, reordering and corruption: what `Done when` of the device promises.

mod sim;

use rdma_soft::proto::PathMtu;
use sim::{Cell, Faults, LinkConfig, Op, cells, goodput_table, run};

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
            assert!(complete >= 98, "{} at depth {depth}: {complete} of 100 seeds complete", op.name());
            println!("30 % loss, {} at depth {depth}: {complete} of 100 seeds complete", op.name());
        }
    }
}

/// A part of the matrix; the example `sim_matrix` runs all of it.
#[test]
fn matrix_keeps_every_promise() {
    let mut cells_run = 0;
    for (seed, loss) in [(1, 0), (2, 1), (3, 5), (4, 10), (5, 30)] {
        for faults in [Faults::None, Faults::All, Faults::Batch, Faults::AllBatch] {
            for op in Op::ALL {
                for cell in cells(op, loss, faults, seed).into_iter().filter(|cell| cell.size <= 65536) {
                    let outcome = run(&cell).unwrap_or_else(|error| panic!("{faults:?} {cell:?}: {error}"));
                    assert!(
                        outcome.completed == cell.count || loss >= 10,
                        "{faults:?} {cell:?}: {outcome:?}"
                    );
                    cells_run += 1;
                }
            }
        }
    }
    println!("{cells_run} cells");
}

/// The table is a function of the protocol and the seeds alone. To record it anew:
/// `UPDATE_SNAPSHOTS=1 cargo test -p rdma-soft --test proto_loss`.
#[test]
fn goodput_is_as_recorded() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshots/goodput.txt");
    let table = goodput_table(2);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &table).expect("writable");
    }
    let recorded = std::fs::read_to_string(path).expect("recorded");
    assert_eq!(table, recorded, "goodput changed; if for the better, record it anew");
}
