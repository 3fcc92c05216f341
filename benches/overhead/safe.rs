//! The loop through `rdma_core`: buffers move into the posts and come back with the completions.

use std::time::Duration;

use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::Rc;
use rdma_core::{
    Buffer, CompletionQueue, Completions, ConnectOptions, EndpointOptions, Error, Opcode, QueuePair,
    RecvRequest, RemoteAccess, RemoteSlice, WorkRequest,
};

use crate::{DEPTH, Operation, SIZE, Which, timed};

pub(crate) fn run(device: Which, operation: Operation, iterations: u64) -> Duration {
    set_up_and_run(device, operation, iterations).expect("a loop without errors")
}

fn set_up_and_run(device: Which, operation: Operation, iterations: u64) -> Result<Duration, Error> {
    let context = device.open();
    let pd = context.protection_domain()?;
    let shared = pd.share(vec![0; SIZE], RemoteAccess::all())?;
    let mut buffers = pd.register(vec![0; 2 * SIZE])?.into_buffers(SIZE);
    let (input, mut output) = (buffers.next().expect("a buffer"), buffers.next().expect("a buffer"));
    let cq = context.completion_queue(2 * DEPTH).build()?;
    let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(DEPTH).max_recv(DEPTH).build()?;
    let endpoint = qp.endpoint(&EndpointOptions::default())?;
    let qp = qp.connect(&endpoint, &endpoint, &ConnectOptions::default())?;
    let remote = shared.remote();
    if operation == Operation::FetchAdd {
        output.set_len(8);
    }
    let mut result = Ok(());
    let time = timed(|| {
        result = match operation {
            Operation::Send | Operation::RecvFirst => messages(&qp, &cq, input, output, iterations),
            Operation::Write => {
                one_sided(&qp, &cq, output, iterations, |output| WorkRequest::write(output, remote))
            }
            Operation::Read => {
                one_sided(&qp, &cq, output, iterations, |output| WorkRequest::read(output, remote))
            }
            Operation::FetchAdd => {
                let word = RemoteSlice { len: 8, ..remote };
                one_sided(&qp, &cq, output, iterations, |output| WorkRequest::fetch_and_add(output, word, 1))
            }
        };
    });
    result.map(|()| time)
}

#[inline(never)]
fn messages(
    qp: &QueuePair<Rc, Rts>,
    cq: &CompletionQueue,
    mut input: Buffer,
    mut output: Buffer,
    iterations: u64,
) -> Result<(), Error> {
    let mut completions = Completions::new();
    for i in 0..iterations {
        qp.post_recv(RecvRequest::new(input).id(2 * i))?;
        qp.post_send(WorkRequest::send(output).id(2 * i + 1))?;
        let (mut filled, mut sent) = (None, None);
        while filled.is_none() || sent.is_none() {
            for mut completion in cq.poll(&mut completions)? {
                let length = completion.result().expect("a success").len();
                if completion.opcode() == Opcode::Recv {
                    assert_eq!(length, SIZE);
                    filled = completion.take_buffer();
                } else {
                    sent = completion.take_buffer();
                }
            }
        }
        (input, output) = (filled.expect("the receive's buffer"), sent.expect("the send's buffer"));
    }
    Ok(())
}

#[inline(never)]
fn one_sided(
    qp: &QueuePair<Rc, Rts>,
    cq: &CompletionQueue,
    mut buffer: Buffer,
    iterations: u64,
    request: impl Fn(Buffer) -> WorkRequest<'static, Rc>,
) -> Result<(), Error> {
    let mut completions = Completions::new();
    for i in 0..iterations {
        qp.post_send(request(buffer).id(i))?;
        let mut back = None;
        while back.is_none() {
            for mut completion in cq.poll(&mut completions)? {
                completion.result().expect("a success");
                back = completion.take_buffer();
            }
        }
        buffer = back.expect("the buffer");
    }
    Ok(())
}
