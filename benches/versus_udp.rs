//! `rc_pingpong` and `write_bw` against UDP sockets, all in two processes on this machine, interleaved in one run.
//!
//! `cargo bench --bench versus_udp` prints, for each way of waiting, the median of five p50 values of half the round
//! trip, and the ratio. The datagrams of the baseline are as long as the packets of the ping-pong: the message, the
//! base transport header of 12 bytes and the ICRC of 4.

use std::error::Error;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use rdma_workbench::baseline::{self, Wait};
use rdma_workbench::local::{READY, Server};
use rdma_workbench::udp_stream;

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
    println!(
        "half round trip of {} bytes, two processes, us; median of {} p50 of {} round trips",
        options.size, options.runs, options.iters
    );
    println!("{:<10} {:>10} {:>14} {:>8}   all p50, us", "waiting", "UDP", "rc_pingpong", "ratio");
    for (wait, mode) in [(Wait::Spin, "busy"), (Wait::Block, "event")] {
        let (mut udp, mut rdma) = (Vec::new(), Vec::new());
        for _ in 0..options.runs {
            udp.push(udp_p50(wait, &options)?);
            rdma.push(rdma_p50(&ping_pong, mode, &options)?);
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

fn udp_p50(wait: Wait, options: &Options) -> Result<f64, Box<dyn Error>> {
    let name = if wait == Wait::Spin { "spin" } else { "block" };
    let server = Server::start(["--echo", name])?;
    let peer: SocketAddr = server.address();
    let trips = baseline::udp_ping_pong(wait, peer, options.size + HEADERS, options.iters)?;
    server.finish(Duration::from_secs(5))?;
    Ok(trips.half().p50)
}

fn rdma_p50(program: &Path, mode: &str, options: &Options) -> Result<f64, Box<dyn Error>> {
    let (size, iterations) = (options.size.to_string(), options.iters.to_string());
    let report = report(program, &["--mode", mode, "--size", &size, "--iters", &iterations])?;
    report["half_rtt_us"]["p50"].as_f64().ok_or_else(|| "rc_pingpong's report has no half_rtt_us.p50".into())
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
