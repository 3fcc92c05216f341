//! Latency of datagrams: several clients, one queue pair at the server.
//!
//! ```sh
//! cargo run --release --example ud_pingpong                                # a server and three clients on this machine
//! cargo run --release --example ud_pingpong -- --listen 0.0.0.0:7474 --clients 2
//! cargo run --release --example ud_pingpong -- 192.0.2.1:7474              # on each of two other hosts
//! ```
//!
//! A server that holds a connection for each of thousands of clients runs out of something; with datagrams it needs one queue
//! pair. The price: a message is at most a path MTU long, and may be lost.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rdma_async::exchange::Exchange;
use rdma_async::{Domain, UdAddress, UdConfig, UdEndpoint};
use rdma_workbench::cli::{self, DeviceOptions, Mode, OpenDevice, number};
use rdma_workbench::latency::{HalfRtt, RoundTrips};
use rdma_workbench::local::{Server, run_clients};
use rdma_workbench::payload;
use rdma_workbench::peer::{Outcome, PeerOptions, Role, announce, refused, runtime};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Measures the latency of RDMA datagrams (UD): clients ping one queue pair of a server, which answers each.
///
/// A client sends a datagram and waits for the answer of the same size; reported is half of that time in microseconds: p50 is
/// the median, which perftest calls typical. A datagram or an answer that did not come back in time counts as lost.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Clients that the server serves; without ADDR:PORT or --listen, how many are started
    #[arg(short, long, default_value_t = 3, value_parser = number::<u32>(1..=64))]
    clients: u32,
    /// Datagram size in bytes, at least 8 for its number and at most the path MTU
    #[arg(short, long, default_value_t = 64, value_parser = number::<u32>(8..=4096))]
    size: u32,
    /// Round trips of each client, after a tenth as many for warming up
    #[arg(short = 'n', long, default_value_t = 5_000, value_parser = number(1..=u32::MAX))]
    iters: u32,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Event)]
    mode: Mode,
    /// Milliseconds after which a datagram counts as lost
    #[arg(long, default_value_t = 200, value_parser = number::<u64>(1..=60_000))]
    patience: u64,
    /// Print one JSON object per client on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// What a server tells a client, over TCP, before the first datagram.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    client: u32,
    address: UdAddress,
    max_message: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    client: u32,
    device: String,
    qp_num: u32,
    server_qp_num: u32,
    size: u32,
    answered: u64,
    lost: u64,
    half_rtt_us: HalfRtt,
}

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit(&options.peer.name("ud_pingpong"), run(&options))
}

fn run(options: &Options) -> Outcome {
    match options.peer.role() {
        Role::Server(address) => runtime()?.block_on(serve(address, options)),
        Role::Client(address) => runtime()?.block_on(ping(address, options)),
        Role::Both => {
            let server = Server::start_same()?;
            run_clients(options.clients, server.address())?;
            server.ended_well()
        }
    }
}

fn endpoint(options: &Options, device: &OpenDevice) -> Outcome<UdEndpoint> {
    let domain = Domain::new(&device.context)?;
    let mut config = UdConfig::default();
    config.wait_mode = options.mode.into();
    config.port = device.port;
    // The wire's address vector has eight bits for it.
    config.gid_index = device.gid.as_ref().map(|gid| u8::try_from(gid.index)).transpose()?;
    Ok(UdEndpoint::new(&domain, &config)?)
}

async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let endpoint = endpoint(options, &device)?;
    let listener = TcpListener::bind(address).await?;
    announce(listener.local_addr()?)?;

    let mut clients = JoinSet::new();
    let all_gone = async {
        for client in 0..options.clients {
            let (stream, _) = options.peer.limit(listener.accept()).await??;
            let max_message = u32::try_from(endpoint.max_message())?;
            let welcome = Welcome { client, address: endpoint.address(), max_message };
            clients.spawn(async move {
                let mut exchange = Exchange::new(stream, Duration::from_secs(5));
                // A client answers with nothing: its address comes with every datagram.
                let () = exchange.swap(&welcome).await.map_err(|error| error.to_string())?;
                // It goes by closing the stream.
                match exchange.into_inner().read(&mut [0; 1]).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client?.map_err(|error| format!("a client: {error}"))?;
        }
        Outcome::Ok(())
    };
    let answers = async {
        loop {
            let datagram = endpoint.recv_from().await?;
            let sender = datagram.sender();
            endpoint.send_to(datagram.into_buffer(), &sender).await.0?;
        }
    };
    tokio::select! {
        gone = all_gone => gone,
        failed = answers => failed,
    }
}

async fn ping(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let endpoint = endpoint(options, &device)?;
    let stream = TcpStream::connect(address).await.map_err(|error| refused(address, &error))?;
    let mut exchange = Exchange::new(stream, Duration::from_secs(5));
    let server: Welcome = exchange.swap(&()).await?;
    let longest = server.max_message.min(u32::try_from(endpoint.max_message())?);
    if options.size > longest {
        return Err(format!(
            "--size {}: a datagram has at most {longest} bytes, the smaller of both path MTUs",
            options.size
        )
        .into());
    }
    if server.client == 0 && !options.json {
        println!("{device}");
        println!("server  one queue pair, number {:#x}", server.address.qp_num);
    }

    let warm_up = options.iters / 10;
    let mut trips = RoundTrips::new();
    let mut lost = 0;
    for sequence in 0..u64::from(warm_up + options.iters) {
        let mut datagram = endpoint.pool().acquire().await;
        datagram.set_len(options.size as usize);
        payload::fill(&mut datagram, message_number(&server, sequence));
        let begin = Instant::now();
        endpoint.send_to(datagram, &server.address).await.0?;
        match timeout(Duration::from_millis(options.patience), answer(&endpoint, &server, sequence)).await {
            Ok(answer) => answer?,
            Err(_) => {
                lost += 1;
                continue;
            }
        }
        if sequence >= warm_up.into() {
            trips.record(begin.elapsed());
        }
    }

    if trips.is_empty() {
        return Err(format!(
            "all {lost} datagrams were lost: is UDP port 4791 open between {} and the server?",
            device.gid_text()
        )
        .into());
    }
    let report = Report {
        client: server.client,
        device: device.context.name().to_owned(),
        qp_num: endpoint.address().qp_num,
        server_qp_num: server.address.qp_num,
        size: options.size,
        answered: trips.len(),
        lost,
        half_rtt_us: trips.half(),
    };
    let HalfRtt { p50, p99, p999, max, .. } = report.half_rtt_us;
    match options.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => println!(
            "client {}: {} answers, {lost} lost; half round trip in us: p50 {p50:.2}, p99 {p99:.2}, p99.9 {p999:.2}, max {max:.2}",
            report.client, report.answered
        ),
    }
    Ok(())
}

/// Messages of different clients differ, so that an answer to another client would be noticed.
fn message_number(server: &Welcome, sequence: u64) -> u64 {
    u64::from(server.client) << 48 | sequence
}

/// Waits for the answer to datagram `sequence`, past those of strangers and late ones to datagrams that were given up.
async fn answer(endpoint: &UdEndpoint, server: &Welcome, sequence: u64) -> Outcome {
    loop {
        let datagram = endpoint.recv_from().await?;
        let is = |sequence| payload::check(&datagram, message_number(server, sequence)).is_ok();
        if datagram.sender() != server.address || (0..sequence).rev().take(64).any(is) {
            continue;
        }
        return Ok(payload::check(&datagram, message_number(server, sequence))?);
    }
}
