//! Reliable connections through the C interface, in one process and between two.

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

use common::*;
use verbs_sys::*;

const SIZES: [usize; 8] = [0, 1, 64, 4095, 4096, 4097, 20000, 65536];

fn send_every_size(options: Options) {
    let (mut a, b) = pair(Options { size: 1 << 17, ..options });
    for (i, size) in SIZES.into_iter().enumerate() {
        let data = pattern(size, i as u8);
        a.write(0, &data);
        assert_eq!(b.post_recv(7, 0, 65536), 0);
        assert_eq!(a.send(8, 0, size), 0);
        let received = b.wait_success();
        assert_eq!((received.wr_id, received.byte_len as usize), (7, size));
        assert_eq!(received.opcode, ibv_wc_opcode::IBV_WC_RECV);
        assert_eq!(b.read(0, size), data);
        let sent = a.wait_success();
        assert_eq!((sent.wr_id, sent.opcode), (8, ibv_wc_opcode::IBV_WC_SEND));
    }
}

#[test]
fn messages_of_every_size_arrive() {
    for mtu in 1..=5 {
        send_every_size(Options { mtu, ..Options::default() });
    }
}

#[test]
fn a_write_lands_where_it_was_told() {
    let (mut a, b) = pair(Options { size: 1 << 20, ..Options::default() });
    let data = pattern(300_000, 3);
    a.write(100, &data);
    assert_eq!(a.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, 1, 100, data.len(), b.address(), 5000), 0);
    assert_eq!(a.wait_success().opcode, ibv_wc_opcode::IBV_WC_RDMA_WRITE);
    assert_eq!(b.read(5000, data.len()), data);
    assert_eq!(b.read(4990, 10), [0; 10]);
    assert_eq!(b.read(5000 + data.len(), 10), [0; 10]);
}

#[test]
fn immediate_data_comes_with_sends_and_writes() {
    let (a, b) = pair(Options::default());
    for opcode in [ibv_wr_opcode::IBV_WR_SEND_WITH_IMM, ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM] {
        assert_eq!(b.post_recv(1, 0, 100), 0);
        let to = b.address();
        let posted = a.post(2, opcode, 0, 8, |wr| {
            wr.__bindgen_anon_1.imm_data = 0x1234_5678u32.to_be();
            wr.wr.rdma.remote_addr = to.va + 64;
            wr.wr.rdma.rkey = to.rkey;
        });
        assert_eq!(posted, 0);
        let wc = b.wait_success();
        assert_eq!(wc.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0, ibv_wc_flags::IBV_WC_WITH_IMM.0);
        assert_eq!(u32::from_be(unsafe { wc.__bindgen_anon_1.imm_data }), 0x1234_5678);
        a.wait_success();
    }
}

/// The other end of `between_two_processes`: sends back whatever comes.
fn echo(options: Options) {
    let end = End::new(options);
    println!("ADDRESS {}", end.address().to_line());
    std::io::stdout().flush().unwrap();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    end.to_init();
    for i in 0..16 {
        assert_eq!(end.post_recv(i, i as usize * 4096, 4096), 0);
    }
    end.connect(Address::from_line(&line));
    println!("READY");
    std::io::stdout().flush().unwrap();
    let mut echoed = 0;
    while echoed < 1000 {
        let wc = if options.events { end.wait_event() } else { end.wait() };
        assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
        if wc.opcode == ibv_wc_opcode::IBV_WC_RECV {
            let at = wc.wr_id as usize * 4096;
            assert_eq!(end.send(wc.wr_id, at, wc.byte_len as usize), 0);
            echoed += 1;
        } else {
            assert_eq!(end.post_recv(wc.wr_id, wc.wr_id as usize * 4096, 4096), 0);
        }
    }
    // The last acknowledgements; the parent says when it has them.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

fn between_two_processes(name: &str, options: Options) {
    if std::env::var_os("ABI_RC_ECHO").is_some() {
        return echo(options);
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env("ABI_RC_ECHO", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut stdin = child.stdin.take().unwrap();
    let mut line_with = |word: &str| loop {
        let line = lines.next().expect("the child ended early").unwrap();
        if let Some((_, rest)) = line.split_once(word) {
            return rest.to_owned();
        }
    };
    let peer = Address::from_line(&line_with("ADDRESS "));
    let mut end = End::new(options);
    writeln!(stdin, "{}", end.address().to_line()).unwrap();
    end.connect(peer);
    line_with("READY");
    for i in 0..1000usize {
        let size = [1, 64, 1000, 4096][i % 4];
        let data = pattern(size, i as u8);
        end.write(0, &data);
        assert_eq!(end.post_recv(1, 8192, 4096), 0);
        assert_eq!(end.send(2, 0, size), 0);
        let mut left = 2;
        while left > 0 {
            let wc = if options.events { end.wait_event() } else { end.wait() };
            assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS, "iteration {i}");
            if wc.opcode == ibv_wc_opcode::IBV_WC_RECV {
                assert_eq!(end.read(8192, size), data, "iteration {i}");
            }
            left -= 1;
        }
    }
    writeln!(stdin, "DONE").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn two_processes_spinning() {
    between_two_processes("two_processes_spinning", Options::default());
}

#[test]
fn two_processes_sleeping() {
    between_two_processes("two_processes_sleeping", Options { events: true, ..Options::default() });
}

/// A thread that has both ends need not wait for another one to take packets, nor for an answer that only itself could post.
#[test]
fn one_thread_with_both_ends_polls_a_few_times() {
    let (a, b) = pair(Options::default());
    for opcode in
        [ibv_wr_opcode::IBV_WR_RDMA_WRITE, ibv_wr_opcode::IBV_WR_RDMA_READ, ibv_wr_opcode::IBV_WR_SEND]
    {
        let mut polls: Vec<u32> = (0..101)
            .map(|round| {
                if opcode == ibv_wr_opcode::IBV_WR_SEND {
                    assert_eq!(b.post_recv(round, 0, 64), 0);
                    assert_eq!(a.send(round, 0, 64), 0);
                } else {
                    assert_eq!(a.rdma(opcode, round, 0, 64, b.address(), 0), 0);
                }
                let mut polls = 1;
                while a.poll().is_none() {
                    polls += 1;
                    assert!(polls < 10_000_000, "it ends");
                }
                if opcode == ibv_wr_opcode::IBV_WR_SEND {
                    b.wait_success();
                }
                polls
            })
            .collect();
        // The background thread may be in the way of some.
        polls.sort_unstable();
        assert!(polls[50] <= 8, "{opcode:?}: {polls:?}");
    }
}
