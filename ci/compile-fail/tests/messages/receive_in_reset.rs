use rdma_core::qp::state::*;
use rdma_core::qp::transport::*;
use rdma_core::*;

fn main() {}

fn f(qp: &QueuePair<Rc, Reset>, buffer: Buffer) {
    let _ = qp.post_recv(buffer);
}
