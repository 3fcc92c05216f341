//! The device on IPv6 addresses: reliable and unreliable connections and datagrams, within a process and between two,
//! with captures that are checked from outside.
//!
//! Each test has a network namespace of its own, where the system allows that: the loopback interface then has the
//! addresses `::1`, `fd00:77::1` and `fd00:77::2`.

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
use std::net::Ipv6Addr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::{io, mem, thread};

use common::*;
use rdma_soft::wire::{Icrc, Ipv6, Ipv6Repr, Packet, Udp, UdpRepr};
use verbs_sys::*;

type Op = ibv_wr_opcode;

const CHILD: &str = "ABI_IPV6_CHILD";
const FIRST: &str = "fd00:77::1";
const SECOND: &str = "fd00:77::2";
const TYPES: [ibv_qp_type; 3] = [ibv_qp_type::IBV_QPT_RC, ibv_qp_type::IBV_QPT_UC, ibv_qp_type::IBV_QPT_UD];
/// Several packets, where a message may be that long.
const LENGTHS: [usize; 3] = [20_000, 20_000, 1000];
/// Where a message is received; a datagram's route header is the 40 bytes before its data.
const INBOX: usize = 1 << 15;

/// `struct in6_ifreq` of `linux/ipv6.h`.
#[repr(C)]
struct In6Request {
    address: [u8; 16],
    prefix: u32,
    interface: i32,
}

/// Gives the calling process a network namespace with its loopback interface up.
fn enter_namespace() -> io::Result<()> {
    let check = |code: i32| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    unsafe {
        if libc::unshare(libc::CLONE_NEWNET) != 0 {
            check(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET))?;
        }
        let mut flags: libc::ifreq = mem::zeroed();
        (flags.ifr_name[0], flags.ifr_name[1]) = (b'l' as libc::c_char, b'o' as libc::c_char);
        flags.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        let socket = libc::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0);
        check(libc::ioctl(socket, libc::SIOCSIFFLAGS, &flags))?;
        // The loopback interface is the first of its namespace.
        for text in [FIRST, SECOND] {
            let address = text.parse::<Ipv6Addr>().map_err(io::Error::other)?.octets();
            let request = In6Request { address, prefix: 128, interface: 1 };
            check(libc::ioctl(socket, libc::SIOCSIFADDR, &request))?;
        }
        check(libc::close(socket))
    }
}

/// Runs a test of this binary in a process and, if there may be one, a namespace of its own. Whether it ran: without
/// a namespace only what needs none does.
fn in_namespace(test: &str, needs_it: bool, variables: &[(&str, &str)]) -> bool {
    let command = |namespace: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--include-ignored"]);
        command.envs(variables.iter().copied()).env(CHILD, "1");
        if namespace {
            // Only system calls happen between fork and exec.
            unsafe { command.pre_exec(enter_namespace) };
        }
        command.output()
    };
    let output = match command(true) {
        Ok(output) => output,
        Err(e) => {
            println!("SKIP a network namespace for {test}: {e}");
            if needs_it {
                return false;
            }
            command(false).unwrap()
        }
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    true
}

fn ends() -> Vec<End> {
    TYPES
        .map(|qp_type| {
            End::new(Options { qp_type, size: 1 << 17, mtu: 3, timeout: 16, ..Options::default() })
        })
        .into()
}

/// Sends back whatever comes, each end once.
fn echo(say: impl Fn(String), hear: impl Fn() -> String) {
    let ends = ends();
    ends.iter().for_each(|end| say(end.address().to_line()));
    for end in &ends {
        end.to_init();
        assert_eq!(end.post_recv(1, INBOX - 40, 1 << 15), 0);
    }
    for end in &ends {
        let peer = Address::from_line(&hear());
        end.to_rtr(peer);
        end.to_rts();
    }
    say("READY".into());
    for (end, len) in ends.iter().zip(LENGTHS) {
        let mut wc = end.wait_success();
        let is_datagram = end.options.qp_type == ibv_qp_type::IBV_QPT_UD;
        assert_eq!(wc.byte_len as usize, if is_datagram { len + 40 } else { len });
        let at = if is_datagram { INBOX } else { INBOX - 40 };
        if !is_datagram {
            assert_eq!(end.send(2, at, len), 0);
            end.wait_success();
            continue;
        }
        check_route_header(end, &end.read(INBOX - 40, 40));
        // The way back, from the route header.
        let grh = end.memory.as_ptr().wrapping_add(INBOX - 40).cast_mut().cast();
        let back = unsafe { v().ibv_create_ah_from_wc.unwrap()(end.pd, &mut wc, grh, 1) };
        assert!(!back.is_null());
        datagram(end, back, wc.src_qp, at, len);
        end.wait_success();
        assert_eq!(unsafe { (v().ibv_destroy_ah)(back) }, 0);
    }
    assert_eq!(hear(), "DONE");
}

fn check_route_header(end: &End, header: &[u8]) {
    let ip = Ipv6::new(header).expect("version 6");
    assert_eq!(ip.dst(), end.address().gid);
    assert_eq!(ip.next_header(), Ipv6Repr::UDP);
}

fn datagram(end: &End, ah: *mut ibv_ah, to: u32, at: usize, len: usize) {
    let posted = end.post(3, Op::IBV_WR_SEND, at, len, |wr| {
        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = to;
        wr.wr.ud.remote_qkey = 0x1111_1111;
    });
    assert_eq!(posted, 0);
}

/// Messages there and back, then what a reliable connection has beyond them.
fn converse(say: impl Fn(String), hear: impl Fn() -> String) {
    let peers = TYPES.map(|_| Address::from_line(&hear()));
    let mut ends = ends();
    for (end, peer) in ends.iter().zip(peers) {
        assert_eq!(peer.gid[..10] == [0; 10], peer.gid == Ipv6Addr::LOCALHOST.octets(), "no mapped address");
        say(end.address().to_line());
        end.connect(peer);
        assert_eq!(end.post_recv(1, INBOX - 40, 1 << 15), 0);
    }
    assert_eq!(hear(), "READY");
    for ((end, peer), len) in ends.iter_mut().zip(peers).zip(LENGTHS) {
        let data = pattern(len, end.options.qp_type.0 as u8);
        end.write(0, &data);
        let mut at = INBOX - 40;
        if end.options.qp_type == ibv_qp_type::IBV_QPT_UD {
            let mut attr: ibv_ah_attr = zeroed();
            (attr.is_global, attr.port_num, attr.grh.sgid_index) = (1, 1, 1);
            attr.grh.dgid.raw = peer.gid;
            let ah = unsafe { (v().ibv_create_ah)(end.pd, &mut attr) };
            assert!(!ah.is_null());
            datagram(end, ah, peer.qp_num, 0, len);
            assert_eq!(unsafe { (v().ibv_destroy_ah)(ah) }, 0);
            at = INBOX;
        } else {
            assert_eq!(end.send(2, 0, len), 0);
        }
        // The message went out and its echo came.
        end.wait_success();
        end.wait_success();
        assert_eq!(end.read(at, len), data);
    }
    let (rc, peer) = (&mut ends[0], peers[0]);
    let data = pattern(30_000, 77);
    rc.write(0, &data);
    assert_eq!(rc.rdma(Op::IBV_WR_RDMA_WRITE, 4, 0, data.len(), peer, 1 << 16), 0);
    rc.wait_success();
    assert_eq!(rc.rdma(Op::IBV_WR_RDMA_READ, 5, 1 << 16, data.len(), peer, 1 << 16), 0);
    rc.wait_success();
    assert_eq!(rc.read(1 << 16, data.len()), data);
    let posted = rc.post(6, Op::IBV_WR_ATOMIC_FETCH_AND_ADD, 0, 8, |wr| {
        wr.wr.atomic.remote_addr = peer.va + (1 << 16);
        wr.wr.atomic.rkey = peer.rkey;
        wr.wr.atomic.compare_add = 1;
    });
    assert_eq!(posted, 0);
    rc.wait_success();
    assert_eq!(rc.read(0, 8), data[..8]);
    say("DONE".into());
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn one_process() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let ((say, hears), (says, hear)) = (mpsc::channel(), mpsc::channel());
    let other = thread::spawn(move || echo(|line| says.send(line).unwrap(), || hears.recv().unwrap()));
    converse(|line| say.send(line).unwrap(), || hear.recv().unwrap());
    other.join().unwrap();
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn second_process() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let hear = || {
        let mut line = String::new();
        io::stdin().read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    echo(|line| println!("SAY {line}"), hear);
}

#[test]
#[ignore = "run by the other tests, in processes of their own"]
fn first_process() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["second_process", "--exact", "--nocapture", "--include-ignored"])
        .env("RDMA_SOFT_ADDR", SECOND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take().unwrap();
    let lines = std::cell::RefCell::new(BufReader::new(child.stdout.take().unwrap()).lines());
    let hear = || loop {
        let line = lines.borrow_mut().next().expect("the child ended early").unwrap();
        if let Some((_, said)) = line.split_once("SAY ") {
            return said.to_owned();
        }
    };
    converse(|line| writeln!(&stdin, "{line}").unwrap(), hear);
    assert!(child.wait().unwrap().success());
}

/// Checks every packet of a capture, here and by a program that shares nothing with the device, and returns their number.
fn check_capture(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[24..];
    let mut packets = 0;
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        let (frame, after) = rest[16..].split_at(len);
        assert_eq!(frame[12..14], [0x86, 0xdd], "packet {packets}");
        let ip = Ipv6Repr::parse(Ipv6::new(&frame[14..]).unwrap());
        assert_eq!(usize::from(ip.payload_len), frame.len() - 14 - 40);
        let roce = &frame[14 + 40 + 8..];
        Packet::parse(roce).unwrap();
        let udp = UdpRepr::parse(Udp::new(&frame[14 + 40..]).unwrap());
        assert_eq!((udp.dst_port, udp.len), (4791, ip.payload_len), "packet {packets}");
        let (transport, icrc) = roce.split_last_chunk::<4>().unwrap();
        assert_eq!(Icrc::ipv6(&ip, &udp, transport).to_bytes(), *icrc, "packet {packets}");
        packets += 1;
        rest = after;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/foreign/check-icrc.py");
    match Command::new("python3").arg(&script).arg(path).output() {
        Ok(output) if script.exists() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
            println!("{text}");
        }
        _ => println!("SKIP the check of ICRCs by another program: no python3, or no {}", script.display()),
    }
    packets
}

#[test]
fn one_process_on_the_loopback_address() {
    for local in ["memory", "wire"] {
        let path = std::env::temp_dir().join(format!("rdma-soft-{}-lo6-{local}.pcap", std::process::id()));
        let capture = path.to_str().unwrap();
        let variables = [("RDMA_SOFT_ADDR", "::1"), ("RDMA_SOFT_LOCAL", local), ("RDMA_SOFT_PCAP", capture)];
        assert!(in_namespace("one_process", false, &variables));
        assert!(check_capture(&path) > 100);
        std::fs::remove_file(&path).unwrap();
    }
}

/// RDMA/rxe: Fix a bug in rxe_fill_ip_info()
#[test]
fn two_processes_on_two_addresses() {
    let name = format!("rdma-soft-{}-ipv6-%p.pcap", std::process::id());
    let path = std::env::temp_dir().join(name);
    let variables = [("RDMA_SOFT_ADDR", FIRST), ("RDMA_SOFT_PCAP", path.to_str().unwrap())];
    if !in_namespace("first_process", true, &variables) {
        return;
    }
    let prefix = format!("rdma-soft-{}-ipv6-", std::process::id());
    let captures: Vec<_> = std::fs::read_dir(std::env::temp_dir())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
        .collect();
    assert_eq!(captures.len(), 2, "{captures:?}");
    for path in captures {
        assert!(check_capture(&path) > 100);
        std::fs::remove_file(&path).unwrap();
    }
}
