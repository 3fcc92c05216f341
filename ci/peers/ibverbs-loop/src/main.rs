//! The loop of `c-loop.c` with the crate `ibverbs`, on the first device there is.
//!
//! Its posts are unsafe: the caller keeps the memory alive and untouched until the completion.
//!
//! usage: ibverbs-loop ITERATIONS

use std::process::ExitCode;

use ibverbs::{CompletionQueue, MemoryRegion, QueuePair, ibv_qp_type, ibv_wc, ibv_wc_opcode};

const SIZE: usize = 64;
const DEPTH: i32 = 64;
const BATCH: usize = 16;

#[inline(never)]
fn measured(
    qp: &mut QueuePair<'_>,
    cq: &CompletionQueue<'_>,
    memory: &mut MemoryRegion<u8>,
    iterations: u64,
) -> std::io::Result<u64> {
    let mut received = 0;
    let mut completions = [ibv_wc::default(); BATCH];
    for i in 0..iterations {
        // SAFETY: the region outlives the loop, which polls both completions before it posts again.
        unsafe { qp.post_receive(memory, ..SIZE, 2 * i) }?;
        // SAFETY: as above.
        unsafe { qp.post_send(memory, SIZE.., 2 * i + 1) }?;
        let mut completed = 0;
        while completed < 2 {
            let polled = cq.poll(&mut completions)?;
            for completion in polled.iter() {
                assert!(completion.is_valid(), "a success");
                if completion.opcode() == ibv_wc_opcode::IBV_WC_RECV {
                    received += completion.len() as u64;
                }
            }
            completed += polled.len();
        }
    }
    Ok(received)
}

fn main() -> std::io::Result<ExitCode> {
    let iterations = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1000);
    let devices = ibverbs::devices()?;
    let context = devices.get(0).expect("a device").open()?;
    let pd = context.alloc_pd()?;
    let cq = context.create_cq(2 * DEPTH, 0)?;
    let mut memory = pd.allocate::<u8>(2 * SIZE)?;
    let prepared = pd
        .create_qp(&cq, &cq, ibv_qp_type::IBV_QPT_RC)
        .set_gid_index(1)
        .set_max_send_wr(DEPTH as u32)
        .set_max_recv_wr(DEPTH as u32)
        .build()?;
    let endpoint = prepared.endpoint();
    let mut qp = prepared.handshake(endpoint)?;
    let received = measured(&mut qp, &cq, &mut memory, iterations)?;
    println!("{received} bytes received");
    Ok(if received == iterations * SIZE as u64 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
