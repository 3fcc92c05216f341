use rdma_core::qp::state::*;
use rdma_core::qp::transport::*;
use rdma_core::*;

fn main() {}

fn f(qp: QueuePair<Rc, Reset>, init: &ConnectedInit) -> u32 {
    let _ = qp.init(init);
    qp.num()
}
