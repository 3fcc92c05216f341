//! Many queue pairs on one device: what an idle one costs, and how active ones share the device.
//!
//! Each test runs in a process of its own, whose memory, processor time and device are its alone.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use verbs_sys::*;

const CHILD: &str = "ABI_MANY_CHILD";
/// Set to the length of each RDMA WRITE where that is not [`WRITE`].
const LENGTH: &str = "ABI_MANY_LENGTH";
const IDLE: usize = 10_000;
const ACTIVE: usize = 1_000;
/// All that is outstanding fits the socket's buffer, where the system grants one of 8 MiB: it is sharing that is looked
/// at, not loss.
const WRITE: usize = 1024;
/// And this is twice as much as it holds: it is looked at what comes of that.
const TOO_MUCH: &str = "4096";
/// Requests that each active queue pair keeps outstanding, and how many it completes on average.
const DEPTH: u32 = 4;
const EACH: usize = 50;

fn length() -> usize {
    std::env::var(LENGTH).map_or(WRITE, |length| length.parse().unwrap())
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs a test of this binary in a process of its own and returns what it printed.
fn in_process(test: &str, variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .envs(variables.iter().copied())
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for line in text.lines().filter(|line| line.starts_with("FIGURE")) {
        println!("{line}");
    }
    text
}

/// Queue pairs that share all other objects.
struct Crowd {
    /// Its own queue pair is one of them.
    end: End,
    others: Vec<*mut ibv_qp>,
}

impl Crowd {
    /// `count` queue pairs of `depth` either way, with one element per request.
    fn new(count: usize, depth: u32, options: Options) -> Crowd {
        let end = End::new(options);
        let mut init: ibv_qp_init_attr = zeroed();
        (init.send_cq, init.recv_cq, init.qp_type) = (end.cq, end.cq, options.qp_type);
        init.cap = ibv_qp_cap {
            max_send_wr: depth,
            max_recv_wr: depth,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let create = |_| {
            let qp = unsafe { (v().ibv_create_qp)(end.pd, &mut init.clone()) };
            assert!(!qp.is_null());
            qp
        };
        let others = (1..count).map(create).collect();
        Crowd { end, others }
    }

    fn addresses(&self) -> Vec<Address> {
        let own = self.end.address();
        let number = |qp: &*mut ibv_qp| Address { qp_num: unsafe { (**qp).qp_num }, ..own };
        std::iter::once(own).chain(self.others.iter().map(number)).collect()
    }

    /// Lets `f` use each queue pair in turn as if it were the end's.
    fn each(&mut self, mut f: impl FnMut(usize, &End)) {
        f(0, &self.end);
        let own = self.end.qp;
        for (n, qp) in self.others.iter().enumerate() {
            self.end.qp = *qp;
            f(n + 1, &self.end);
        }
        self.end.qp = own;
    }

    fn connect(&mut self, peers: &[Address]) {
        self.each(|n, end| end.connect(peers[n]));
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for qp in &self.others {
            assert_eq!(unsafe { (v().ibv_destroy_qp)(*qp) }, 0);
        }
    }
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

fn processor_time() -> Duration {
    let mut usage: libc::rusage = zeroed();
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) }, 0);
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

#[test]
#[ignore = "run by idle_queue_pairs_cost_little, in a process of its own"]
fn idle_child() {
    if !is_child() {
        return;
    }
    // What the first one brings along is not counted.
    drop(Crowd::new(2, 64, Options::default()));
    let before = resident();
    let mut crowd = Crowd::new(IDLE, 64, Options { depth: 1000, ..Options::default() });
    let mut peers = crowd.addresses();
    for couple in peers.chunks_mut(2) {
        couple.swap(0, 1);
    }
    crowd.connect(&peers);
    // Each has been used once.
    crowd.each(|n, end| {
        assert_eq!(end.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, n as u64, 0, 64, peers[n], 64), 0);
        end.wait_success();
    });
    let each = (resident() - before) / IDLE;
    // Timers and acknowledgements of the last ones end.
    std::thread::sleep(Duration::from_millis(300));
    let (begin, used) = (Instant::now(), processor_time());
    std::thread::sleep(Duration::from_secs(1));
    let share = (processor_time() - used).as_secs_f64() / begin.elapsed().as_secs_f64();
    println!(
        "FIGURE {IDLE} connected idle queue pairs: {each} bytes each, {:.2} % of a processor",
        share * 100.0
    );
    assert!(each <= 16 << 10, "{each} bytes each");
    assert!(share < 0.01, "idle costs {share} of a processor");
}

#[test]
fn idle_queue_pairs_cost_little() {
    in_process("idle_child", &[]);
}

/// Keeps all queue pairs busy with RDMA WRITEs until they have completed so many on average, and returns the least
/// and the mean that one of them completed. Which ones get on is the device's choice alone: the program treats all
/// alike.
fn share(crowd: &mut Crowd, peers: &[Address]) -> (usize, f64) {
    let limit = Instant::now() + Duration::from_secs(100);
    let mut place_of = HashMap::new();
    let length = length();
    let write = |end: &End, n: usize| {
        assert_eq!(end.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, n as u64, 0, length, peers[n], length), 0);
    };
    crowd.each(|n, end| {
        place_of.insert(unsafe { (*end.qp).qp_num }, n);
        (0..DEPTH).for_each(|_| write(end, n));
    });
    let qps: Vec<_> = std::iter::once(crowd.end.qp).chain(crowd.others.iter().copied()).collect();
    let mut completed = vec![0; qps.len()];
    let (own, mut total) = (crowd.end.qp, 0);
    while total < EACH * qps.len() {
        let Some(wc) = crowd.end.poll() else {
            assert!(Instant::now() < limit, "{total} after 100 s; {:?}", rdma_soft::counters());
            continue;
        };
        assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS, "{total}; {:?}", rdma_soft::counters());
        let n = place_of[&wc.qp_num];
        completed[n] += 1;
        total += 1;
        crowd.end.qp = qps[n];
        write(&crowd.end, n);
    }
    crowd.end.qp = own;
    (*completed.iter().min().unwrap(), total as f64 / completed.len() as f64)
}

fn report(what: &str, crowd: &mut Crowd, peers: &[Address]) {
    let begin = Instant::now();
    let (least, mean) = share(crowd, peers);
    let time = begin.elapsed().as_secs_f64();
    println!(
        "FIGURE {ACTIVE} active queue pairs, {what}: the slowest completed {least}, the mean {mean} ({time:.1} s)"
    );
    // Those that lose packets fall behind; that they do not fail is enough.
    let is_lossless = length() == WRITE;
    assert!(!is_lossless || least as f64 >= mean / 2.0, "the slowest completed {least}, the mean {mean}");
}

/// Room for a completion of each request.
fn active_options() -> Options {
    Options { depth: ACTIVE as u32 * DEPTH, mtu: 3, timeout: 17, retry: 7, ..Options::default() }
}

#[test]
#[ignore = "run by active_queue_pairs_share_the_device, in a process of its own"]
fn active_child() {
    if !is_child() {
        return;
    }
    let options = active_options();
    let (mut a, mut b) = (Crowd::new(ACTIVE, DEPTH, options), Crowd::new(ACTIVE, DEPTH, options));
    let (from, to) = (a.addresses(), b.addresses());
    a.connect(&to);
    b.connect(&from);
    let local = std::env::var("RDMA_SOFT_LOCAL").unwrap_or("memory".into());
    report(&format!("in one process ({local})"), &mut a, &to);
}

#[test]
fn active_queue_pairs_share_the_device() {
    in_process("active_child", &[]);
    in_process("active_child", &[("RDMA_SOFT_LOCAL", "wire")]);
}

#[test]
#[ignore = "run by active_queue_pairs_share_the_device_between_processes, in a process of its own"]
fn target_child() {
    if !is_child() {
        return;
    }
    let mut crowd = Crowd::new(ACTIVE, DEPTH, active_options());
    for address in crowd.addresses() {
        println!("ADDRESS {}", address.to_line());
    }
    let peers: Vec<Address> =
        std::io::stdin().lines().take(ACTIVE).map(|line| Address::from_line(&line.unwrap())).collect();
    crowd.connect(&peers);
    println!("READY");
    // A target that does nothing; until the other side is done.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
#[ignore = "run by active_queue_pairs_share_the_device_between_processes, in a process of its own"]
fn source_child() {
    if !is_child() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["target_child", "--exact", "--nocapture", "--include-ignored"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut words = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut line_with = |word: &str| {
        let line = words.find_map(|line| line.split_once(word).map(|(_, rest)| rest.to_owned()));
        line.expect("the child ended early")
    };
    let peers: Vec<_> = (0..ACTIVE).map(|_| Address::from_line(&line_with("ADDRESS "))).collect();
    let mut crowd = Crowd::new(ACTIVE, DEPTH, active_options());
    for address in crowd.addresses() {
        writeln!(stdin, "{}", address.to_line()).unwrap();
    }
    line_with("READY");
    crowd.connect(&peers);
    report("between two processes", &mut crowd, &peers);
    drop(crowd);
    writeln!(stdin, "DONE").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn active_queue_pairs_share_the_device_between_processes() {
    in_process("source_child", &[]);
}

/// A thousand connections that all send at once overrun the receiver's buffer if they are let, and send again all at
/// once when their timeouts have passed. None of them may fail of that.
#[test]
fn active_queue_pairs_do_not_overrun_their_receiver() {
    in_process("active_child", &[(LENGTH, TOO_MUCH), ("RDMA_SOFT_LOCAL", "wire")]);
    in_process("source_child", &[(LENGTH, TOO_MUCH)]);
}
