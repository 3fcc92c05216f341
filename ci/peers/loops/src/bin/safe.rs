//! The loop of `c-loop.c` with rdma-core: buffers move into the posts and come back with the completions.
//!
//! usage: safe ITERATIONS

use std::process::ExitCode;

use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::Rc;
use rdma_core::{
    Buffer, CompletionQueue, Completions, ConnectOptions, Device, EndpointOptions, Error, Opcode, Provider,
    QueuePair, RecvRequest, WorkRequest,
};

const SIZE: usize = 64;
const DEPTH: u32 = 64;

#[inline(never)]
fn measured(
    qp: &QueuePair<Rc, Rts>,
    cq: &CompletionQueue,
    mut input: Buffer,
    mut output: Buffer,
    iterations: u64,
) -> Result<u64, Error> {
    let mut completions = Completions::new();
    let mut received = 0;
    for i in 0..iterations {
        qp.post_recv(RecvRequest::new(input).id(2 * i))?;
        qp.post_send(WorkRequest::send(output).id(2 * i + 1))?;
        let (mut filled, mut sent) = (None, None);
        while filled.is_none() || sent.is_none() {
            for mut completion in cq.poll(&mut completions)? {
                let length = completion.result().expect("a success").len();
                if completion.opcode() == Opcode::Recv {
                    received += length as u64;
                    filled = completion.take_buffer();
                } else {
                    sent = completion.take_buffer();
                }
            }
        }
        (input, output) = (filled.expect("the receive's buffer"), sent.expect("the send's buffer"));
    }
    Ok(received)
}

fn main() -> Result<ExitCode, Error> {
    let iterations = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1000);
    let device = Device::list()?.into_iter().find(|device| device.provider() == Provider::System);
    let context = device.expect("a device of libibverbs").open()?;
    let pd = context.protection_domain()?;
    let mut buffers = pd.register(vec![0; 2 * SIZE])?.into_buffers(SIZE);
    let (input, output) = (buffers.next().expect("a buffer"), buffers.next().expect("a buffer"));
    let cq = context.completion_queue(2 * DEPTH).build()?;
    let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(DEPTH).max_recv(DEPTH).build()?;
    let endpoint = qp.endpoint(&EndpointOptions::default())?;
    let qp = qp.connect(&endpoint, &endpoint, &ConnectOptions::default())?;
    let received = measured(&qp, &cq, input, output, iterations)?;
    println!("{received} bytes received");
    Ok(if received == iterations * SIZE as u64 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
