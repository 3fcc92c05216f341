//! `rc_pingpong` and `write_bw` against UDP sockets, all in two processes on this machine, interleaved in one run.
//!
//! `cargo bench --bench versus_udp` prints, for each way of waiting, the median of five p50 values of half the round
//! trip, and the ratio. The datagrams of the baseline are as long as the packets of the ping-pong: the message, the
//! base transport header of 12 bytes and the ICRC of 4.
//!
//! Each side of a ping-pong has a processor of its own, the same ones for all. Left to the scheduler (`--free`), a pair of sleepers shares
//! one in some runs, where waking is no interrupt, and not in others: the baseline alone then differs by a factor of three.

use std::error::Error;
use std::io::{self, Write};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use rdma_workbench::baseline::{self, Wait};
use rdma_workbench::local::{READY, Server};
use rdma_workbench::udp_stream;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

#[derive(Debug, Parser)]
struct Options {
    /// Message size in bytes
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Round trips per run
    #[arg(long, default_value_t = 20_000)]
    iters: u32,
    /// Runs of each kind
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Leave it to the scheduler where the sides of a ping-pong run
    #[arg(long)]
    free: bool,
    /// (internal) Be the echo of the baseline
    #[arg(long, hide = true)]
    echo: Option<Wait>,
    /// (internal) Be the receiver of the baseline's stream
    #[arg(long, hide = true)]
    receive: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

const HEADERS: usize = 12 + 4;

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    if let Some(wait) = options.echo {
        let socket = baseline::socket(wait)?;
        println!("{READY}{}", socket.local_addr()?);
        std::io::stdout().flush()?;
        return Ok(baseline::udp_echo(&socket, wait)?);
    }

    if options.receive {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        println!("{READY}{}", socket.local_addr()?);
        std::io::stdout().flush()?;
        return Ok(udp_stream::receiver(socket)?);
    }

    let ping_pong = example("rc_pingpong")?;
    let places = if options.free { None } else { Places::of_this_process()? };
    println!(
        "half round trip of {} bytes, two processes{}, us; median of {} p50 of {} round trips",
        options.size,
        places.as_ref().map_or("", |_| " on a processor each"),
        options.runs,
        options.iters
    );
    println!("{:<10} {:>10} {:>14} {:>8}   all p50, us", "waiting", "UDP", "rc_pingpong", "ratio");
    for (wait, mode) in [(Wait::Spin, "busy"), (Wait::Block, "event")] {
        let (mut udp, mut rdma) = (Vec::new(), Vec::new());
        for _ in 0..options.runs {
            udp.push(udp_p50(wait, &options, places.as_ref())?);
            rdma.push(rdma_p50(&ping_pong, mode, &options, places.as_ref())?);
        }
        let (udp_median, rdma_median) = (median(&udp), median(&rdma));
        println!(
            "{mode:<10} {udp_median:>10.2} {rdma_median:>14.2} {:>8.2}   UDP {udp:.2?} RDMA {rdma:.2?}",
            rdma_median / udp_median
        );
    }

    let write_bw = example("write_bw")?;
    println!("\none-way stream between two processes, GB/s (10^9 bytes); median of {}", options.runs);
    println!(
        "UDP: datagrams of {} bytes, GSO and GRO, a window; RDMA: WRITEs of {STREAM_SIZE} bytes",
        udp_stream::DATAGRAM
    );
    let (mut udp, mut rdma) = (Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let server = Server::start(["--receive"])?;
        udp.push(udp_stream::sender(server.address(), Duration::from_secs(1))? / 1e9);
        server.finish(Duration::from_secs(5))?;
        rdma.push(write_rate(&write_bw)? / 1e9);
    }
    let (udp_median, rdma_median) = (median(&udp), median(&rdma));
    println!(
        "{:<10} {udp_median:>10.2} {rdma_median:>14.2} {:>8.2}   UDP {udp:.2?} RDMA {rdma:.2?}",
        "stream",
        rdma_median / udp_median
    );
    Ok(())
}

/// Message size of the stream of writes.
const STREAM_SIZE: usize = 65536;

/// Bytes per second of RDMA writes.
fn write_rate(program: &Path) -> Result<f64, Box<dyn Error>> {
    let report = report(program, &["--size", &STREAM_SIZE.to_string()])?;
    let rate = report["rows"][0]["mb_per_s"].as_f64().ok_or("write_bw's report has no rows[0].mb_per_s")?;
    Ok(rate * f64::from(1 << 20))
}

fn udp_p50(wait: Wait, options: &Options, places: Option<&Places>) -> Result<f64, Box<dyn Error>> {
    let name = if wait == Wait::Spin { "spin" } else { "block" };
    let server = at(places, Side::Server, || Server::start(["--echo", name]))??;
    let peer: SocketAddr = server.address();
    let trips = at(places, Side::Client, || {
        baseline::udp_ping_pong(wait, peer, options.size + HEADERS, options.iters)
    })??;
    server.finish(Duration::from_secs(5))?;
    Ok(trips.half().p50)
}

fn rdma_p50(
    program: &Path,
    mode: &str,
    options: &Options,
    places: Option<&Places>,
) -> Result<f64, Box<dyn Error>> {
    let (size, iterations) = (options.size.to_string(), options.iters.to_string());
    let arguments = ["--mode", mode, "--size", &size, "--iters", &iterations];
    let mut command = Command::new(program);
    command.args(arguments).args(["--listen", "127.0.0.1:0", "--accept-timeout", "30"]);
    let server = at(places, Side::Server, || Server::start_command(command))??;
    let address = server.address().to_string();
    let arguments: Vec<&str> = [address.as_str()].into_iter().chain(arguments).collect();
    let report = at(places, Side::Client, || report(program, &arguments))??;
    server.finish(Duration::from_secs(5))?;
    report["half_rtt_us"]["p50"].as_f64().ok_or_else(|| "rc_pingpong's report has no half_rtt_us.p50".into())
}

#[derive(Clone, Copy)]
enum Side {
    Server,
    Client,
}

/// The processors of the two sides.
struct Places {
    all: CpuSet,
    server: CpuSet,
    client: CpuSet,
}

impl Places {
    /// The first two that this process may run on; `None` if there is only one.
    fn of_this_process() -> io::Result<Option<Places>> {
        let all = sched_getaffinity(None)?;
        let mut each = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)).map(|cpu| {
            let mut one = CpuSet::new();
            one.set(cpu);
            one
        });
        Ok(each.next().zip(each.next()).map(|(server, client)| Places { all, server, client }))
    }
}

/// Runs `action` where `side` has its place: the processes that it starts stay there.
fn at<T>(places: Option<&Places>, side: Side, action: impl FnOnce() -> T) -> io::Result<T> {
    let Some(places) = places else { return Ok(action()) };
    let place = match side {
        Side::Server => &places.server,
        Side::Client => &places.client,
    };
    sched_setaffinity(None, place)?;
    let result = action();
    sched_setaffinity(None, &places.all)?;
    Ok(result)
}

/// What an example prints with `--json`.
fn report(program: &Path, arguments: &[&str]) -> Result<serde_json::Value, Box<dyn Error>> {
    let output = Command::new(program).arg("--json").args(arguments).output()?;
    if !output.status.success() {
        return Err(
            format!("{} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr)).into()
        );
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Builds an example of this package, so that what is measured is what stands in the tree.
fn example(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--quiet", "--example", name])
        .status()?;
    if !status.success() {
        return Err(format!("the example {name} does not build").into());
    }
    // This program is TARGET/release/deps/NAME, the example TARGET/release/examples/NAME.
    let me = std::env::current_exe()?;
    let profile = me.parent().and_then(|deps| deps.parent()).ok_or("this program's folder is unknown")?;
    Ok(profile.join("examples").join(name))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
