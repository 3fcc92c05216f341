//! A tokio server for many connections that sleeps while nothing happens, and closes gracefully.
//!
//! ```sh
//! cargo run --release --example event_server                            # a server and a client with 64 connections, then ctrl-c
//! cargo run --release --example event_server -- --listen 0.0.0.0:7476   # a server, until ctrl-c
//! cargo run --release --example event_server -- 192.0.2.1:7476          # a client
//! ```
//!
//! All connections share one completion queue in event mode: one file descriptor in tokio's epoll set, however many clients there
//! are. The service is a line of text that comes back in capitals.

use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use rdma_async::{Config, Domain, Ended, Listener, OperationError, RcConnection, WaitMode};
use rdma_core::qp::transport::Rc;
use rdma_workbench::cli::{self, DeviceOptions, OpenDevice, number};
use rdma_workbench::latency::RoundTrips;
use rdma_workbench::local::Server;
use rdma_workbench::peer::{Outcome, PeerOptions, Role, announce, connect, runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A server for many connections on tokio that sleeps while nothing happens, and a client that opens many.
///
/// On ctrl-c the server takes no new connections, answers what has arrived, closes each connection and says what it did; a
/// connection that does not end within --grace seconds is cut.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Connections that the client opens
    #[arg(short, long, default_value_t = 64, value_parser = number::<u32>(1..=1024))]
    connections: u32,
    /// Requests on each connection, one after the other
    #[arg(short = 'n', long, default_value_t = 100, value_parser = number(1..=u32::MAX))]
    requests: u32,
    /// Seconds that the server waits for its connections to end
    #[arg(long, default_value_t = 5, value_parser = number(0..=3600_u64))]
    grace: u64,
    /// The most connections that the server takes
    #[arg(long, default_value_t = 1024, value_parser = number::<u32>(1..=16384))]
    limit: u32,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The longest line, in bytes.
const LINE: usize = 256;
/// Requests of one connection that wait for their answer at the server.
const DEPTH: u32 = 2;

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit(&options.peer.name("event_server"), run(&options))
}

fn run(options: &Options) -> Outcome {
    match options.peer.role() {
        Role::Server(address) => runtime()?.block_on(serve(address, options)),
        Role::Client(address) => runtime()?.block_on(async {
            for connection in ask(address, options).await? {
                connection.close().await?;
            }
            Ok(())
        }),
        Role::Both => {
            let server = Server::start_same()?;
            runtime()?.block_on(async {
                let connections = ask(&server.address().to_string(), options).await?;
                println!("interrupting the server while all connections are open");
                server.interrupt()?;
                for connection in &connections {
                    match connection.until_ended().await {
                        Ended::ClosedByPeer => {}
                        other => return Err(other.into()),
                    }
                }
                println!("the server closed all {}", connections.len());
                Outcome::Ok(())
            })?;
            server.ended_well()
        }
    }
}

/// Connections of this device that share one completion queue with room for all of them.
fn config(device: &OpenDevice, domain: &Domain, connections: u32) -> Outcome<Config<Rc>> {
    // Sends, receives, and one of the connection's own.
    let each = 2 * DEPTH + 2;
    let most = device.context.attributes()?.max_cqe;
    let depth = connections.checked_mul(each).filter(|depth| *depth <= most);
    let depth = depth.ok_or_else(|| {
        format!(
            "{connections} connections need more than the {most} completions that a queue of {} has: take at most {}",
            device.context.name(),
            most / each
        )
    })?;
    let queue = domain.completion_queue(depth, WaitMode::Event)?;
    Ok(device
        .configure(Config::rc())
        .completion_queue(&queue)
        .message_size(LINE)
        .send_depth(DEPTH)
        .receive_depth(DEPTH)
        .spare_buffers(1))
}

async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    let listener = Listener::bind(address, &domain, &config(&device, &domain, options.limit)?).await?;
    announce(listener.local_addr())?;

    let answered = Arc::new(AtomicU64::new(0));
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    let (mut accepted, mut failed) = (0_u64, 0_u64);
    // One future for the whole loop: a signal that comes between two of them would be lost.
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    loop {
        let room = connections.len() < options.limit as usize;
        tokio::select! {
            connection = listener.accept(), if room => match connection {
                Ok(connection) => {
                    accepted += 1;
                    connections.spawn(client(connection, Arc::clone(&answered), stopping.clone()));
                }
                // One client that could not connect is no reason to stop.
                Err(error) => eprintln!("event_server (server): {error}"),
            },
            Some(ended) = connections.join_next() => failed += report(ended?),
            interrupted = &mut interrupted => break interrupted?,
        }
    }

    drop(listener);
    let open = connections.len();
    stop.send_replace(true);
    let all_ended = async {
        while let Some(ended) = connections.join_next().await {
            failed += report(ended?);
        }
        Outcome::Ok(())
    };
    let in_time = tokio::time::timeout(Duration::from_secs(options.grace), all_ended).await;
    let cut = connections.len();
    // Dropped futures give up interest, not memory: what the device still has it may go on using.
    connections.shutdown().await;
    eprintln!(
        "server: {accepted} connections, {} requests answered, {failed} connections failed; at the end {open} were open, {cut} of them cut",
        answered.load(Ordering::Relaxed)
    );
    in_time.unwrap_or(Ok(()))
}

fn report(ended: Result<(), OperationError>) -> u64 {
    match ended {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("event_server (server): a connection: {error}");
            1
        }
    }
}

/// Serves one client until it goes, or until the server stops.
async fn client(
    connection: RcConnection,
    answered: Arc<AtomicU64>,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), OperationError> {
    loop {
        let received = tokio::select! {
            // First what has arrived, then the wish to stop.
            biased;
            received = connection.recv() => received,
            _ = async { stopping.wait_for(|stop| *stop).await.is_ok() } => return connection.close().await,
        };
        let mut message = match received {
            Ok(message) => message,
            Err(_) if matches!(connection.ended(), Some(Ended::ClosedByPeer)) => return Ok(()),
            Err(error) => return Err(error),
        };
        message.make_ascii_uppercase();
        // The answer leaves from where the request arrived.
        connection.send(message).await.0?;
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

/// Opens connections and sends requests on all of them at once.
async fn ask(address: &str, options: &Options) -> Outcome<Vec<Arc<RcConnection>>> {
    let device = options.device.open()?;
    println!("{device}");
    let domain = Domain::new(&device.context)?;
    let config = config(&device, &domain, options.connections)?;

    let begin = Instant::now();
    let mut connections = Vec::new();
    for _ in 0..options.connections {
        connections.push(Arc::new(connect(address, &domain, &config).await?));
    }
    let set_up = begin.elapsed();
    println!(
        "{} connections in {:.0} ms, {:.2} ms each",
        options.connections,
        set_up.as_secs_f64() * 1e3,
        set_up.as_secs_f64() * 1e3 / f64::from(options.connections)
    );

    let begin = Instant::now();
    let mut asking = JoinSet::new();
    for (number, connection) in connections.iter().enumerate() {
        let (connection, requests) = (Arc::clone(connection), options.requests);
        // An error crosses tasks as text.
        asking.spawn(async move {
            requests_of(&connection, number, requests).await.map_err(|error| error.to_string())
        });
    }
    let (mut answers, mut slowest) = (0, 0.0_f64);
    while let Some(trips) = asking.join_next().await {
        let trips = trips??;
        answers += trips.len();
        slowest = slowest.max(2.0 * trips.half().p50);
    }
    println!(
        "{answers} requests answered, {:.0} per second; the median request of the slowest connection took {slowest:.1} us",
        answers as f64 / begin.elapsed().as_secs_f64()
    );
    Ok(connections)
}

async fn requests_of(connection: &RcConnection, number: usize, requests: u32) -> Outcome<RoundTrips> {
    let mut trips = RoundTrips::new();
    for request in 0..requests {
        let line = format!("request {request} of connection {number}");
        let begin = Instant::now();
        let mut buffer = connection.pool().acquire().await;
        buffer.set_len(line.len());
        buffer.copy_from_slice(line.as_bytes());
        connection.send(buffer).await.0?;
        let answer = connection.recv().await?;
        trips.record(begin.elapsed());
        if answer[..] != *line.to_uppercase().as_bytes() {
            return Err(format!("{line:?} was answered by {:?}", String::from_utf8_lossy(&answer)).into());
        }
    }
    Ok(trips)
}
