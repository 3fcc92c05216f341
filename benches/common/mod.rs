//! What the benchmarks of two processes share: the server, and connections to it.
//!
//! A benchmark starts itself as the server, on this machine. With `RDMA_BENCH_PEER=ADDR:PORT` it connects to one on another host
//! instead (`cargo bench --bench latency -- serve 0.0.0.0:7480`), and leaves out the baselines, which are of this machine.
//! `RDMA_BENCH_DEVICE=NAME` chooses the device, on both sides.
#![allow(dead_code, reason = "not every benchmark needs everything")]

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use criterion::Criterion;
use rdma_async::{Config, Domain, Listener, OperationError, RcConnection, WaitMode};
use rdma_core::qp::transport::Rc;
use rdma_core::{RemoteAccess, SharedRegion};
use rdma_workbench::baseline::{self, Wait};
use rdma_workbench::cli::{DeviceOptions, OpenDevice};
use rdma_workbench::local::Server;
use rdma_workbench::peer::{Outcome, announce, connect, runtime};
use rdma_workbench::udp_stream;
use tokio::runtime::Runtime;

/// The largest message, and the bytes that a peer may reach.
pub(crate) const LARGEST: usize = 1 << 20;
/// What a client asks of the server: to send back what arrives, or to drop it.
pub(crate) const ECHO: &[u8] = b"echo";
pub(crate) const SINK: &[u8] = b"sink";

/// Short: a benchmark of many rows is run by people who wait for it.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .sample_size(10)
        .configure_from_args()
}

/// Whether this process is a server (`serve ADDR:PORT`, or a baseline's), which has ended now.
pub(crate) fn was_server() -> bool {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", address, ..] => runtime().map_err(Into::into).and_then(|r| r.block_on(serve(address))),
        ["udp", wait, ..] => {
            udp_server(|socket| baseline::udp_echo(&socket, wait_named(wait)), wait_named(wait))
        }
        ["udp-stream", ..] => udp_server(udp_stream::receiver, Wait::Block),
        ["tcp", ..] => runtime().map_err(Into::into).and_then(|runtime| runtime.block_on(tcp_server())),
        _ => return false,
    };
    result.expect("a server that serves");
    true
}

fn wait_named(name: &str) -> Wait {
    if name == "spin" { Wait::Spin } else { Wait::Block }
}

fn udp_server(serve: impl FnOnce(UdpSocket) -> std::io::Result<()>, wait: Wait) -> Outcome {
    let socket = baseline::socket(wait)?;
    announce(socket.local_addr()?)?;
    // It ends when nothing comes any more, which is no failure of a server that is not needed any more.
    let _ = serve(socket);
    Ok(())
}

async fn tcp_server() -> Outcome {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    announce(listener.local_addr()?)?;
    Ok(baseline::tcp_echo(listener).await?)
}

async fn serve(address: &str) -> Outcome {
    let (device, domain, region) = open()?;
    let config = config(&device, WaitMode::Adaptive, LARGEST, 16).regions([region.remote()]);
    let listener = Listener::bind(address, &domain, &config).await?;
    announce(listener.local_addr())?;
    loop {
        match listener.accept().await {
            // Ends with its connection.
            Ok(connection) => drop(tokio::spawn(async move { answer(&connection).await })),
            Err(error) => eprintln!("server: {error}"),
        }
    }
}

async fn answer(connection: &RcConnection) -> Result<(), OperationError> {
    let echo = connection.peer_data() == ECHO;
    loop {
        let message = connection.recv().await?;
        match (echo, message.written()) {
            (false, _) => {}
            (true, None) => connection.send(message).await.0?,
            (true, Some(length)) => {
                let mut answer = message.into_buffer();
                answer.set_len(length);
                connection.write_with_imm(answer, connection.peer_regions()[0], 0).await.0?;
            }
        }
    }
}

fn open() -> Outcome<(OpenDevice, Domain, SharedRegion)> {
    let name = std::env::var("RDMA_BENCH_DEVICE").ok();
    let device = DeviceOptions { device: name, port: None, gid_index: None }.open()?;
    let domain = Domain::new(&device.context)?;
    let access = RemoteAccess::WRITE | RemoteAccess::READ | RemoteAccess::ATOMIC;
    let region = domain.protection_domain().share(vec![0; LARGEST], access)?;
    Ok((device, domain, region))
}

fn config(device: &OpenDevice, mode: WaitMode, size: usize, depth: u32) -> Config<Rc> {
    device
        .configure(Config::rc())
        .wait_mode(mode)
        .message_size(size)
        .send_depth(depth)
        .receive_depth(depth)
        .spare_buffers(depth as usize)
}

/// The client's side: a runtime, a device, and a server to connect to.
pub(crate) struct Client {
    pub(crate) runtime: Runtime,
    domain: Domain,
    device: OpenDevice,
    region: SharedRegion,
    address: String,
    /// Of this machine; it ends with the benchmark.
    server: Option<Server>,
}

impl Client {
    pub(crate) fn new() -> Outcome<Client> {
        let (address, server) = match std::env::var("RDMA_BENCH_PEER") {
            Ok(address) => (address, None),
            Err(_) => {
                let server = Server::start(["serve", "127.0.0.1:0"])?;
                (server.address().to_string(), Some(server))
            }
        };
        let runtime = runtime()?;
        let (device, domain, region) = runtime.block_on(async { open() })?;
        eprintln!("{device}");
        Ok(Client { runtime, domain, device, region, address, server })
    }

    /// Whether both sides are on this machine, as the baselines are.
    pub(crate) fn is_local(&self) -> bool {
        self.server.is_some()
    }

    pub(crate) async fn connect(
        &self,
        job: &[u8],
        mode: WaitMode,
        size: usize,
        depth: u32,
    ) -> Outcome<RcConnection> {
        let config =
            config(&self.device, mode, size, depth).regions([self.region.remote()]).private_data(job);
        connect(&self.address, &self.domain, &config).await
    }
}

/// A baseline's server on this machine.
pub(crate) fn baseline_server(words: &[&str]) -> Outcome<(Server, SocketAddr)> {
    let server = Server::start(words)?;
    let address = server.address();
    Ok((server, address))
}
