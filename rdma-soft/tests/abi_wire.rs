//! What the device writes to the wire, captured and disturbed.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that does as a C program would"
)]

mod common;

use std::process::Command;

use common::*;
use rdma_soft::wire::{Icrc, Ipv4, Ipv4Repr, Packet, Udp, UdpRepr};
use verbs_sys::*;

/// Runs the named test of this binary in a process with these variables, and returns what it printed.
fn in_process(test: &str, variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .envs(variables.iter().copied())
        .env("ABI_WIRE_CHILD", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn is_child() -> bool {
    std::env::var_os("ABI_WIRE_CHILD").is_some()
}

/// Messages of all kinds between two ends, checked byte by byte. A busy machine may keep a thread waiting for
/// tens of milliseconds: the timeouts together are ten times that.
fn traffic(rounds: usize) {
    let options = Options { size: 1 << 18, mtu: 3, timeout: 13, retry: 7, ..Options::default() };
    let (mut a, b) = pair(options);
    for i in 0..rounds {
        let size = [1, 1000, 1024, 5000, 60_000][i % 5];
        let data = pattern(size, i as u8);
        a.write(0, &data);
        assert_eq!(b.post_recv(1, 0, 65536), 0);
        assert_eq!(a.send(2, 0, size), 0);
        b.wait_success();
        a.wait_success();
        assert_eq!(b.read(0, size), data, "send {i}");
        assert_eq!(a.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, 3, 0, size, b.address(), 1 << 17), 0);
        a.wait_success();
        assert_eq!(b.read(1 << 17, size), data, "write {i}");
        assert_eq!(a.rdma(ibv_wr_opcode::IBV_WR_RDMA_READ, 4, 1 << 17, size, b.address(), 0), 0);
        a.wait_success();
        assert_eq!(a.read(1 << 17, size), data, "read {i}");
        assert_eq!(
            a.post(5, ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD, 100_000, 8, |wr| {
                wr.wr.atomic.remote_addr = b.address().va + 200_000;
                wr.wr.atomic.rkey = b.address().rkey;
                wr.wr.atomic.compare_add = 1;
            }),
            0
        );
        a.wait_success();
        assert_eq!(b.read(200_000, 8), (i as u64 + 1).to_ne_bytes(), "atomic {i}");
    }
    for (name, count) in rdma_soft::counters().unwrap() {
        println!("COUNTER {name} {count}");
    }
}

fn counter(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix("COUNTER ")?.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn some_traffic() {
    if is_child() {
        traffic(20);
    }
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn much_traffic() {
    if is_child() {
        traffic(100);
    }
}

fn check_capture(file: &str, variables: &[(&str, &str)]) {
    let path = std::env::temp_dir().join(format!("rdma-soft-{}-{file}.pcap", std::process::id()));
    let mut all = vec![("RDMA_SOFT_PCAP", path.to_str().unwrap())];
    all.extend_from_slice(variables);
    in_process("some_traffic", &all);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut rest = &bytes[24..];
    let mut packets = 0;
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        let (frame, after) = rest[16..].split_at(len);
        let ip = Ipv4Repr::parse(Ipv4::new(&frame[14..]).unwrap()).unwrap();
        let roce = &frame[14 + 20 + 8..];
        Packet::parse(roce).unwrap();
        let udp = UdpRepr::parse(Udp::new(&frame[14 + 20..]).unwrap());
        assert_eq!((udp.dst_port, usize::from(udp.len)), (4791, roce.len() + 8), "packet {packets}");
        let (transport, icrc) = roce.split_last_chunk::<4>().unwrap();
        assert_eq!(Icrc::ipv4(&ip, &udp, transport).to_bytes(), *icrc, "packet {packets}");
        packets += 1;
        rest = after;
    }
    assert!(packets > 500, "{packets} packets");
}

/// A receiver that cannot see the IPv4 identification finds out which one the ICRC fits: it must be the one that the
/// kernel sends, or no other implementation would take our packets.
#[test]
fn packets_have_the_identification_that_their_icrc_covers() {
    for gso in ["on", "off"] {
        let text = in_process("some_traffic", &[("RDMA_SOFT_LOCAL", "wire"), ("RDMA_SOFT_GSO", gso)]);
        assert!(counter(&text, "rcvd_datagrams") > 500, "{text}");
        assert_eq!(counter(&text, "rx_other_identification"), 0, "with segmentation {gso}");
    }
}

#[test]
fn captures_are_valid() {
    check_capture("memory", &[]);
    check_capture("wire", &[("RDMA_SOFT_LOCAL", "wire")]);
    check_capture("single", &[("RDMA_SOFT_LOCAL", "wire"), ("RDMA_SOFT_GSO", "off")]);
}

#[test]
fn messages_survive_faults() {
    for local in ["memory", "wire"] {
        let fault = "loss=0.03,dup=0.02,reorder=0.02,corrupt=0.02,seed=7";
        let text = in_process("much_traffic", &[("RDMA_SOFT_FAULT", fault), ("RDMA_SOFT_LOCAL", local)]);
        assert!(counter(&text, "injected_faults") > 100);
        assert!(counter(&text, "rx_icrc_errors") > 10);
        assert!(counter(&text, "retransmitted_pkts") > 10);
    }
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn open_and_say() {
    if is_child() {
        let context = unsafe { (v().ibv_open_device)(*(v().ibv_get_device_list)(std::ptr::null_mut())) };
        let error = verbs_sys::inline::errno();
        println!(
            "OPENED {} {error} {}",
            !context.is_null(),
            rdma_soft::last_error().map_or(String::new(), |e| e.to_string())
        );
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    for (variable, value, words) in [
        ("RDMA_SOFT_FAULT", "loss=7", "loss=7"),
        ("RDMA_SOFT_GSO", "perhaps", "RDMA_SOFT_GSO=perhaps"),
        ("RDMA_SOFT_LOCAL", "x", "RDMA_SOFT_LOCAL=x"),
        ("RDMA_SOFT_ADDR", "nowhere0", "nowhere0"),
        ("RDMA_SOFT_PCAP", "/no/such/folder/x.pcap", "/no/such/folder"),
    ] {
        let text = in_process("open_and_say", &[(variable, value)]);
        assert!(text.contains("OPENED false") && text.contains(words), "{text}");
    }
    let taken = std::net::UdpSocket::bind("127.66.0.1:4791").unwrap();
    let text = in_process("open_and_say", &[("RDMA_SOFT_ADDR", "127.66.0.1")]);
    assert!(
        text.contains("4791") && text.contains("127.66.0.1") && text.contains("RDMA_SOFT_ADDR"),
        "{text}"
    );
    assert!(text.contains(&format!("OPENED false {}", libc::EADDRINUSE)), "{text}");
    drop(taken);
    let text = in_process("open_and_say", &[("RDMA_SOFT_ADDR", "127.66.0.1")]);
    assert!(text.contains("OPENED true"), "{text}");
}

/// A forked child may close what it inherited, and ends.
#[test]
fn a_forked_child_ends() {
    let (a, _b) = pair(Options::default());
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(a);
        unsafe { libc::_exit(7) };
    }
    let mut status = 0;
    let begin = std::time::Instant::now();
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        assert!(begin.elapsed().as_secs() < 10, "the child hangs");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(libc::WEXITSTATUS(status), 7);
    // The parent's device still works.
    let (c, d) = pair(Options::default());
    assert_eq!(d.post_recv(1, 0, 8), 0);
    assert_eq!(c.send(1, 0, 8), 0);
    d.wait_success();
    c.wait_success();
}
