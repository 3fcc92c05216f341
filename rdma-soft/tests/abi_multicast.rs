//! Multicast groups, within a process and between processes on different loopback addresses.

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

use common::*;
use verbs_sys::inline::errno;
use verbs_sys::*;

const CHILD: &str = "ABI_MULTICAST_CHILD";
const QKEY: u32 = 0x1111_1111;

fn datagram_end() -> End {
    let end = End::new(Options { qp_type: ibv_qp_type::IBV_QPT_UD, ..Options::default() });
    end.to_init();
    end.to_rtr(end.address());
    end.to_rts();
    end
}

/// Sends `bytes` to a group.
fn send_to(end: &mut End, gid: ibv_gid, bytes: &[u8]) {
    end.write(1000, bytes);
    let mut attr: ibv_ah_attr = zeroed();
    (attr.is_global, attr.port_num, attr.grh.sgid_index, attr.grh.dgid) = (1, 1, 1, gid);
    let ah = unsafe { (v().ibv_create_ah)(end.pd, &mut attr) };
    assert!(!ah.is_null());
    let posted = end.post(2, ibv_wr_opcode::IBV_WR_SEND, 1000, bytes.len(), |wr| {
        wr.wr.ud.ah = ah;
        wr.wr.ud.remote_qpn = 0xff_ffff;
        wr.wr.ud.remote_qkey = QKEY;
    });
    assert_eq!(posted, 0);
    assert_eq!(unsafe { (v().ibv_destroy_ah)(ah) }, 0);
}

fn attach(end: &End, gid: ibv_gid) -> i32 {
    unsafe { (v().ibv_attach_mcast)(end.qp, &gid, 0) }
}

fn detach(end: &End, gid: ibv_gid) -> i32 {
    unsafe { (v().ibv_detach_mcast)(end.qp, &gid, 0) }
}

/// RDMA/rxe: Fix coding error in rxe_rcv_mcast_pkt
/// RDMA/rxe: Fix skb lifetime in rxe_rcv_mcast_pkt()
/// RDMA/rxe: Handle skb_clone() failure in rxe_recv.c
#[test]
fn multicast_reaches_every_member() {
    let gid = group(1);
    let [mut a, b, c] = [(); 3].map(|()| datagram_end());
    for member in [&b, &c] {
        assert_eq!(attach(member, gid), 0);
        assert_eq!(attach(member, gid), 0, "again is no more");
        assert_eq!(member.post_recv(1, 0, 100), 0);
    }
    send_to(&mut a, gid, &[7; 8]);
    a.wait_success();
    assert_eq!((b.wait_success().byte_len, c.wait_success().byte_len), (48, 48));
    // The other way to write the same group.
    let mut mapped = gid;
    unsafe { mapped.raw[..2].fill(0) };
    assert_eq!(b.post_recv(2, 0, 100), 0);
    send_to(&mut a, mapped, &[7; 8]);
    assert_eq!(b.wait_success().wr_id, 2);
    unsafe { assert_eq!((v().ibv_destroy_qp)(b.qp), libc::EBUSY) };
    for member in [&b, &c] {
        assert_eq!(detach(member, gid), 0);
        assert_eq!(detach(member, gid), libc::EINVAL);
    }
}

#[test]
fn what_is_no_group_is_refused() {
    let end = datagram_end();
    for text in ["fd00::1", "::ffff:127.0.0.1", "ff0e::ffff:10.0.0.1"] {
        let gid = ibv_gid { raw: text.parse::<std::net::Ipv6Addr>().unwrap().octets() };
        assert_eq!(attach(&end, gid), libc::EINVAL, "{text}");
    }
    let connected = End::new(Options::default());
    assert_eq!(attach(&connected, group(2)), libc::EINVAL, "no datagrams");
    let mut attr: ibv_ah_attr = zeroed();
    (attr.is_global, attr.port_num, attr.grh.sgid_index) = (1, 1, 1);
    attr.grh.dgid.raw = "ff0e::ffff:10.0.0.1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    assert!(unsafe { (v().ibv_create_ah)(end.pd, &mut attr) }.is_null());
    assert_eq!(errno(), libc::EINVAL);
}

/// A queue pair that was refused is not attached.
/// RDMA/rxe: insert mcg into mcg_tree only after rxe_mcast_add() succeeds
/// RDMA/rxe: Fix an error handling path in rxe_get_mcg()
#[test]
fn a_group_has_so_many_members_and_no_more() {
    let gid = group(3);
    let mut attr: ibv_device_attr = zeroed();
    let ends: Vec<_> = (0..57).map(|_| datagram_end()).collect();
    assert_eq!(unsafe { (v().ibv_query_device)(ends[0].context, &mut attr) }, 0);
    assert_eq!(attr.max_mcast_qp_attach, 56);
    let attached: Vec<_> = ends.iter().map(|end| attach(end, gid)).collect();
    assert_eq!((attached[..56].iter().sum::<i32>(), attached[56]), (0, libc::ENOMEM));
    assert_eq!(detach(&ends[56], gid), libc::EINVAL);
    ends[..56].iter().for_each(|end| assert_eq!(detach(end, gid), 0));
}

/// A process that does what it is told: attaches, detaches, says what it got.
#[test]
#[ignore = "run by groups_span_processes, in processes of its own"]
fn member_child() {
    let Ok(number) = std::env::var(CHILD) else { return };
    let gid = ibv_gid { raw: number.parse::<std::net::Ipv6Addr>().unwrap().octets() };
    let end = datagram_end();
    for line in std::io::stdin().lines() {
        let answer = match line.unwrap().as_str() {
            "attach" => {
                (0..4).for_each(|n| assert_eq!(end.post_recv(n, 4096 * n as usize, 4096), 0));
                attach(&end, gid).to_string()
            }
            "detach" => detach(&end, gid).to_string(),
            "take" => {
                let wc = end.wait_success();
                let at = 4096 * wc.wr_id as usize;
                let header = end.read(at + 20, 20);
                // The route header names the group.
                assert_eq!(header[16..20], unsafe { gid.raw }[12..]);
                assert_eq!(wc.wc_flags & ibv_wc_flags::IBV_WC_GRH.0, ibv_wc_flags::IBV_WC_GRH.0);
                String::from_utf8(end.read(at + 40, wc.byte_len as usize - 40)).unwrap()
            }
            "none" => {
                let begin = std::time::Instant::now();
                let mut got = false;
                while begin.elapsed().as_millis() < 50 {
                    got |= end.poll().is_some();
                }
                got.to_string()
            }
            _ => break,
        };
        println!("ANSWER {answer}");
    }
    detach(&end, gid);
}

struct Member {
    child: Child,
    stdin: ChildStdin,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Member {
    fn start(gid: ibv_gid) -> Member {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["member_child", "--exact", "--nocapture", "--include-ignored"])
            .env(CHILD, std::net::Ipv6Addr::from(unsafe { gid.raw }).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Member { stdin: child.stdin.take().unwrap(), lines, child }
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.stdin, "{what}").unwrap();
        let answer = self.lines.find_map(|line| Some(line.unwrap().split_once("ANSWER ")?.1.to_owned()));
        answer.expect("the child ended early")
    }

    fn end(mut self) {
        drop(self.stdin);
        assert!(self.child.wait().unwrap().success());
    }
}

/// Each member of each process gets one copy, the sender's own among them; others get none.
/// RDMA/rxe: Correct skb on loopback path
#[test]
fn groups_span_processes() {
    let (gid, other) = (group(4), group(5));
    let mut members = [Member::start(gid), Member::start(gid)];
    let mut stranger = Member::start(other);
    for member in members.iter_mut().chain([&mut stranger]) {
        assert_eq!(member.ask("attach"), "0");
    }
    let mut end = datagram_end();
    assert_eq!(attach(&end, gid), 0);
    for n in 0..3 {
        assert_eq!(end.post_recv(n, 0, 100), 0);
    }
    send_to(&mut end, gid, b"to all");
    assert_eq!(members.each_mut().map(|member| member.ask("take")), ["to all", "to all"]);
    // Sent, and received once.
    end.wait_success();
    end.wait_success();
    assert_eq!(end.read(40, 6), b"to all");

    assert_eq!(members[0].ask("detach"), "0");
    send_to(&mut end, gid, b"to the rest");
    assert_eq!(members[1].ask("take"), "to the rest");
    assert_eq!(members[0].ask("none"), "false");
    assert_eq!(stranger.ask("none"), "false");
    end.wait_success();
    end.wait_success();
    assert!((0..1000).all(|_| end.poll().is_none()), "no copy comes back");
    assert_eq!(detach(&end, gid), 0);
    members.into_iter().chain([stranger]).for_each(Member::end);
}

/// What is sent to a group and is none of its datagrams reaches nobody.
/// RDMA/rxe: Fix coding error in rxe_recv.c
#[test]
fn only_whole_packets_to_the_group_count() {
    let gid = group(6);
    let address = unsafe { gid.raw };
    let to = (std::net::Ipv4Addr::new(address[12], address[13], address[14], address[15]), 4791);
    let end = datagram_end();
    assert_eq!(attach(&end, gid), 0);
    assert_eq!(end.post_recv(1, 0, 100), 0);
    let drops = || {
        let counters = rdma_soft::counters().unwrap();
        let sum = |name: &str| counters.iter().find(|(n, _)| *n == name).unwrap().1;
        sum("drop_too_short") + sum("drop_version") + sum("drop_pad") + sum("rx_icrc_errors")
    };
    let before = drops();
    let stranger = std::net::UdpSocket::bind("127.99.0.1:0").unwrap();
    socket2::SockRef::from(&stranger).set_multicast_if_v4(&std::net::Ipv4Addr::LOCALHOST).unwrap();
    // A datagram by all but its ICRC is among them.
    let datagram = [&[0x64, 0, 0xff, 0xff, 0, 0xff, 0xff, 0xff][..], &[0; 32]].concat();
    for bytes in [&[0u8; 3][..], &datagram, &[0xff; 60], &[0; 8000]] {
        stranger.send_to(bytes, to).unwrap();
    }
    let begin = std::time::Instant::now();
    while drops() < before + 4 {
        assert!(begin.elapsed().as_secs() < 5, "{:?}", rdma_soft::counters());
        assert!(end.poll().is_none());
    }
    assert!((0..1000).all(|_| end.poll().is_none()));
    assert_eq!(detach(&end, gid), 0);
}
