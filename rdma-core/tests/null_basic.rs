//! The first slice on the null provider.

#![cfg(feature = "test-providers")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

use std::time::Duration;

use rdma_core::qp::transport::Rc;
use rdma_core::{
    Completions, ConnectOptions, Device, EndpointOptions, Opcode, PostErrorKind, RecvRequest, WorkRequest,
};

#[test]
fn send_and_receive() {
    let context = Device::null().unwrap().open().unwrap();
    let pd = context.protection_domain().unwrap();
    let cq = context.completion_queue(16).build().unwrap();
    let qp = pd.queue_pair::<Rc>(&cq, &cq).max_send(4).max_recv(4).build().unwrap();
    let local = qp.endpoint(&EndpointOptions::default()).unwrap();
    let qp = qp.connect(&local, &local, &ConnectOptions::default()).unwrap();
    let mut buffers = pd.allocate(4096).unwrap().into_buffers(64);
    let mut completions = Completions::new();
    for round in 0..100 {
        let (a, b) = if round == 0 {
            (buffers.next().unwrap(), buffers.next().unwrap())
        } else {
            let mut back = Vec::new();
            for mut completion in cq.poll(&mut completions).unwrap() {
                assert!(completion.result().is_ok());
                assert_eq!(completion.id() == 7, completion.opcode() == Opcode::Recv);
                back.push(completion.take_buffer().unwrap());
            }
            assert_eq!(back.len(), 2);
            (back.pop().unwrap(), back.pop().unwrap())
        };
        qp.post_recv(RecvRequest::new(a).id(7)).unwrap();
        qp.post_send(b).unwrap();
    }
    assert_eq!(cq.credits_in_use(), 2);
    assert_eq!(cq.poll(&mut completions).unwrap().len(), 2);
    assert_eq!(cq.credits_in_use(), 0);
    assert_eq!(cq.stray_completions(), 0);

    // Owned operations, and back-pressure.
    let receive = qp.start_recv(buffers.next().unwrap()).unwrap();
    let send = qp.start_send(WorkRequest::send_with_imm(buffers.next().unwrap(), 9)).unwrap();
    assert!(!send.is_finished());
    let sent = send.wait(Duration::from_secs(1)).unwrap();
    assert!(sent.result().is_ok());
    let received = receive.try_finish().unwrap();
    assert_eq!(received.result().unwrap().imm(), Some(9));
    assert_eq!(received.into_buffer().unwrap().len(), 64);

    for _ in 0..4 {
        qp.post_send(buffers.next().unwrap()).unwrap();
    }
    let full = qp.post_send(buffers.next().unwrap()).unwrap_err();
    assert_eq!(full.kind, PostErrorKind::QueueFull);
    assert_eq!(full.request.into_payload().into_buffers().count(), 1);
}
