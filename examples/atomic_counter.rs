//! Several clients add to one word of a server's memory with RDMA atomics; the server's program takes no part in it.
//!
//! ```sh
//! cargo run --release --example atomic_counter                       # a server and four clients on this machine
//! cargo run --release --example atomic_counter -- --listen 0.0.0.0:7473 --clients 2
//! cargo run --release --example atomic_counter -- 192.0.2.1:7473
//! ```

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rdma_async::{Config, Domain, Listener};
use rdma_core::RemoteAccess;
use rdma_workbench::cli::{self, DeviceOptions, Mode, number};
use rdma_workbench::local::{Server, run_clients};
use rdma_workbench::peer::{Outcome, PeerOptions, Role, announce, connect, runtime};

/// Adds to a counter in another process's memory with RDMA fetch-and-add, and checks that no addition is lost.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Clients that the server serves; without ADDR:PORT or --listen, how many are started
    #[arg(short, long, default_value_t = 4, value_parser = number::<u32>(1..=64))]
    clients: u32,
    /// Additions of each client
    #[arg(short = 'n', long, default_value_t = 10_000, value_parser = number(1..=u64::MAX >> 8))]
    additions: u64,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Adaptive)]
    mode: Mode,
    #[command(flatten)]
    device: DeviceOptions,
}

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit(&options.peer.name("atomic_counter"), run(&options))
}

fn run(options: &Options) -> Outcome {
    match options.peer.role() {
        Role::Server(address) => runtime()?.block_on(serve(address, options)),
        Role::Client(address) => runtime()?.block_on(add(address, options)),
        // A server and its clients, each this program in a process of its own.
        Role::Both => {
            let server = Server::start_same()?;
            run_clients(options.clients, server.address())?;
            server.ended_well()
        }
    }
}

async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let counter = domain.protection_domain().share(vec![0; 8], RemoteAccess::ATOMIC)?;
    let config = device.configure(Config::rc()).wait_mode(options.mode.into()).regions([counter.remote()]);
    let listener = Listener::bind(address, &domain, &config).await?;
    announce(listener.local_addr())?;

    let mut connections = Vec::new();
    let mut expected = 0_u64;
    for _ in 0..options.clients {
        let connection = options.peer.accept(&listener).await?;
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

async fn add(address: &str, options: &Options) -> Outcome {
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
