use rdma_core::qp::state::*;
use rdma_core::qp::transport::*;
use rdma_core::*;

fn main() {}

fn f(qp: QueuePair<Rc, Init>, rts: &RcRts) {
    let _ = qp.rts(rts);
}
