//! What the manual pages promise of several threads, of queues that are full, and of objects and processes that end, through the C
//! interface.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use verbs_sys::inline::*;
use verbs_sys::*;

/// Lent to several threads.
#[derive(Clone, Copy)]
struct Shared<'e>(&'e End);
unsafe impl Send for Shared<'_> {}
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    fn end(&self) -> &End {
        self.0
    }
}

/// Puts an extended completion queue of `cqe` and an extended queue pair into the place of those that an end has.
fn extend(end: &mut End, cqe: u32, depth: u32) {
    let mut cq_init: ibv_cq_init_attr_ex = zeroed();
    (cq_init.cqe, cq_init.channel) = (cqe, end.channel);
    let mut init: ibv_qp_init_attr_ex = zeroed();
    unsafe {
        assert_eq!((v().ibv_destroy_qp)(end.qp), 0);
        assert_eq!((v().ibv_destroy_cq)(end.cq), 0);
        end.cq = ibv_create_cq_ex(end.context, &mut cq_init).cast();
        assert!(!end.cq.is_null());
        (init.send_cq, init.recv_cq, init.pd) = (end.cq, end.cq, end.pd);
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        init.cap = ibv_qp_cap {
            max_send_wr: depth,
            max_recv_wr: depth,
            max_send_sge: 1,
            max_recv_sge: 1,
            ..zeroed()
        };
        init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0
            | ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS.0;
        init.send_ops_flags = ibv_qp_create_send_ops_flags::IBV_QP_EX_WITH_RDMA_WRITE.0.into();
        end.qp = ibv_create_qp_ex(end.context, &mut init);
        assert!(!end.qp.is_null());
    }
}

/// A queue pair in the place of the one of an end that was destroyed.
fn new_qp(end: &End) -> *mut ibv_qp {
    let mut init: ibv_qp_init_attr = zeroed();
    (init.send_cq, init.recv_cq, init.qp_type) = (end.cq, end.cq, ibv_qp_type::IBV_QPT_RC);
    init.cap = ibv_qp_cap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, ..zeroed() };
    let qp = unsafe { (v().ibv_create_qp)(end.pd, &mut init) };
    assert!(!qp.is_null());
    qp
}

/// Two extended ends.
fn extended_pair() -> (End, End) {
    let (mut a, b) = (End::new(Options::default()), End::new(Options::default()));
    extend(&mut a, 128, 64);
    a.connect(b.address());
    b.connect(a.address());
    (a, b)
}

/// One completion by the cursor, within `start_poll` and `end_poll`: number, and the fields that belong to it.
fn poll_ex(cq: *mut ibv_cq_ex) -> Option<(u64, ibv_wc_status, u32)> {
    unsafe {
        if (*cq).start_poll.unwrap()(cq, &mut zeroed()) != 0 {
            return None;
        }
        let before = ((*cq).wr_id, (*cq).status, (*cq).read_qp_num.unwrap()(cq));
        std::hint::spin_loop();
        assert_eq!(((*cq).wr_id, (*cq).status, (*cq).read_qp_num.unwrap()(cq)), before, "of one completion");
        (*cq).end_poll.unwrap()(cq);
        Some(before)
    }
}

/// `man ibv_wr_post`, CONCURRENCY, and `man ibv_create_cq_ex`: from `wr_start` to `wr_complete` or `wr_abort`, and from `start_poll` to
/// `end_poll`, others wait. Two threads post, two poll, and every request completes once, with the fields that are its own.
#[test]
fn threads_take_turns_in_sections() {
    const EACH: u64 = 20_000;
    let (a, b) = extended_pair();
    let (to, sge) = (b.address(), a.sge(0, 1));
    let ended = AtomicBool::new(false);
    let seen = Mutex::new(vec![0_u8; 2 * EACH as usize]);
    let completed = (0..2 * EACH).filter(|&number| !is_aborted(number)).count() as u64;
    let shared = Shared(&a);
    std::thread::scope(|scope| {
        let posters = [0, 1].map(|thread| {
            scope.spawn(move || unsafe {
                let qp = (v().ibv_qp_to_qp_ex.unwrap())(shared.end().qp);
                let mut next = thread * EACH;
                while next < (thread + 1) * EACH {
                    (*qp).wr_start.unwrap()(qp);
                    (*qp).wr_id = next;
                    (*qp).wr_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
                    (*qp).wr_rdma_write.unwrap()(qp, to.rkey, to.va);
                    (*qp).wr_set_sge.unwrap()(qp, sge.lkey, sge.addr, 1);
                    if is_aborted(next) {
                        (*qp).wr_abort.unwrap()(qp);
                        next += 1;
                        continue;
                    }
                    match (*qp).wr_complete.unwrap()(qp) {
                        0 => next += 1,
                        libc::ENOMEM => std::thread::yield_now(),
                        code => panic!("wr_complete: {code}"),
                    }
                }
            })
        });
        let pollers = [(); 2].map(|()| {
            scope.spawn(|| {
                let end = shared.end();
                let qp_num = unsafe { (*end.qp).qp_num };
                loop {
                    let last = ended.load(Ordering::SeqCst);
                    match poll_ex(end.cq.cast()) {
                        Some((wr_id, status, number)) => {
                            assert_eq!((status, number), (ibv_wc_status::IBV_WC_SUCCESS, qp_num));
                            seen.lock().unwrap()[wr_id as usize] += 1;
                        }
                        None if last => break,
                        None => std::thread::yield_now(),
                    }
                }
            })
        });
        posters.into_iter().for_each(|thread| thread.join().unwrap());
        // Behind the last one nothing comes.
        let begin = Instant::now();
        while seen.lock().unwrap().iter().map(|&n| u64::from(n)).sum::<u64>() < completed {
            assert!(begin.elapsed() < Duration::from_secs(20), "all complete");
            std::thread::yield_now();
        }
        ended.store(true, Ordering::SeqCst);
        pollers.into_iter().for_each(|thread| thread.join().unwrap());
    });
    for (number, &times) in (0..).zip(seen.lock().unwrap().iter()) {
        assert_eq!(times, u8::from(!is_aborted(number)), "request {number}");
    }
}

/// Whether a request is taken back.
fn is_aborted(number: u64) -> bool {
    number % 14 == 7
}

/// A thread that did not begin builds nothing, and ends nothing of others.
#[test]
fn what_others_call_in_a_section_is_refused() {
    let (a, b) = extended_pair();
    let (to, sge) = (b.address(), a.sge(0, 1));
    let qp = unsafe { (v().ibv_qp_to_qp_ex.unwrap())(a.qp) };
    let write = |wr_id| unsafe {
        (*qp).wr_id = wr_id;
        (*qp).wr_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        (*qp).wr_rdma_write.unwrap()(qp, to.rkey, to.va);
        (*qp).wr_set_sge.unwrap()(qp, sge.lkey, sge.addr, 1);
    };
    write(1);
    unsafe {
        assert_eq!((*qp).wr_complete.unwrap()(qp), libc::EINVAL, "without wr_start");
        (*qp).wr_start.unwrap()(qp);
    }
    write(2);
    let shared = Shared(&a);
    std::thread::scope(|scope| {
        let other = move || unsafe {
            let qp = (v().ibv_qp_to_qp_ex.unwrap())(shared.end().qp);
            (*qp).wr_complete.unwrap()(qp)
        };
        assert_eq!(scope.spawn(other).join().unwrap(), libc::EINVAL);
    });
    unsafe { assert_eq!((*qp).wr_complete.unwrap()(qp), 0) };
    assert_eq!(a.wait_success().wr_id, 2);
    assert!(a.poll().is_none());
}

impl Shared<'_> {
    fn wait_successes(&self, count: usize) {
        for _ in 0..count {
            self.0.wait_success();
        }
    }
}

/// A request keeps its place until its completion is polled (clause 10.8.5), flushed or not: so a completion queue with a place for each
/// does not overrun, whatever the program posts.
#[test]
fn a_request_keeps_its_place_until_it_is_polled() {
    for srq in [false, true] {
        let (a, b) = pair(Options { depth: 8, srq, ..Options::default() });
        for round in 0..3 {
            let taken = (0..20).take_while(|&i| b.post_recv(i, 0, 8) == 0).count();
            assert_eq!(taken, 8, "receives of round {round}, shared: {srq}");
            for i in 0..8 {
                assert_eq!(a.send(i, 0, 8), 0);
            }
            Shared(&a).wait_successes(8);
            assert_eq!(b.post_recv(9, 0, 8), libc::ENOMEM, "they have completed, and were not polled");
            b.wait_success();
            assert_eq!(b.post_recv(9, 0, 8), 0);
            assert_eq!(a.send(9, 0, 8), 0);
            Shared(&b).wait_successes(8);
            a.wait_success();
        }
        // Sends, of which nobody polls.
        let write = || a.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, 1, 0, 8, b.address(), 0);
        let begin = Instant::now();
        let mut taken = 0;
        while begin.elapsed() < Duration::from_millis(50) {
            taken += u32::from(write() == 0);
        }
        assert_eq!(taken, 8);
        a.wait_success();
        assert_eq!(write(), 0);
        Shared(&a).wait_successes(8);

        // And in ERR.
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = ibv_qp_state::IBV_QPS_ERR;
        assert_eq!(a.modify(&mut attr, ibv_qp_attr_mask::IBV_QP_STATE), 0);
        for _ in 0..2 {
            assert_eq!((0..100).filter(|_| write() == 0).count(), 8);
            if !srq {
                assert_eq!((0..100).filter(|&i| a.post_recv(i, 0, 8) == 0).count(), 8);
            }
            let mut flushed = 0;
            while let Some(wc) = a.poll() {
                assert_eq!(wc.status, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
                flushed += 1;
            }
            assert_eq!(flushed, if srq { 8 } else { 16 });
        }
        // A reset forgets them all.
        assert_eq!((write(), write()), (0, 0));
        attr.qp_state = ibv_qp_state::IBV_QPS_RESET;
        assert_eq!(a.modify(&mut attr, ibv_qp_attr_mask::IBV_QP_STATE), 0);
        a.to_init();
        if !srq {
            assert_eq!((0..100).filter(|&i| a.post_recv(i, 0, 8) == 0).count(), 8);
        }
    }
}

/// The event of a completion queue that waits for more completions does not come when the queue is gone.
#[test]
fn no_event_of_a_queue_that_is_gone() {
    let (mut a, mut b) = pair(Options { events: true, ..Options::default() });
    set_nonblocking(unsafe { (*b.channel).fd });
    let mask = ibv_cq_attr_mask::IBV_CQ_ATTR_MODERATE.0;
    let mut attr =
        ibv_modify_cq_attr { attr_mask: mask, moderate: ibv_moderate_cq { cq_count: 100, cq_period: 2000 } };
    for _ in 0..10 {
        assert_eq!(unsafe { ibv_modify_cq(b.cq, &mut attr) }, 0);
        assert_eq!(unsafe { ibv_req_notify_cq(b.cq, 0) }, 0);
        assert_eq!(b.post_recv(1, 0, 100), 0);
        assert_eq!(a.send(1, 0, 8), 0);
        a.wait_success();
        extend(&mut b, 16, 8);
        std::thread::sleep(Duration::from_millis(6));
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        assert_eq!(unsafe { (v().ibv_get_cq_event)(b.channel, &mut cq, &mut context) }, -1);
        extend(&mut a, 16, 8);
        a.connect(b.address());
        b.connect(a.address());
    }
}

/// `man ibv_get_async_event`: to destroy an object waits for the acknowledgement of its events, also of those that are taken
/// meanwhile; and one that is not destroyed keeps its events.
#[test]
fn events_and_the_end_of_their_objects() {
    let (_a, mut d) = pair(Options { srq: true, ..Options::default() });
    // Two events: of a queue pair with a shared receive queue each change to ERR is one.
    for _ in 0..2 {
        for state in [ibv_qp_state::IBV_QPS_ERR, ibv_qp_state::IBV_QPS_RESET] {
            let mut attr: ibv_qp_attr = zeroed();
            attr.qp_state = state;
            assert_eq!(d.modify(&mut attr, ibv_qp_attr_mask::IBV_QP_STATE), 0);
        }
    }
    set_nonblocking(unsafe { (*d.context).async_fd });
    let get = || {
        let mut event: ibv_async_event = zeroed();
        let code = unsafe { (v().ibv_get_async_event)(d.context, &mut event) };
        (code == 0).then_some(event)
    };
    let mut first = get().unwrap();
    assert_eq!(first.event_type, ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED);
    // Refused, as the program still has the first; the second is not lost by that.
    assert_eq!(unsafe { (v().ibv_destroy_qp)(d.qp) }, libc::EBUSY);
    let mut second = get().unwrap();
    assert_eq!(unsafe { second.element.qp }, d.qp);
    unsafe {
        (v().ibv_ack_async_event)(&mut second);
        (v().ibv_ack_async_event)(&mut first);
        assert_eq!((v().ibv_destroy_qp)(d.qp), 0);
    }
    assert!(get().is_none());
    d.qp = new_qp(&d);
}

/// The program saw the message, so the peer sees its send complete, though the queue pair is destroyed at once, maybe while another thread
/// takes the packet.
#[test]
fn a_message_that_was_seen_is_acknowledged_before_its_queue_pair_goes() {
    let options = Options { timeout: 10, retry: 1, ..Options::default() };
    for round in 0..200 {
        let (a, mut b) = pair(options);
        assert_eq!(b.post_recv(1, 0, 100), 0);
        // With a send of its own in flight, too.
        assert_eq!(a.post_recv(1, 0, 100), 0);
        let shared = Shared(&a);
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let a = shared.end();
                assert_eq!(a.send(2, 0, 8), 0);
                loop {
                    let wc = a.wait();
                    if wc.wr_id == 2 {
                        return wc.status;
                    }
                }
            });
            assert_eq!(b.send(3, 0, 8), 0);
            while b.wait().wr_id != 1 {}
            assert_eq!(unsafe { (v().ibv_destroy_qp)(b.qp) }, 0);
            assert_eq!(sender.join().unwrap(), ibv_wc_status::IBV_WC_SUCCESS, "round {round}");
        });
        b.qp = new_qp(&b);
    }
}

/// An adapter acknowledges for a program that has ended. Here the process does as it ends.
#[test]
fn a_process_that_ends_has_acknowledged_what_it_saw() {
    const NAME: &str = "a_process_that_ends_has_acknowledged_what_it_saw";
    let options = Options { timeout: 10, retry: 2, ..Options::default() };
    if std::env::var_os("ABI_SECTIONS_CHILD").is_some() {
        let end = End::new(options);
        println!("ADDRESS {}", end.address().to_line());
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        end.connect(Address::from_line(&line));
        assert_eq!(end.post_recv(1, 0, 100), 0);
        println!("READY");
        end.wait_success();
        std::process::exit(0);
    }
    for round in 0..10 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([NAME, "--exact", "--nocapture"])
            .env("ABI_SECTIONS_CHILD", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut line_with = |word: &str| loop {
            let line = lines.next().expect("the child ended early").unwrap();
            if let Some((_, rest)) = line.split_once(word) {
                return rest.to_owned();
            }
        };
        let peer = Address::from_line(&line_with("ADDRESS "));
        let end = End::new(options);
        writeln!(child.stdin.take().unwrap(), "{}", end.address().to_line()).unwrap();
        end.connect(peer);
        line_with("READY");
        assert_eq!(end.send(2, 0, 8), 0);
        assert_eq!(end.wait().status, ibv_wc_status::IBV_WC_SUCCESS, "round {round}");
        assert!(child.wait().unwrap().success());
    }
}

/// Several threads poll, and each posts as many receives to the shared queue as it polled: there is a place for each.
#[test]
fn a_shared_receive_that_was_polled_has_left_its_place() {
    let (a, b) = pair(Options { depth: 8, srq: true, ..Options::default() });
    for i in 0..8 {
        assert_eq!(b.post_recv(i, 0, 8), 0);
    }
    let (a, b, stop) = (Shared(&a), Shared(&b), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if let Some(wc) = b.end().poll() {
                        assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
                        assert_eq!(b.end().post_recv(wc.wr_id, 0, 8), 0);
                    }
                }
            });
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(2) {
            let _ = a.end().send(1, 0, 8);
            while let Some(wc) = a.end().poll() {
                assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
