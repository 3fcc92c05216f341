//! Completion queues whose completions carry a time, on the device under test.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::Rc;
use rdma_core::{
    Buffer, CompletionClock, CompletionQueue, Completions, ConnectOptions, Context, EndpointOptions, Error,
    ProtectionDomain, QueuePair, WorkRequest,
};
use support::{LIMIT, open, skip};

/// A pair connected to itself.
struct Looped {
    pd: ProtectionDomain,
    qp: QueuePair<Rc, Rts>,
}

impl Looped {
    fn new(context: &Context, cq: &CompletionQueue) -> Looped {
        let pd = context.protection_domain().unwrap();
        let qp = pd.queue_pair::<Rc>(cq, cq).max_send(4).max_recv(4).build().unwrap();
        let endpoint = qp.endpoint(&EndpointOptions::default()).unwrap();
        let qp = qp.connect(&endpoint, &endpoint, &ConnectOptions::default()).unwrap();
        Looped { pd, qp }
    }

    fn buffer(&self) -> Buffer {
        self.pd.allocate(8).unwrap().into_buffer()
    }
}

/// A queue with timestamps, or the reason why there is none.
fn stamped(context: &Context, clock: CompletionClock) -> Option<CompletionQueue> {
    match context.completion_queue(16).timestamps(clock).build() {
        Ok(cq) => Some(cq),
        Err(Error::Unsupported { verb }) => {
            assert!(verb.contains("create_cq_ex"), "{verb}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The times of a SEND that is polled for, and of its receive.
fn times(looped: &Looped, cq: &CompletionQueue) -> Vec<(u64, Option<u64>)> {
    looped.qp.post_recv(looped.buffer()).unwrap();
    looped.qp.post_send(WorkRequest::send_with_imm(looped.buffer(), 77).id(1)).unwrap();
    let (mut times, mut completions) = (Vec::new(), Completions::new());
    let start = std::time::Instant::now();
    while times.len() < 2 {
        assert!(start.elapsed() < LIMIT);
        for mut completion in cq.poll(&mut completions).unwrap() {
            let success = completion.result().unwrap();
            assert_eq!(success.imm(), (completion.id() == 0).then_some(77));
            times.push((completion.id(), success.timestamp()));
            assert_eq!(completion.take_buffer().unwrap().len(), 8);
        }
    }
    times
}

#[test]
fn completions_carry_the_devices_clock() {
    let context = open();
    let Some(cq) = stamped(&context, CompletionClock::Device) else {
        return skip("completions_carry_the_devices_clock", "the device stamps no completions");
    };
    assert!(context.attributes().unwrap().timestamp_mask > 0);
    let looped = Looped::new(&context, &cq);
    let before = context.clock().unwrap();
    let polled = times(&looped, &cq);
    // The same for those who wait for one operation.
    let received = looped.qp.start_recv(looped.buffer()).unwrap();
    let sent = looped.qp.start_send(looped.buffer()).unwrap();
    let waited = [sent.wait(LIMIT).unwrap(), received.wait(LIMIT).unwrap()];
    let after = context.clock().unwrap();
    let waited = waited.iter().map(|finished| finished.result().unwrap().timestamp());
    for time in polled.iter().map(|(_, time)| *time).chain(waited) {
        let time = time.expect("a timestamp was asked for");
        assert!((before..=after).contains(&time), "{before} <= {time} <= {after}");
    }
    drop(looped);
    assert_eq!(cq.credits_in_use(), 0);
}

#[test]
fn completions_carry_the_time_of_day() {
    let context = open();
    let Some(cq) = stamped(&context, CompletionClock::Wall) else {
        return skip(
            "completions_carry_the_time_of_day",
            "the device stamps no completions with the time of day",
        );
    };
    let looped = Looped::new(&context, &cq);
    for (_, time) in times(&looped, &cq) {
        let time = UNIX_EPOCH + Duration::from_nanos(time.expect("a timestamp was asked for"));
        let now = SystemTime::now();
        let apart = now.duration_since(time).or_else(|_| time.duration_since(now)).unwrap();
        assert!(apart < LIMIT, "{apart:?} from now");
    }
}

#[test]
fn a_failure_on_a_stamped_queue_is_a_failure() {
    let context = open();
    let Some(cq) = stamped(&context, CompletionClock::Device) else {
        return skip("a_failure_on_a_stamped_queue_is_a_failure", "the device stamps no completions");
    };
    let looped = Looped::new(&context, &cq);
    let receive = looped.qp.start_recv(looped.buffer()).unwrap();
    looped.qp.handle().abort().unwrap();
    let finished = receive.wait(LIMIT).unwrap();
    let error = finished.result().unwrap_err();
    assert!(error.is_flush(), "{error}");
}

#[test]
fn who_asks_for_no_time_gets_none() {
    let context = open();
    let cq = context.completion_queue(16).build().unwrap();
    let looped = Looped::new(&context, &cq);
    assert!(times(&looped, &cq).iter().all(|(_, time)| time.is_none()));
}
