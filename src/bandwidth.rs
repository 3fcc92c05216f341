//! The bandwidth of one verb: many operations of one size in flight, over a range of sizes.
//!
//! Bandwidth is in MB/s with MB = 2^20 bytes, as perftest counts, over the bytes of messages without any header.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use rdma_async::{Config, Domain, Listener, RcConnection, WaitMode};
use rdma_core::{RemoteAccess, SharedRegion};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::cli::{self, DeviceOptions, Mode, OpenDevice, name_of, number};
use crate::peer::{Outcome, PeerOptions, announce, connect};
use crate::plot::PlotFile;

/// The operation that moves the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// SEND into posted receives.
    Send,
    /// RDMA WRITE into the server's memory.
    Write,
    /// RDMA READ of the server's memory.
    Read,
}

/// Measures the bandwidth of one RDMA operation; without ADDR:PORT or --listen between two processes on this machine.
///
/// Bandwidth is in MB/s with MB = 2^20 bytes, over the bytes of messages without any header, as perftest counts. An operation
/// counts when its completion was taken; --depth of them are in flight at any time.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Message size in bytes
    #[arg(short, long, default_value_t = 65536, value_parser = number::<u32>(1..=8 << 20))]
    size: u32,
    /// All sizes from 2 bytes to 8 MiB, each twice the one before
    #[arg(short, long, conflicts_with = "size")]
    all: bool,
    /// Seconds to measure each size, after a tenth as long for warming up
    #[arg(long, default_value_t = 1.0, value_parser = number(0.01..=3600.0))]
    seconds: f64,
    /// Operations in flight; fewer where they would hold more than 64 MiB
    #[arg(long, default_value_t = 16, value_parser = number::<u32>(1..=1024))]
    depth: u32,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Adaptive)]
    mode: Mode,
    /// Print one JSON object on standard output instead of the table
    #[arg(long)]
    json: bool,
    /// Draw bandwidth over message size into a file named *.svg or *.png; use it with --all
    #[arg(long, value_name = "FILE", requires = "all")]
    plot: Option<PlotFile>,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The largest message: 8 MiB, as perftest's sweep ends.
const MAX_SIZE: usize = 8 << 20;
/// The most memory that operations in flight may hold.
const MAX_IN_FLIGHT: usize = 64 << 20;

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Verb::Send => "SEND",
            Verb::Write => "RDMA WRITE",
            Verb::Read => "RDMA READ",
        })
    }
}

/// What the client asks of the server.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    verb: Verb,
}

#[derive(Debug, Serialize)]
struct Row {
    size: usize,
    operations: u64,
    mb_per_s: f64,
    messages_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    gid: String,
    mtu: u32,
    mode: String,
    verb: Verb,
    depth: u32,
    rows: Vec<Row>,
}

impl Options {
    fn sizes(&self) -> Vec<usize> {
        match self.all {
            true => (1..=23).map(|power| 1 << power).collect(),
            false => vec![self.size as usize],
        }
    }

    fn largest(&self) -> usize {
        self.sizes().into_iter().max().unwrap_or(MAX_SIZE)
    }

    fn depth_of(&self, size: usize) -> u32 {
        let limit = u32::try_from(MAX_IN_FLIGHT / size).unwrap_or(u32::MAX);
        self.depth.min(limit).max(1)
    }
}

/// The whole of a bandwidth program: `main` of the examples.
pub fn main(program: &str, verb: Verb) -> ExitCode {
    let options = Options::parse();
    let result = options.peer.run(
        async |address: &str| serve(address, &options).await,
        async |address: &str| measure(address, verb, &options).await,
    );
    cli::exit(&options.peer.name(program), result)
}

fn config(options: &Options, device: &OpenDevice) -> Config<rdma_core::qp::transport::Rc> {
    let largest = options.largest();
    let depth = options.depth_of(largest);
    device
        .configure(Config::rc())
        .wait_mode(WaitMode::from(options.mode))
        .message_size(largest)
        .receive_depth(2 * depth)
        .send_depth(options.depth)
        .spare_buffers(depth as usize)
}

fn share(domain: &Domain, options: &Options) -> Result<SharedRegion, rdma_core::Error> {
    domain.protection_domain().share(vec![0x5a; options.largest()], RemoteAccess::WRITE | RemoteAccess::READ)
}

async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let region = share(&domain, options)?;
    let listener =
        Listener::bind(address, &domain, &config(options, &device).regions([region.remote()])).await?;
    announce(listener.local_addr())?;
    let connection = options.peer.accept(&listener).await?;
    drop(listener);
    let job: Job = serde_json::from_slice(connection.peer_data())
        .map_err(|e| format!("the peer is no bandwidth program of these, or of another version: {e}"))?;
    let ended = match job.verb {
        Verb::Send => loop {
            if let Err(error) = connection.recv().await {
                break connection.ended().ok_or(error)?;
            }
        },
        // The device serves these; this program has nothing to do.
        Verb::Write | Verb::Read => connection.until_ended().await,
    };
    match ended {
        rdma_async::Ended::ClosedByPeer => Ok(()),
        other => Err(other.into()),
    }
}

async fn measure(address: &str, verb: Verb, options: &Options) -> Outcome {
    let device = options.device.open()?;
    if !options.json {
        println!("{device}");
        println!("mode    {}, {} in flight", name_of(options.mode), options.depth);
        println!("\n{:>10} {:>12} {:>12} {:>14}", "bytes", "operations", "MB/s", "messages/s");
    }
    let domain = Domain::new(&device.context)?;
    let job = serde_json::to_vec(&Job { verb })?;
    let connection = Arc::new(connect(address, &domain, &config(options, &device).private_data(job)).await?);
    let progress = match options.json || !std::io::stderr().is_terminal() {
        true => indicatif::ProgressBar::hidden(),
        false => indicatif::ProgressBar::new_spinner(),
    };
    let mut rows = Vec::new();
    for size in options.sizes() {
        progress.set_message(format!("{size} bytes"));
        progress.tick();
        let depth = options.depth_of(size);
        let seconds = Duration::from_secs_f64;
        stream_for(&connection, verb, size, depth, seconds(options.seconds / 10.0)).await?;
        let (operations, time) = stream_for(&connection, verb, size, depth, seconds(options.seconds)).await?;
        let per_second = operations as f64 / time.as_secs_f64();
        let mb_per_s = per_second * size as f64 / f64::from(1 << 20);
        let row = Row {
            size,
            operations,
            mb_per_s: (mb_per_s * 100.0).round() / 100.0,
            messages_per_s: per_second.round(),
        };
        if !options.json {
            let text =
                format!("{size:>10} {operations:>12} {:>12.2} {:>14.0}", row.mb_per_s, row.messages_per_s);
            progress.suspend(|| println!("{text}"));
        }
        rows.push(row);
    }
    progress.finish_and_clear();
    connection.close().await?;
    if let Some(file) = &options.plot {
        let title = format!("{verb} over {}, {} in flight", device.context.name(), options.depth);
        file.bandwidth(&title, &rows.iter().map(|row| (row.size, row.mb_per_s)).collect::<Vec<_>>())?;
        eprintln!("bandwidth over size is drawn in {}", file.path().display());
    }
    if options.json {
        let report = Report {
            device: device.context.name().to_owned(),
            gid: device.gid_text(),
            mtu: device.mtu.bytes(),
            mode: name_of(options.mode),
            verb,
            depth: options.depth,
            rows,
        };
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

/// Keeps `depth` operations in flight as long as `more` says so before each: how many completed, and how long they took altogether.
///
/// # Errors
///
/// An operation failed.
pub async fn stream(
    connection: &Arc<RcConnection>,
    verb: Verb,
    size: usize,
    depth: u32,
    more: impl Fn() -> bool + Clone + Send + 'static,
) -> Outcome<(u64, Duration)> {
    let begin = Instant::now();
    let mut lanes = JoinSet::new();
    for _ in 0..depth {
        let (connection, more) = (Arc::clone(connection), more.clone());
        lanes.spawn(async move { lane(&connection, verb, size, more).await });
    }
    let mut operations = 0;
    while let Some(lane) = lanes.join_next().await {
        operations += lane??;
    }
    Ok((operations, begin.elapsed()))
}

/// As [`stream`], for some time.
async fn stream_for(
    connection: &Arc<RcConnection>,
    verb: Verb,
    size: usize,
    depth: u32,
    time: Duration,
) -> Outcome<(u64, Duration)> {
    let end = Instant::now() + time;
    stream(connection, verb, size, depth, move || Instant::now() < end).await
}

/// One operation after the other, with one buffer.
async fn lane(
    connection: &RcConnection,
    verb: Verb,
    size: usize,
    more: impl Fn() -> bool,
) -> Result<u64, rdma_async::OperationError> {
    let mut buffer = connection.pool().acquire().await;
    buffer.set_len(size);
    let remote = connection.peer_regions().first().copied().ok_or(rdma_async::Ended::Closed)?;
    let remote = if verb == Verb::Read { remote.slice(0, size as u64) } else { Some(remote) };
    let remote = remote.ok_or(rdma_async::Ended::Closed)?;
    let mut operations = 0;
    while more() {
        let (result, back) = match verb {
            Verb::Send => connection.send(buffer).await,
            Verb::Write => connection.write(buffer, remote).await,
            Verb::Read => connection.read(buffer, remote).await,
        };
        result?;
        buffer = back;
        operations += 1;
    }
    Ok(operations)
}
