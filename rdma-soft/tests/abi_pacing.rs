//! Unreliable traffic between two processes of a machine: the sender waits for a receiver that cannot keep up,
//! but not for ever.

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
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use verbs_sys::*;

const MESSAGE: usize = 1 << 16;
const MESSAGES: usize = 1024;
/// Messages that are different; sixteen of them, so that one that is missing or twice there shows.
const KINDS: usize = 16;

fn uc(depth: usize, size: usize) -> Options {
    Options { qp_type: ibv_qp_type::IBV_QPT_UC, depth: depth as u32, size, ..Options::default() }
}

fn message(number: usize) -> Vec<u8> {
    pattern(MESSAGE, (number % KINDS) as u8)
}

/// The receiver, in a process of its own.
struct Receiver {
    child: Child,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
}

impl Receiver {
    /// Runs the test of that name again, which then is the receiver.
    fn start(name: &str) -> Receiver {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env("ABI_PACING_RECEIVER", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Receiver { child, stdin, lines: BufReader::new(stdout) }
    }

    fn line_with(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the receiver ended without {word}");
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn connect(&mut self, end: &End) {
        let peer = Address::from_line(&self.line_with("ADDRESS "));
        writeln!(self.stdin, "{}", end.address().to_line()).unwrap();
        end.connect(peer);
        self.line_with("READY");
    }

    fn signal(&self, signal: i32) {
        assert_eq!(unsafe { libc::kill(self.child.id().cast_signed(), signal) }, 0);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Takes all messages, slowly, and looks at each.
fn receive() {
    let end = End::new(uc(MESSAGES, MESSAGES * MESSAGE));
    println!("ADDRESS {}", end.address().to_line());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    end.to_init();
    for i in 0..MESSAGES {
        assert_eq!(end.post_recv(i as u64, i * MESSAGE, MESSAGE), 0);
    }
    end.connect(Address::from_line(&line));
    println!("READY");
    for i in 0..MESSAGES {
        std::thread::sleep(Duration::from_micros(200));
        let wc = end.wait_success();
        assert_eq!((wc.wr_id, wc.byte_len as usize), (i as u64, MESSAGE));
        assert!(end.read(i * MESSAGE, MESSAGE) == message(i), "message {i} arrived in place of another");
    }
    println!("RECEIVED {MESSAGES}");
}

fn is_receiver() -> bool {
    std::env::var_os("ABI_PACING_RECEIVER").is_some()
}

/// Sends all messages; `each` is called after each that was completed.
fn stream(end: &mut End, mut each: impl FnMut(usize)) {
    let depth = end.options.depth as usize;
    for kind in 0..KINDS {
        end.write(kind * MESSAGE, &message(kind));
    }
    let send = |end: &End, i: usize| assert_eq!(end.send(i as u64, i % KINDS * MESSAGE, MESSAGE), 0);
    (0..depth).for_each(|i| send(end, i));
    for i in 0..MESSAGES {
        assert_eq!(end.wait_success().wr_id, i as u64);
        if i + depth < MESSAGES {
            send(end, i + depth);
        }
        each(i);
    }
}

fn counter(name: &str) -> u64 {
    rdma_soft::counters().unwrap().into_iter().find(|(n, _)| *n == name).unwrap().1
}

/// 64 MiB, four times what a socket's buffer holds at most. The receiver polls rarely, and after a quarter of
/// the messages its whole process stands still, which no thread of it makes up for.
#[test]
fn a_slow_receiver_of_an_unreliable_connection_loses_nothing() {
    if is_receiver() {
        return receive();
    }
    let mut receiver = Receiver::start("a_slow_receiver_of_an_unreliable_connection_loses_nothing");
    let mut end = End::new(uc(64, KINDS * MESSAGE));
    receiver.connect(&end);
    let pid = receiver.child.id().cast_signed();
    let mut awake = None;
    stream(&mut end, |i| {
        if i == MESSAGES / 4 {
            receiver.signal(libc::SIGSTOP);
            awake = Some(std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, 0);
            }));
        }
    });
    awake.unwrap().join().unwrap();
    assert_eq!(receiver.line_with("RECEIVED "), MESSAGES.to_string());
    assert!(counter("send_paused") > 0, "{:?}", rdma_soft::counters());
}

/// A receiver that is stopped loses messages, and the sender does not hang.
#[test]
fn a_receiver_that_stands_still_stops_nobody() {
    if is_receiver() {
        return receive();
    }
    let mut receiver = Receiver::start("a_receiver_that_stands_still_stops_nobody");
    let mut end = End::new(uc(64, KINDS * MESSAGE));
    receiver.connect(&end);
    receiver.signal(libc::SIGSTOP);
    let begin = Instant::now();
    stream(&mut end, |_| ());
    // A second without progress, once; each completion of `stream` has ten.
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert!(counter("send_paused") > 0, "{:?}", rdma_soft::counters());
}
