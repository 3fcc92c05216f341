//! Latency of messages over a reliable connection.
//!
//! ```sh
//! cargo run --release --example rc_pingpong                             # two processes on this machine
//! cargo run --release --example rc_pingpong -- --plot latency.svg       # with a picture of the distribution
//! cargo run --release --example rc_pingpong -- --listen 0.0.0.0:7471    # one host
//! cargo run --release --example rc_pingpong -- 192.0.2.1:7471           # the other
//! ```
//!
//! One iteration sends a message of the chosen size and waits for the answer of the same size, and for the completion of its own
//! send. What is reported is half of that round trip, as perftest does. Every byte of every message is checked.

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rdma_async::{Config, Domain, Listener, RcConnection};
use rdma_core::{Buffer, RemoteAccess, RemoteSlice, SharedRegion};
use rdma_workbench::cli::{self, DeviceOptions, Mode, OpenDevice, name_of, number};
use rdma_workbench::latency::{HalfRtt, RoundTrips};
use rdma_workbench::payload;
use rdma_workbench::peer::{Outcome, PeerOptions, announce, connect};
use rdma_workbench::plot::PlotFile;
use serde::{Deserialize, Serialize};

/// Measures the latency of RDMA messages; without ADDR:PORT or --listen between two processes on this machine.
///
/// An iteration sends a message, and ends when the answer of the same size has arrived and the send has completed. Reported is
/// half of its time in microseconds, as perftest does: p50 is the median, which perftest calls typical; p99 is what 99 of
/// 100 messages took at most. Every byte of every message is checked.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Message size in bytes; at the server, the size of its receive buffers
    #[arg(short, long, default_value_t = 64, value_parser = number(0..=8_usize << 20))]
    size: usize,
    /// Round trips, after a tenth as many for warming up
    #[arg(short = 'n', long, default_value_t = 10_000, value_parser = number(1..=u32::MAX))]
    iters: u32,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Adaptive)]
    mode: Mode,
    /// What carries the message; with `write` the target polls its memory, whatever the mode
    #[arg(long, value_enum, default_value_t = Verb::Send)]
    verb: Verb,
    /// Print one JSON object on standard output instead of the table
    #[arg(long)]
    json: bool,
    /// Print the distribution as bars, too
    #[arg(long, conflicts_with = "json")]
    histogram: bool,
    /// Draw the distribution into a file named *.svg or *.png
    #[arg(long, value_name = "FILE")]
    plot: Option<PlotFile>,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The operation that carries a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Verb {
    /// SEND into a posted receive
    Send,
    /// RDMA WRITE into the peer's memory
    Write,
    /// RDMA WRITE with immediate data, which completes a receive at the target
    WriteImm,
}

/// What the client asks of the server.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    verb: Verb,
    size: usize,
    rounds: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    gid: String,
    mtu: u32,
    mode: String,
    verb: Verb,
    size: usize,
    iters: u32,
    half_rtt_us: HalfRtt,
    round_trips_per_s: f64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit(&options.peer.name("rc_pingpong"), run(&options))
}

fn run(options: &Options) -> Outcome {
    if options.verb == Verb::Write && options.size == 0 {
        return Err(
            "--verb write needs a --size of at least 1: its target waits for the last byte to change".into(),
        );
    }
    options.peer.run(
        async |address: &str| serve(address, options).await,
        async |address: &str| measure(address, options).await,
    )
}

/// What a task ends with that fails.
type Failure = Box<dyn Error + Send + Sync>;

/// One side's connection and the memory that its peer may write.
struct Side {
    connection: RcConnection,
    region: SharedRegion,
}

fn config(
    options: &Options,
    device: &OpenDevice,
    region: &SharedRegion,
) -> Config<rdma_core::qp::transport::Rc> {
    device
        .configure(Config::rc())
        .wait_mode(options.mode.into())
        .message_size(options.size.max(1))
        .receive_depth(4)
        .send_depth(4)
        .spare_buffers(4)
        .regions([region.remote()])
}

async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let region = domain.protection_domain().share(vec![0; options.size.max(1)], RemoteAccess::WRITE)?;
    let listener = Listener::bind(address, &domain, &config(options, &device, &region)).await?;
    announce(listener.local_addr())?;
    if std::io::stderr().is_terminal() && options.peer.accept_timeout.is_none() {
        eprintln!("{device}");
    }
    let connection = options.peer.accept(&listener).await?;
    drop(listener);
    let job: Job = serde_json::from_slice(connection.peer_data())
        .map_err(|e| format!("the peer is no rc_pingpong, or of another version: {e}"))?;
    let side = ended(tokio::spawn(answer(Side { connection, region }, job)).await)?;
    side.connection.close().await?;
    Ok(())
}

/// Answers every message; a task of its own for the reason given at [`rounds`].
async fn answer(side: Side, job: Job) -> Result<Side, Failure> {
    let mut buffer = side.connection.pool().acquire().await;
    for sequence in 0..job.rounds {
        receive(&side, &job, sequence).await?;
        let message = message(buffer, &job, sequence);
        buffer = send(&side, &job, message).await?;
    }
    Ok(side)
}

async fn measure(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    if !options.json {
        println!("{device}");
        println!("mode    {}, {} of {} bytes", name_of(options.mode), name_of(options.verb), options.size);
    }
    let warm_up = u64::from(options.iters / 10).max(1);
    let job = Job { verb: options.verb, size: options.size, rounds: warm_up + u64::from(options.iters) };
    let domain = Domain::new(&device.context)?;
    let region = domain.protection_domain().share(vec![0; options.size.max(1)], RemoteAccess::WRITE)?;
    let config = config(options, &device, &region).private_data(serde_json::to_vec(&job)?);
    let connection = connect(address, &domain, &config).await?;
    let side = Side { connection, region };

    let progress = progress(options, job.rounds);
    let measured = tokio::spawn(rounds(side, job, warm_up, progress.clone())).await;
    progress.finish_and_clear();
    let (side, trips, total) = ended(measured)?;
    side.connection.close().await?;

    let report = Report {
        device: device.context.name().to_owned(),
        gid: device.gid_text(),
        mtu: side.connection.path_mtu(),
        mode: name_of(options.mode),
        verb: options.verb,
        size: options.size,
        iters: options.iters,
        half_rtt_us: trips.half(),
        round_trips_per_s: (f64::from(options.iters) / total.as_secs_f64()).round(),
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("\nhalf round trip of {} messages, us\n{}", report.iters, report.half_rtt_us);
        println!("\n{} round trips per second", report.round_trips_per_s);
        if options.histogram {
            println!("\n{}", trips.histogram());
        }
    }
    if let Some(file) = &options.plot {
        let title = format!(
            "{} of {} bytes over {}, {} ({} messages)",
            name_of(report.verb),
            report.size,
            report.device,
            report.mode,
            report.iters
        );
        file.latency(&title, &trips)?;
        eprintln!("the distribution is drawn in {}", file.path().display());
    }
    Ok(())
}

/// What a task ended with.
fn ended<T>(task: Result<Result<T, Failure>, tokio::task::JoinError>) -> Outcome<T> {
    match task {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(failure)) => Err(failure),
        Err(panicked) => Err(panicked.into()),
    }
}

/// Measures; gives the round trips and their sum. A task of its own, as a program's connections have: the future that a runtime
/// blocks on is polled again only after a look at all of its descriptors, which costs a system call.
async fn rounds(
    side: Side,
    job: Job,
    warm_up: u64,
    progress: indicatif::ProgressBar,
) -> Result<(Side, RoundTrips, Duration), Failure> {
    let mut trips = RoundTrips::new();
    let mut total = Duration::ZERO;
    let mut buffer = side.connection.pool().acquire().await;
    for sequence in 0..job.rounds {
        let message = message(buffer, &job, sequence);
        let begin = Instant::now();
        buffer = send(&side, &job, message).await?;
        let arrived = arrival(&side, &job, sequence).await?;
        let time = begin.elapsed();
        check(&side, &job, sequence, arrived)?;
        if sequence >= warm_up {
            trips.record(time);
            total += time;
        }
        if sequence.is_multiple_of(1024) {
            progress.set_position(sequence);
        }
    }
    Ok((side, trips, total))
}

/// Message number `sequence`. The last byte of a written message differs from that of the message before: the target sees by it
/// that the message is there.
fn message(mut buffer: Buffer, job: &Job, sequence: u64) -> Buffer {
    buffer.set_len(job.size);
    payload::fill(&mut buffer, sequence);
    if job.verb == Verb::Write {
        buffer[job.size - 1] = marker(sequence);
    }
    buffer
}

/// Never zero, as fresh memory is, and never twice in a row.
fn marker(sequence: u64) -> u8 {
    u8::try_from(sequence % 255).unwrap_or(0) + 1
}

/// Sends a message and waits for its completion.
async fn send(side: &Side, job: &Job, message: Buffer) -> Result<Buffer, Failure> {
    let (result, buffer) = match job.verb {
        Verb::Send => side.connection.send(message).await,
        Verb::Write => side.connection.write(message, target(side)?).await,
        Verb::WriteImm => side.connection.write_with_imm(message, target(side)?, 0).await,
    };
    result?;
    Ok(buffer)
}

/// The peer's memory.
fn target(side: &Side) -> Result<RemoteSlice, Failure> {
    side.connection
        .peer_regions()
        .first()
        .copied()
        .ok_or_else(|| "the peer opened no memory to write to".into())
}

/// Waits for message number `sequence`: the received message, or `None` when it was written to this side's memory.
async fn arrival(side: &Side, job: &Job, sequence: u64) -> Result<Option<rdma_async::Message>, Failure> {
    match job.verb {
        Verb::Send => return Ok(Some(side.connection.recv().await?)),
        Verb::WriteImm => {
            side.connection.recv().await?;
        }
        Verb::Write => {
            let mut last = [0];
            let mut spins = 0_u32;
            loop {
                side.region.copy_out(job.size - 1, &mut last)?;
                if last[0] == marker(sequence) {
                    break;
                }
                // Nothing completes here when a peer writes; a device in software receives when its queue is asked.
                side.connection.completion_queue().dispatch()?;
                spins += 1;
                if spins.is_multiple_of(256) {
                    if let Some(reason) = side.connection.ended() {
                        return Err(reason.into());
                    }
                    // The peer's end shows on a socket that the runtime watches.
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    Ok(None)
}

/// Checks every byte of message number `sequence`.
fn check(side: &Side, job: &Job, sequence: u64, arrived: Option<rdma_async::Message>) -> Result<(), Failure> {
    let length = |found: usize| match found == job.size {
        true => Ok(()),
        false => Err(format!("message {sequence} has {found} bytes, not {}", job.size)),
    };
    match arrived {
        Some(message) => {
            length(message.len())?;
            payload::check(&message, sequence)?;
        }
        None => {
            let mut bytes = vec![0; job.size];
            side.region.copy_out(0, &mut bytes)?;
            // The marker in the last place was checked when it arrived.
            let checked = if job.verb == Verb::Write { job.size - 1 } else { job.size };
            payload::check(&bytes[..checked], sequence)?;
        }
    }
    Ok(())
}

async fn receive(side: &Side, job: &Job, sequence: u64) -> Result<(), Failure> {
    let arrived = arrival(side, job, sequence).await?;
    check(side, job, sequence, arrived)
}

/// A bar on a terminal, nothing elsewhere.
fn progress(options: &Options, rounds: u64) -> indicatif::ProgressBar {
    if options.json || !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    indicatif::ProgressBar::new(rounds)
}
