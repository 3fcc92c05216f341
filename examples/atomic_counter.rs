//! Several clients add to one word of a server's memory with RDMA atomics; the server's program takes no part in it.
//!
//! ```sh
//! cargo run --release --example atomic_counter                       # a server and four clients on this machine
//! cargo run --release --example atomic_counter -- --listen 0.0.0.0:7473 --clients 2
//! cargo run --release --example atomic_counter -- 192.0.2.1:7473
//! ```

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rdma_async::{Config, Domain, Listener, connect};
use rdma_core::RemoteAccess;
use rdma_workbench::cli::{self, DeviceOptions, Mode};
use rdma_workbench::local::{READY, Server};

/// Adds to a counter in another process's memory with RDMA fetch-and-add, and checks that no addition is lost.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Connect to a server started with --listen
    #[arg(value_name = "ADDR:PORT", conflicts_with = "listen")]
    server: Option<String>,
    /// Hold the counter for --clients clients
    #[arg(short, long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Clients that the server serves; without ADDR:PORT or --listen, how many are started
    #[arg(short, long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    clients: u32,
    /// Additions of each client
    #[arg(short = 'n', long, default_value_t = 10_000)]
    additions: u64,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Adaptive)]
    mode: Mode,
    #[command(flatten)]
    device: DeviceOptions,
    /// Give up when a client does not connect in so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    accept_timeout: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let name = if options.listen.is_some() { "atomic_counter (server)" } else { "atomic_counter" };
    cli::exit(name, run(&options))
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match (&options.listen, &options.server) {
        (Some(address), _) => runtime.block_on(serve(address, options)),
        (None, Some(address)) => runtime.block_on(add(address, options)),
        (None, None) => local(options),
    }
}

/// A server and its clients, each this program in a process of its own.
fn local(options: &Options) -> Result<(), Box<dyn Error>> {
    let same = || std::env::args_os().skip(1);
    let server = Server::start(same().chain(["--listen", "127.0.0.1:0"].map(Into::into)))?;
    let address = server.address().to_string();
    let program = std::env::current_exe()?;
    let clients = (0..options.clients)
        .map(|_| std::process::Command::new(&program).args(same()).arg(&address).spawn())
        .collect::<Result<Vec<_>, _>>()?;
    let mut failed = 0;
    for mut client in clients {
        failed += u32::from(!client.wait()?.success());
    }
    let status = server.finish(Duration::from_secs(10))?;
    match (failed, status.success()) {
        (0, true) => Ok(()),
        (0, false) => Err("the server found the wrong sum".into()),
        (failed, _) => Err(format!("{failed} of {} clients failed", options.clients).into()),
    }
}

async fn serve(address: &str, options: &Options) -> Result<(), Box<dyn Error>> {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let counter = domain.protection_domain().share(vec![0; 8], RemoteAccess::ATOMIC)?;
    let config = device.configure(Config::rc()).wait_mode(options.mode.into()).regions([counter.remote()]);
    let listener = Listener::bind(address, &domain, &config).await?;
    println!("{READY}{}", listener.local_addr());
    std::io::stdout().flush()?;

    let mut connections = Vec::new();
    let mut expected = 0_u64;
    for client in 0..options.clients {
        let limit = Duration::from_secs(options.accept_timeout);
        let connection = tokio::time::timeout(limit, listener.accept()).await.map_err(|_| {
            format!("client {client} of {} did not connect within {limit:?}", options.clients)
        })??;
        let additions = connection.peer_data().try_into().map_err(|_| "the peer is no atomic_counter")?;
        expected += u64::from_le_bytes(additions);
        connections.push(connection);
    }
    for connection in &connections {
        match connection.until_ended().await {
            rdma_async::Ended::ClosedByPeer => {}
            other => return Err(other.into()),
        }
    }
    let sum = counter.load(0)?;
    eprintln!("counter {sum} after {} clients, expected {expected}", options.clients);
    if sum == expected { Ok(()) } else { Err(format!("the counter is {sum}, not {expected}").into()) }
}

async fn add(address: &str, options: &Options) -> Result<(), Box<dyn Error>> {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let config = device
        .configure(Config::rc())
        .wait_mode(options.mode.into())
        .private_data(options.additions.to_le_bytes());
    let connection = connect(address, &domain, &config).await?;
    let counter =
        *connection.peer_regions().first().ok_or("the peer opened no memory: it is no atomic_counter")?;
    let begin = Instant::now();
    let mut last = None;
    for _ in 0..options.additions {
        let before = connection.fetch_and_add(counter, 1).await?;
        if last.is_some_and(|last| before <= last) {
            return Err(format!("the counter went from {last:?} to {before}").into());
        }
        last = Some(before);
    }
    let time = begin.elapsed();
    connection.close().await?;
    println!(
        "{} additions, {:.2} us each, the last one found {}",
        options.additions,
        time.as_secs_f64() * 1e6 / options.additions.max(1) as f64,
        last.unwrap_or(0)
    );
    Ok(())
}
