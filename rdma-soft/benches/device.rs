//! The soft device against plain UDP sockets, side by side in one run.
//!
//! `cargo bench -p rdma-soft --bench device` prints, each as the median of five interleaved runs: half round
//! trips of 64 bytes between two processes, spinning and sleeping; within one process between two threads;
//! and the rate of 64 KiB RDMA WRITEs between two processes, against UDP with segmentation offload both
//! ways, datagrams of 4 KiB and a window of 256 KiB. Arguments choose rows: `spin`, `event`, `local`,
//! `stream`. Both sides of a round trip have a processor of their own, always the same ones: the scheduler would place sleepers now on one
//! processor and now on two, which alone makes three times the difference. With `DEVICE_BENCH_SOFT_ONLY` set the sockets are left out, for profiles.

#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a benchmark that does as a C program would"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use verbs_sys::*;

const ROLE: &str = "DEVICE_BENCH_ROLE";
const SIZE: usize = 64;
/// BTH and ICRC around the message, so that datagrams are equally long.
const DATAGRAM: usize = SIZE + 12 + 4;
const ROUND_TRIPS: usize = 20_000;
const WARM_UP: usize = 2_000;
const RUNS: usize = 5;
const WRITE: usize = 65536;
const STREAM: Duration = Duration::from_millis(500);
const WINDOW: usize = 256 << 10;
const CHUNK: usize = 4096;

fn main() {
    match std::env::var(ROLE).ok().as_deref() {
        Some("udp-spin") => udp_echo(false),
        Some("udp-block") => udp_echo(true),
        Some("udp-stream") => udp_sink(),
        Some("soft-spin") => soft_echo(false),
        Some("soft-event") => soft_echo(true),
        Some("soft-stream") => soft_target(),
        Some(other) => panic!("unknown role {other}"),
        None => parent(),
    }
}

fn parent() {
    let only: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    println!("{:<34} {:>10} {:>10} {:>8}   all", "what", "UDP", "soft", "ratio");
    let row = |what: &str, name: &str, peer: &dyn Fn() -> f64, soft: &dyn Fn() -> f64| {
        if !wanted(name) {
            return;
        }
        let skip_peer = std::env::var_os("DEVICE_BENCH_SOFT_ONLY").is_some();
        let peer = || if skip_peer { f64::NAN } else { peer() };
        let runs: Vec<(f64, f64)> = (0..RUNS).map(|_| (peer(), soft())).collect();
        let median = |mut v: Vec<f64>| {
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        let (p, s) = (median(runs.iter().map(|r| r.0).collect()), median(runs.iter().map(|r| r.1).collect()));
        println!("{what:<34} {p:>10.2} {s:>10.2} {:>8.2}   {runs:.2?}", s / p);
    };
    row("half round trip, spinning, us", "spin", &|| udp_ping(false), &|| soft_ping(false));
    row("half round trip, sleeping, us", "event", &|| udp_ping(true), &|| soft_ping(true));
    row("half round trip, one process, us", "local", &|| f64::NAN, &soft_local);
    row("64 KiB writes, GB/s", "stream", &udp_stream, &soft_stream);
}

/// Until it is dropped, the calling thread has a processor of its own.
struct Place(CpuSet);

impl Place {
    /// Starts the other side, which gets another processor.
    fn of_peer<T>(start: impl FnOnce() -> T) -> (T, Place) {
        let all = sched_getaffinity(None).unwrap();
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
        // If there is only one they share it.
        let ours = cpus.next().unwrap();
        let theirs = cpus.next().unwrap_or(ours);
        let only = |cpu| {
            let mut one = CpuSet::new();
            one.set(cpu);
            sched_setaffinity(None, &one).unwrap();
        };
        only(theirs);
        let peer = start();
        only(ours);
        (peer, Place(all))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        sched_setaffinity(None, &self.0).unwrap();
    }
}

/// Another process of this program.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(role: &str) -> Peer {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Peer { child, input, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.output.read_line(&mut line).unwrap() > 0, "the other process ended");
        line.trim().to_owned()
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    fn end(mut self) {
        drop(self.input);
        self.child.wait().unwrap();
    }
}

fn say(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}

fn hear() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line
}

fn p50(mut times: Vec<u64>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2] as f64 / 2000.0
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        if let Ok(received) = socket.recv_from(buffer) {
            return received;
        }
    }
}

fn udp_socket(blocking: bool) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(!blocking).unwrap();
    socket
}

fn udp_echo(blocking: bool) {
    let socket = udp_socket(blocking);
    say(&socket.local_addr().unwrap().to_string());
    let mut buffer = [0; 2048];
    loop {
        let (n, from) = receive(&socket, &mut buffer);
        if n == 1 {
            return;
        }
        socket.send_to(&buffer[..n], from).unwrap();
    }
}

fn udp_ping(blocking: bool) -> f64 {
    let (mut peer, _placed) = Place::of_peer(|| Peer::start(if blocking { "udp-block" } else { "udp-spin" }));
    let to: SocketAddr = peer.line().parse().unwrap();
    let socket = udp_socket(blocking);
    let (message, mut buffer, mut times) = ([1; DATAGRAM], [0; 2048], Vec::new());
    for i in 0..WARM_UP + ROUND_TRIPS {
        let begin = Instant::now();
        socket.send_to(&message, to).unwrap();
        receive(&socket, &mut buffer);
        if i >= WARM_UP {
            times.push(begin.elapsed().as_nanos() as u64);
        }
    }
    socket.send_to(&[0], to).unwrap();
    peer.end();
    p50(times)
}

fn options(events: bool) -> Options {
    Options { events, mtu: 3, ..Options::default() }
}

/// Waits for a send's and a receive's completion, in either order.
fn await_both(end: &End, events: bool) {
    for _ in 0..2 {
        let wc = if events { end.wait_event() } else { end.wait() };
        assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
    }
}

fn soft_echo(events: bool) {
    let end = End::new(options(events));
    say(&end.address().to_line());
    let peer = Address::from_line(&hear());
    end.to_init();
    assert_eq!(end.post_recv(1, 0, 4096), 0);
    end.to_rtr(peer);
    end.to_rts();
    say("READY");
    let next = || if events { end.wait_event() } else { end.wait() };
    for _ in 0..WARM_UP + ROUND_TRIPS {
        while next().opcode != ibv_wc_opcode::IBV_WC_RECV {}
        assert_eq!(end.post_recv(1, 0, 4096), 0);
        assert_eq!(end.send(2, 8192, SIZE), 0);
    }
    hear();
}

fn soft_ping(events: bool) -> f64 {
    let (mut peer, _placed) = Place::of_peer(|| Peer::start(if events { "soft-event" } else { "soft-spin" }));
    let address = Address::from_line(&peer.line());
    let end = End::new(options(events));
    peer.tell(&end.address().to_line());
    end.connect(address);
    peer.line();
    let mut times = Vec::new();
    for i in 0..WARM_UP + ROUND_TRIPS {
        let begin = Instant::now();
        assert_eq!(end.post_recv(1, 0, 4096), 0);
        assert_eq!(end.send(2, 8192, SIZE), 0);
        await_both(&end, events);
        if i >= WARM_UP {
            times.push(begin.elapsed().as_nanos() as u64);
        }
    }
    peer.tell("DONE");
    peer.end();
    p50(times)
}

fn soft_local() -> f64 {
    struct Sent(End);
    // SAFETY: verbs objects may be used by any thread.
    unsafe impl Send for Sent {}
    let (a, b) = pair(options(false));
    let b = Sent(b);
    assert_eq!(b.0.post_recv(1, 0, 4096), 0);
    let echo = move || {
        let b = b;
        let end = &b.0;
        for _ in 0..WARM_UP + ROUND_TRIPS {
            while end.wait().opcode != ibv_wc_opcode::IBV_WC_RECV {}
            assert_eq!(end.post_recv(1, 0, 4096), 0);
            assert_eq!(end.send(2, 8192, SIZE), 0);
        }
        while end.poll().is_some() {}
        b
    };
    let (echo, _placed) = Place::of_peer(|| std::thread::spawn(echo));
    let mut times = Vec::new();
    for i in 0..WARM_UP + ROUND_TRIPS {
        let begin = Instant::now();
        assert_eq!(a.post_recv(1, 0, 4096), 0);
        assert_eq!(a.send(2, 8192, SIZE), 0);
        await_both(&a, false);
        if i >= WARM_UP {
            times.push(begin.elapsed().as_nanos() as u64);
        }
    }
    drop(echo.join().unwrap());
    p50(times)
}

fn option(socket: &UdpSocket, level: i32, name: i32, value: i32) {
    // SAFETY: an `int` option.
    let rc = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size_of::<i32>() as u32)
    };
    assert_eq!(rc, 0);
}

fn gigabytes_per_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

/// Takes datagrams and tells the sender how many bytes came, at least every quarter of the window.
fn udp_sink() {
    let socket = udp_socket(false);
    option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1);
    let buffer: libc::c_int = 8 << 20;
    // SAFETY: an `int` option. The plain one is capped where the privileged one is refused.
    let forced = unsafe {
        let value = (&raw const buffer).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, 4)
    };
    if forced != 0 {
        option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, buffer);
    }
    say(&socket.local_addr().unwrap().to_string());
    let (mut buffer, mut total, mut told) = (vec![0; 65536], 0u64, 0);
    loop {
        let (n, from) = receive(&socket, &mut buffer);
        if n == 1 {
            return;
        }
        total += n as u64;
        if total - told >= WINDOW as u64 / 4 {
            told = total;
            socket.send_to(&total.to_ne_bytes(), from).unwrap();
        }
    }
}

fn udp_stream() -> f64 {
    let mut peer = Peer::start("udp-stream");
    let to: SocketAddr = peer.line().parse().unwrap();
    let socket = socket2::Socket::from(udp_socket(false));
    let (bytes, to) = (vec![7; 15 * CHUNK], socket2::SockAddr::from(to));
    let mut control = [0u8; 24];
    control[..8].copy_from_slice(&18usize.to_ne_bytes());
    control[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
    control[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
    control[16..18].copy_from_slice(&(CHUNK as u16).to_ne_bytes());
    // What was lost is neither received nor in flight.
    let (mut sent, mut received, mut lost, begin) = (0usize, 0usize, 0usize, Instant::now());
    let mut answer = [std::mem::MaybeUninit::new(0u8); 16];
    let mut last = Instant::now();
    while begin.elapsed() < STREAM {
        if sent - received - lost + bytes.len() <= WINDOW {
            let slices = [IoSlice::new(&bytes)];
            let message = socket2::MsgHdr::new().with_addr(&to).with_buffers(&slices).with_control(&control);
            sent += socket.sendmsg(&message, 0).unwrap();
        } else if last.elapsed() > Duration::from_millis(20) {
            lost = sent - received;
            last = Instant::now();
        }
        while socket.recv(&mut answer).is_ok() {
            // SAFETY: eight bytes were received, and all were initialised before.
            received = usize::from_ne_bytes(std::array::from_fn(|i| unsafe { answer[i].assume_init() }));
            last = Instant::now();
        }
    }
    let rate = gigabytes_per_second(received, begin.elapsed());
    socket.send_to(&[0], &to).unwrap();
    peer.end();
    rate
}

const STREAM_DEPTH: u32 = 32;

fn stream_options() -> Options {
    // One buffer on each side, as the sockets have it and as perftest does.
    Options { size: WRITE, depth: STREAM_DEPTH, ..Options::default() }
}

/// Polls, as the target of a benchmark does that waits for the end of it.
fn soft_target() {
    let end = End::new(stream_options());
    say(&end.address().to_line());
    end.connect(Address::from_line(&hear()));
    assert_eq!(end.post_recv(1, 0, 4096), 0);
    say("READY");
    end.wait_success();
    hear();
}

fn soft_stream() -> f64 {
    let mut peer = Peer::start("soft-stream");
    let address = Address::from_line(&peer.line());
    let end = End::new(stream_options());
    peer.tell(&end.address().to_line());
    end.connect(address);
    peer.line();
    let (mut posted, mut done, begin) = (0usize, 0usize, Instant::now());
    while begin.elapsed() < STREAM {
        while posted - done < STREAM_DEPTH as usize {
            assert_eq!(end.rdma(ibv_wr_opcode::IBV_WR_RDMA_WRITE, 1, 0, WRITE, address, 0), 0);
            posted += 1;
        }
        end.wait_success();
        done += 1;
    }
    let rate = gigabytes_per_second(done * WRITE, begin.elapsed());
    while done < posted {
        end.wait_success();
        done += 1;
    }
    assert_eq!(end.send(1, 0, 1), 0);
    end.wait_success();
    peer.tell("DONE");
    peer.end();
    rate
}
