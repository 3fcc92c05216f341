//! Futures on a device that misbehaves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use bytes::Bytes;
use rdma_async::{Config, Domain, Ended, OperationError, UdConfig, UdEndpoint, WaitMode};
use rdma_core::Device;
use tokio::time::timeout;
use verbs_sys::{evil, ibv_qp_state, ibv_wc_opcode, ibv_wc_status};

/// The errno of input and output errors.
const EIO: i32 = 5;
const LIMIT: Duration = Duration::from_secs(10);
const MODES: [WaitMode; 3] = [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive];

fn domain(evil: &evil::Evil) -> Domain {
    Domain::new(&Device::evil(evil.name()).unwrap().open().unwrap()).unwrap()
}

fn fail_sends(evil: &evil::Evil) {
    evil.completion.tell(|wc| {
        if wc.opcode == ibv_wc_opcode::IBV_WC_SEND {
            wc.status = ibv_wc_status::IBV_WC_LOC_PROT_ERR;
        }
    });
}

#[tokio::test]
async fn a_datagram_that_failed_does_not_end_its_endpoint() {
    for mode in MODES {
        let evil = evil::device();
        let domain = domain(evil);
        let mut config = UdConfig::default();
        config.wait_mode = mode;
        let endpoint = UdEndpoint::new(&domain, &config).unwrap();
        let (result, _) = endpoint.send_to(Bytes::from("first"), &endpoint.address()).await;
        result.unwrap();

        fail_sends(evil);
        evil.qp_attr.tell(|attr| attr.qp_state = ibv_qp_state::IBV_QPS_SQE);
        let (result, back) = endpoint.send_to(Bytes::from("second"), &endpoint.address()).await;
        let error = result.unwrap_err();
        assert!(error.to_string().contains("protection"), "{error}");
        assert_eq!(back, "second");
        let counters = endpoint.counters();
        assert_eq!((counters.recovered, counters.failed), (1, 1), "{mode:?}");
        assert!(endpoint.ended().is_none(), "{mode:?}");

        evil.completion.stop();
        evil.qp_attr.stop();
        let (result, _) = endpoint.send_to(Bytes::from("third"), &endpoint.address()).await;
        result.unwrap();
        assert_eq!((endpoint.counters().recovered, endpoint.counters().completed), (1, 2), "{mode:?}");
    }
}

#[tokio::test]
async fn a_datagram_queue_that_cannot_be_brought_back_ends_its_endpoint() {
    let evil = evil::device();
    let domain = domain(evil);
    let endpoint = UdEndpoint::new(&domain, &UdConfig::default()).unwrap();
    fail_sends(evil);
    evil.qp_attr.tell(|attr| attr.qp_state = ibv_qp_state::IBV_QPS_SQE);
    evil.modify_qp.fail(EIO);
    let (result, _) = endpoint.send_to(Bytes::from("lost"), &endpoint.address()).await;
    result.unwrap_err();
    let reason = endpoint.ended().expect("it cannot send any more");
    assert!(reason.to_string().contains("ibv_modify_qp"), "{reason}");
    // Nothing waits for ever.
    let received = timeout(LIMIT, endpoint.recv_from()).await.unwrap();
    assert!(matches!(received, Err(OperationError::Ended(_))), "{received:?}");
    let (sent, _) =
        timeout(LIMIT, endpoint.send_to(Bytes::from("later"), &endpoint.address())).await.unwrap();
    assert!(matches!(sent, Err(OperationError::Ended(_))), "{sent:?}");
}

#[tokio::test]
async fn a_receive_that_failed_ends_its_endpoint() {
    let evil = evil::device();
    let domain = domain(evil);
    let endpoint = UdEndpoint::new(&domain, &UdConfig::default()).unwrap();
    evil.completion.tell(|wc| {
        if wc.opcode == ibv_wc_opcode::IBV_WC_RECV {
            wc.status = ibv_wc_status::IBV_WC_LOC_LEN_ERR;
        }
    });
    let (result, _) = endpoint.send_to(Bytes::from("too long"), &endpoint.address()).await;
    result.unwrap();
    let received = timeout(LIMIT, endpoint.recv_from()).await.unwrap();
    assert!(matches!(received, Err(OperationError::Completion(_))), "{received:?}");
    assert!(matches!(endpoint.ended(), Some(Ended::Failed(_))), "{:?}", endpoint.ended());
    let later = timeout(LIMIT, endpoint.send_to(Bytes::from("later"), &endpoint.address())).await.unwrap();
    assert!(matches!(later.0, Err(OperationError::Ended(_))), "{later:?}");
}

#[tokio::test]
async fn a_queue_that_cannot_be_read_ends_what_waits() {
    for mode in MODES {
        let evil = evil::device();
        let domain = domain(evil);
        let config = Config::rc().wait_mode(mode).keep_alive(None);
        let (a, _b) = common::pair(&domain, &config).await;
        let mut buffer = a.pool().acquire().await;
        buffer.set_len(8);
        evil.poll_cq.fail(EIO);
        let (result, buffer) = timeout(LIMIT, a.send(buffer)).await.unwrap();
        let error = result.unwrap_err();
        assert!(error.to_string().contains("ibv_poll_cq"), "{mode:?}: {error}");
        assert_eq!(buffer.len(), 8, "the buffer came back");
        timeout(LIMIT, a.recv()).await.unwrap().unwrap_err();
    }
}

/// The memory of receives that never complete is leaked; who waits for messages holds none, and waits no longer.
#[tokio::test]
async fn a_queue_pair_that_cannot_be_destroyed_ends_who_waits_for_messages() {
    const EBUSY: i32 = 16;
    for mode in MODES {
        let evil = evil::device();
        let domain = domain(evil);
        let config = Config::rc().wait_mode(mode).keep_alive(None);
        let (a, _b) = common::pair(&domain, &config).await;
        evil.hold();
        evil.destroy_qp.fail(EBUSY);
        let deadline = Duration::from_millis(20);
        let received = timeout(LIMIT, a.with_deadline(deadline, a.recv())).await.unwrap();
        assert!(
            matches!(received, Err(OperationError::Ended(Ended::Deadline { .. }))),
            "{mode:?}: {received:?}"
        );
        let later = timeout(LIMIT, a.recv()).await.unwrap();
        assert!(matches!(later, Err(OperationError::Ended(_))), "{mode:?}: {later:?}");
        assert!(rdma_core::leaks() > 0);
    }
}

/// Of a batch that the device refuses in the middle, what stands before was posted without a completion of its own.
#[tokio::test]
async fn a_batch_that_the_device_refuses_in_the_middle_ends() {
    const EINVAL: i32 = 22;
    for mode in MODES {
        for (works, for_ever, omits) in
            [(1, false, false), (3, false, false), (3, true, false), (3, false, true), (0, false, true)]
        {
            let evil = evil::device();
            evil.omit_bad_wr(omits);
            let domain = domain(evil);
            let config = Config::rc().wait_mode(mode).keep_alive(None);
            let (a, _b) = common::pair(&domain, &config).await;
            let mut batch = a.batch();
            for length in 1..=6 {
                let mut buffer = a.pool().acquire().await;
                buffer.set_len(length);
                batch = batch.send(buffer);
            }
            if for_ever {
                evil.post_send.fail_after(works, EINVAL);
            } else {
                evil.post_send.fail_once_after(works, EINVAL);
            }
            let (result, buffers) = timeout(LIMIT, batch.post()).await.unwrap();
            let error = result.unwrap_err();
            let lengths = buffers.iter().map(|buffer| buffer.len()).collect::<Vec<_>>();
            assert_eq!(lengths, [1, 2, 3, 4, 5, 6], "{mode:?}, {error}");
            // It goes on if the device takes what ends the run, and it is clear what was posted.
            assert_eq!(a.ended().is_some(), for_ever || omits, "{mode:?}, {error}");
            match error {
                OperationError::Post(_) => assert!(!for_ever && !omits, "{mode:?}"),
                OperationError::Ended(Ended::Device { .. }) => assert!(for_ever || omits, "{mode:?}"),
                other => panic!("{mode:?}: {other}"),
            }
            evil.post_send.work();
        }
    }
}

/// Receives that are posted at once, of which the device refuses some: those that are known come back, and show when none is left. If the
/// device does not say which they are, nothing is known, and the connection ends.
#[tokio::test]
async fn receives_that_the_device_refuses_do_not_make_others_wait() {
    for (mode, omits) in MODES.into_iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let evil = evil::device();
        let domain = domain(evil);
        let config =
            Config::rc().wait_mode(mode).keep_alive(None).receive_depth(4).spare_buffers(12).send_depth(8);
        // Its queue pairs are their own peers.
        let (a, _b) = common::pair(&domain, &config).await;
        for _ in 0..4 {
            a.send(a.pool().acquire().await).await.0.unwrap();
        }
        evil.omit_bad_wr(omits);
        // The first message is received alone, the others with one call.
        evil.post_recv.fail_after(2, EIO);
        let mut messages = Vec::new();
        while messages.len() < 4 {
            timeout(LIMIT, a.recv_many(&mut messages, 4)).await.unwrap().unwrap();
        }
        drop(messages);
        if omits {
            assert!(matches!(a.ended(), Some(Ended::Device { .. })), "{mode:?}: {:?}", a.ended());
        } else {
            assert!(a.ended().is_none(), "{mode:?}: {:?}", a.ended());
            // Two receives are posted.
            for _ in 0..2 {
                a.send(a.pool().acquire().await).await.0.unwrap();
                timeout(LIMIT, a.recv()).await.unwrap().unwrap();
            }
        }
        let error = timeout(LIMIT, a.recv()).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("ibv_post_recv"), "{mode:?}, {omits}: {error}");
    }
}
