use rdma_core::qp::state::*;
use rdma_core::qp::transport::*;
use rdma_core::*;

fn main() {}

fn f(qp: &QueuePair<Rc, Rts>, buffer: Buffer, to: &AddressHandle) {
    let _ = qp.post_send(WorkRequest::send_to(buffer, to, 7, 8));
}
