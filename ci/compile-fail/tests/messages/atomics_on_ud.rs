use rdma_core::qp::state::*;
use rdma_core::qp::transport::*;
use rdma_core::*;

fn main() {}

fn f(buffer: Buffer, remote: RemoteSlice) -> WorkRequest<'static, Ud> {
    WorkRequest::compare_and_swap(buffer, remote, 0, 1)
}
