//! A key-value store in a server's memory: read by one-sided RDMA READ, written by RDMA WRITE with immediate.
//!
//! ```sh
//! cargo run --release --example remote_kv                              # a server and four clients on this machine
//! cargo run --release --example remote_kv -- --listen 0.0.0.0:7475     # a server, until ctrl-c
//! cargo run --release --example remote_kv -- 192.0.2.1:7475 --put colour=blue
//! cargo run --release --example remote_kv -- 192.0.2.1:7475 --get colour
//! ```
//!
//! This is how storage and databases use RDMA: a read costs the server's processor nothing, because its device answers it. What
//! makes that correct is in `table.rs`; who may touch which memory in `server.rs`.

mod client;
mod server;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use client::Client;
use rdma_workbench::cli::{self, DeviceOptions, Mode, number};
use rdma_workbench::latency::RoundTrips;
use rdma_workbench::local::{Server, run_clients};
use rdma_workbench::payload;
use rdma_workbench::peer::{Outcome, PeerOptions, Role, runtime};

/// A key-value store that is read by one-sided RDMA READs and written by RDMA WRITE with immediate.
///
/// Without --get and --put, a client stores and reads keys at random, and checks every value: that it is whole, of its key, and
/// never older than one seen before. A read that meets a slot while the server changes it is torn: it is noticed by version
/// and checksum, counted, and repeated.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(flatten)]
    peer: PeerOptions,
    /// Read KEY and print its value
    #[arg(long, value_name = "KEY", requires = "server", conflicts_with = "put")]
    get: Option<String>,
    /// Store VALUE
    #[arg(long, value_name = "KEY=VALUE", requires = "server", value_parser = pair)]
    put: Option<(String, String)>,
    /// Slots of the server's table, of 256 bytes each
    #[arg(long, default_value_t = 4096, value_parser = number::<u32>(1..=1 << 22))]
    slots: u32,
    /// Clients to start, without ADDR:PORT or --listen
    #[arg(short, long, default_value_t = 4, value_parser = number::<u32>(1..=64))]
    clients: u32,
    /// Operations of each client
    #[arg(short = 'n', long, default_value_t = 20_000, value_parser = number(1..=u32::MAX))]
    operations: u32,
    /// Writes among 100 operations
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = number::<u8>(0..=100))]
    writes: u8,
    /// Keys that are used; few make readers and writers meet
    #[arg(long, default_value_t = 64, value_parser = number::<u32>(1..=1 << 20))]
    keys: u32,
    /// How to wait for completions
    #[arg(short, long, value_enum, default_value_t = Mode::Event)]
    mode: Mode,
    #[command(flatten)]
    device: DeviceOptions,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("give a key and a value, as in colour=blue")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit(&options.peer.name("remote_kv"), run(&options))
}

fn run(options: &Options) -> Outcome {
    match options.peer.role() {
        Role::Server(address) => runtime()?.block_on(server::serve(address, options)),
        Role::Client(address) => runtime()?.block_on(work(address, options)),
        Role::Both => {
            let server = Server::start_same()?;
            run_clients(options.clients, server.address())?;
            server.interrupt()?;
            server.ended_well()
        }
    }
}

async fn work(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let mut client = Client::connect(address, &device, options).await?;
    if let Some((key, value)) = &options.put {
        client.put(key.as_bytes(), value.as_bytes()).await?;
    } else if let Some(key) = &options.get {
        let value = client.get(key.as_bytes()).await?.ok_or_else(|| format!("there is no key {key:?}"))?;
        println!("{}", String::from_utf8_lossy(&value));
    } else {
        if client.number() == 0 {
            println!("{device}");
        }
        load(&mut client, options).await?;
    }
    client.close().await
}

/// Bytes of a value: who wrote it and the how manieth of the writer it is, then bytes that depend on both.
const VALUE: usize = 100;
const STAMP: usize = 12;

fn value(writer: u32, sequence: u64, key: u32) -> Vec<u8> {
    let mut value = vec![0; VALUE];
    value[..4].copy_from_slice(&writer.to_le_bytes());
    value[4..STAMP].copy_from_slice(&sequence.to_le_bytes());
    payload::fill(&mut value[STAMP..], sequence << 20 ^ u64::from(key) << 8 ^ u64::from(writer));
    value
}

/// Stores and reads at random, and checks what it reads.
async fn load(client: &mut Client, options: &Options) -> Outcome {
    let me = client.number();
    let (mut reads, mut writes) = (RoundTrips::new(), RoundTrips::new());
    // The last that was seen of each key and writer; writes of different clients to one key come in any order.
    let mut seen = std::collections::HashMap::new();
    let mut missing = 0_u64;
    for operation in 1..=u64::from(options.operations) {
        let number = fastrand::u32(0..options.keys);
        let key = format!("key {number}");
        let begin = Instant::now();
        if fastrand::u8(0..100) < options.writes {
            client.put(key.as_bytes(), &value(me, operation, number)).await?;
            writes.record(begin.elapsed());
            seen.insert((number, me), operation);
            continue;
        }
        let found = client.get(key.as_bytes()).await?;
        reads.record(begin.elapsed());
        let Some(found) = found else {
            if seen.keys().any(|&(key, _)| key == number) {
                return Err(format!("{key:?} was there, and is no more").into());
            }
            missing += 1;
            continue;
        };
        let stamp = found.split_first_chunk().and_then(|(writer, rest)| Some((writer, rest.first_chunk()?)));
        let (writer, sequence) = stamp.ok_or("a value is too short: is somebody else using the store?")?;
        let (writer, sequence) = (u32::from_le_bytes(*writer), u64::from_le_bytes(*sequence));
        if found != value(writer, sequence, number) {
            return Err(format!("the value of {key:?} is not one that was stored").into());
        }
        let last = seen.entry((number, writer)).or_default();
        if sequence < *last {
            return Err(
                format!("{key:?} went back from write {last} to {sequence} of client {writer}").into()
            );
        }
        *last = sequence;
    }
    // Half of a round trip is what RoundTrips reports; an operation takes all of it.
    let (get, put) = (reads.half(), writes.half());
    println!(
        "client {me}: {} gets, p50 {:.1} us, p99 {:.1} us ({missing} of keys not yet stored, {} torn reads repeated); {} puts, p50 {:.1} us, p99 {:.1} us; every value right",
        reads.len(),
        2.0 * get.p50,
        2.0 * get.p99,
        client.torn,
        writes.len(),
        2.0 * put.p50,
        2.0 * put.p99,
    );
    Ok(())
}
