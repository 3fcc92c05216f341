//! 64 queue pairs with 16 operations of 64 bytes in flight each, on two cores: futures against a synchronous loop with one thread per core.
//! An operation is an echo, also against TCP with tokio on the loopback, or an RDMA write. All in one process, in turns, so that what else the
//! machine does strikes all alike.
//!
//! Futures run as a task per operation in flight, with a runtime per core or one for both; and as a task per side of a pair that posts all its
//! operations as one batch, which the synchronous loop does not.
//!
//! usage: cargo bench --bench async_throughput [-- ROW...] [SECONDS]      rows by a part of their names, all unless given; of each of five
//!                                                                       turns, 0.4 unless given
//!
//! The device is the built-in one. Both ends are in this process, between which it passes packets directly; with `RDMA_SOFT_LOCAL=wire`
//! they go through its UDP socket. An echo counts when it is back, a write when it completed.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a benchmark fails by panicking, and its numbers are small"
)]

use std::{
    cell::RefCell,
    sync::{Arc, Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rdma_async::{Batch, Config, Domain, Message, RcConnection, WaitMode, connect_over};
use rdma_core::{
    Buffer, CompletionQueue, Completions, ConnectOptions, Device, EndpointOptions, Opcode, Provider,
    QueuePair, RecvRequest, RemoteAccess, RemoteSlice, SharedRegion, WorkRequest,
    qp::{state::Rts, transport::Rc},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinSet,
};

const CORES: usize = 2;
const PAIRS: usize = 64;
const IN_FLIGHT: usize = 16;
const SIZE: usize = 64;
const TURNS: usize = 5;

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Echoes,
    Writes,
}

/// Nanoseconds from posting an operation to its end.
type Latencies = Histogram<u64>;

fn latencies() -> Latencies {
    Histogram::new_with_bounds(1, 60_000_000_000, 2).unwrap()
}

thread_local! {
    /// What the tasks of a thread recorded.
    static OWN: RefCell<Own> = RefCell::new(Own(latencies()));
}

struct Own(Latencies);

/// What the tasks of all threads recorded that have ended.
static ALL: Mutex<Option<Latencies>> = Mutex::new(None);

impl Drop for Own {
    fn drop(&mut self) {
        ALL.lock().unwrap().get_or_insert_with(latencies).add(&self.0).unwrap();
    }
}

/// `record` by a task.
fn note(message: &[u8], epoch: Instant) -> Duration {
    OWN.with_borrow_mut(|own| record(&mut own.0, message, epoch))
}

/// The rate of what tasks recorded in `elapsed`; their threads have ended.
fn noted(elapsed: Duration) -> (f64, Latencies) {
    rate(elapsed, ALL.lock().unwrap().take().unwrap())
}

/// Writes the time into a message.
fn stamp(message: &mut [u8], epoch: Instant) {
    let now = u64::try_from(epoch.elapsed().as_nanos()).unwrap();
    message[..8].copy_from_slice(&now.to_le_bytes());
}

/// Gives the time.
fn record(latencies: &mut Latencies, message: &[u8], epoch: Instant) -> Duration {
    let elapsed = epoch.elapsed();
    let now = u64::try_from(elapsed.as_nanos()).unwrap();
    let sent = u64::from_le_bytes(message[..8].try_into().unwrap());
    latencies.saturating_record((now - sent).max(1));
    elapsed
}

fn soft() -> rdma_core::Context {
    let devices = Device::list().unwrap();
    devices.into_iter().find(|device| device.provider() == Provider::Soft).unwrap().open().unwrap()
}

// ---- the synchronous loop ----

/// The pairs of one thread, both sides of each, on one completion queue.
struct Loop {
    cq: CompletionQueue,
    pairs: Vec<Pair>,
    /// Where clients write.
    target: RemoteSlice,
    _target: SharedRegion,
}

struct Pair {
    client: QueuePair<Rc, Rts>,
    server: QueuePair<Rc, Rts>,
    /// Of the client, to send; and of the server, to receive.
    idle: [Vec<Buffer>; 2],
    /// Messages that could be sent but for a buffer whose send has not completed.
    owed: usize,
}

const CLIENT: u64 = 0;
const SERVER: u64 = 1;

impl Loop {
    fn new() -> Loop {
        let context = soft();
        let pd = context.protection_domain().unwrap();
        let depth = u32::try_from(IN_FLIGHT * 2).unwrap();
        let count = PAIRS / CORES;
        let cq = context.completion_queue(u32::try_from(count).unwrap() * 4 * depth).build().unwrap();
        let pairs = (0..count as u64).map(|number| {
            let pair = || pd.queue_pair::<Rc>(&cq, &cq).max_send(depth).max_recv(depth).build().unwrap();
            let (client, server) = (pair(), pair());
            let options = EndpointOptions::default();
            let (c, s) = (client.endpoint(&options).unwrap(), server.endpoint(&options).unwrap());
            let options = ConnectOptions::default();
            let client = client.connect(&c, &s, &options).unwrap();
            let server = server.connect(&s, &c, &options).unwrap();
            let mut buffers = pd.allocate(SIZE * IN_FLIGHT * 7).unwrap().into_buffers(SIZE);
            for (qp, side) in [(&client, CLIENT), (&server, SERVER)] {
                for buffer in buffers.by_ref().take(IN_FLIGHT * 2) {
                    qp.post_recv(RecvRequest::new(buffer).id(number * 2 + side)).unwrap();
                }
            }
            let idle = [buffers.by_ref().take(IN_FLIGHT).collect(), buffers.collect()];
            Pair { client, server, idle, owed: 0 }
        });
        let pairs = pairs.collect();
        let region = pd.share(vec![0; SIZE], RemoteAccess::all()).unwrap();
        Loop { cq, pairs, target: region.remote(), _target: region }
    }

    fn echo(&mut self, length: Duration) -> Latencies {
        let (epoch, mut latencies) = (Instant::now(), latencies());
        let mut completions = Completions::new();
        let mut outstanding = 0;
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            for mut buffer in std::mem::take(&mut pair.idle[0]) {
                stamp(&mut buffer, epoch);
                pair.client.post_send(WorkRequest::send(buffer).id(number as u64 * 2 + CLIENT)).unwrap();
                outstanding += 1;
            }
        }
        let mut sends = outstanding;
        let mut goes_on = true;
        while outstanding > 0 || sends > 0 {
            goes_on = goes_on && epoch.elapsed() < length;
            for mut completion in self.cq.poll(&mut completions).unwrap() {
                completion.result().unwrap();
                let (id, opcode) = (completion.id(), completion.opcode());
                let mut buffer = completion.take_buffer().unwrap();
                let pair = &mut self.pairs[usize::try_from(id / 2).unwrap()];
                match (opcode, id % 2) {
                    (Opcode::Recv, SERVER) => {
                        let next = pair.idle[1].pop().unwrap();
                        pair.server.post_recv(RecvRequest::new(next).id(id)).unwrap();
                        pair.server.post_send(WorkRequest::send(buffer).id(id)).unwrap();
                        sends += 1;
                    }
                    (Opcode::Recv, _) => {
                        record(&mut latencies, &buffer, epoch);
                        outstanding -= 1;
                        buffer.set_len(SIZE);
                        pair.client.post_recv(RecvRequest::new(buffer).id(id)).unwrap();
                        if goes_on {
                            outstanding += 1;
                            match pair.idle[0].pop() {
                                Some(mut next) => {
                                    stamp(&mut next, epoch);
                                    pair.client.post_send(WorkRequest::send(next).id(id)).unwrap();
                                    sends += 1;
                                }
                                None => pair.owed += 1,
                            }
                        }
                    }
                    (_, SERVER) => {
                        sends -= 1;
                        pair.idle[1].push(buffer);
                    }
                    _ if pair.owed > 0 => {
                        pair.owed -= 1;
                        stamp(&mut buffer, epoch);
                        pair.client.post_send(WorkRequest::send(buffer).id(id)).unwrap();
                    }
                    _ => {
                        sends -= 1;
                        pair.idle[0].push(buffer);
                    }
                }
            }
        }
        latencies
    }

    /// RDMA writes of the clients.
    fn write(&mut self, length: Duration) -> Latencies {
        let (epoch, mut latencies) = (Instant::now(), latencies());
        let mut completions = Completions::new();
        let mut outstanding = 0;
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            for mut buffer in std::mem::take(&mut pair.idle[0]) {
                stamp(&mut buffer, epoch);
                pair.client.post_send(WorkRequest::write(buffer, self.target).id(number as u64)).unwrap();
                outstanding += 1;
            }
        }
        let mut goes_on = true;
        while outstanding > 0 {
            goes_on = goes_on && epoch.elapsed() < length;
            for mut completion in self.cq.poll(&mut completions).unwrap() {
                completion.result().unwrap();
                let id = completion.id();
                let mut buffer = completion.take_buffer().unwrap();
                record(&mut latencies, &buffer, epoch);
                let pair = &mut self.pairs[usize::try_from(id).unwrap()];
                if goes_on {
                    stamp(&mut buffer, epoch);
                    pair.client.post_send(WorkRequest::write(buffer, self.target).id(id)).unwrap();
                } else {
                    outstanding -= 1;
                    pair.idle[0].push(buffer);
                }
            }
        }
        latencies
    }
}

/// One thread per core.
fn synchronous(work: Work, length: Duration) -> (f64, Latencies) {
    let mut loops: Vec<_> = (0..CORES).map(|_| Loop::new()).collect();
    let start = Barrier::new(loops.len());
    let begin = Instant::now();
    let all = thread::scope(|scope| {
        let threads: Vec<_> = loops
            .iter_mut()
            .map(|side| {
                scope.spawn(|| {
                    start.wait();
                    match work {
                        Work::Echoes => side.echo(length),
                        Work::Writes => side.write(length),
                    }
                })
            })
            .collect();
        let mut all = latencies();
        threads.into_iter().for_each(|thread| all.add(thread.join().unwrap()).unwrap());
        all
    });
    rate(begin.elapsed(), all)
}

// ---- futures ----

/// How a side of a pair keeps its operations in flight.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    /// A task for each, which awaits one at a time.
    Tasks,
    /// One task, which posts all with one doorbell and one signalled completion.
    Batches,
}

/// Pairs on one completion queue.
struct Group {
    work: Work,
    style: Style,
    connections: Vec<(Arc<RcConnection>, Arc<RcConnection>)>,
    _target: SharedRegion,
}

impl Group {
    /// As many pairs as there are for one core.
    async fn new(work: Work, style: Style) -> Group {
        let domain = Domain::new(&soft()).unwrap();
        let target = domain.protection_domain().share(vec![0; SIZE], RemoteAccess::all()).unwrap();
        let (depth, count) = (IN_FLIGHT * 2, PAIRS / CORES);
        let depth_of_queue = u32::try_from(count * 4 * (depth + 1)).unwrap();
        let queue = domain.completion_queue(depth_of_queue, WaitMode::Adaptive).unwrap();
        let config = Config::rc()
            .completion_queue(&queue)
            .message_size(SIZE)
            .send_depth(u32::try_from(depth).unwrap())
            .receive_depth(u32::try_from(depth).unwrap())
            .spare_buffers(depth)
            .regions([target.remote()])
            .keep_alive(None);
        let mut connections = Vec::new();
        for _ in 0..count {
            let (left, right) = tokio::io::duplex(1024);
            let (a, b) =
                tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
            let (client, server) = (Arc::new(a.unwrap()), Arc::new(b.unwrap()));
            match (work, style) {
                (Work::Echoes, Style::Tasks) => {
                    (0..IN_FLIGHT).for_each(|_| drop(tokio::spawn(answer(Arc::clone(&server)))));
                }
                (Work::Echoes, Style::Batches) => drop(tokio::spawn(answer_batches(Arc::clone(&server)))),
                (Work::Writes, _) => {}
            }
            connections.push((client, server));
        }
        Group { work, style, connections, _target: target }
    }

    async fn run(&self, length: Duration) {
        let epoch = Instant::now();
        let mut tasks = JoinSet::new();
        for (client, _) in &self.connections {
            let client = || Arc::clone(client);
            match (self.work, self.style) {
                (Work::Echoes, Style::Tasks) => {
                    (0..IN_FLIGHT).for_each(|_| drop(tasks.spawn(ask(client(), epoch, length))));
                }
                (Work::Echoes, Style::Batches) => drop(tasks.spawn(ask_batches(client(), epoch, length))),
                (Work::Writes, Style::Tasks) => {
                    (0..IN_FLIGHT).for_each(|_| drop(tasks.spawn(write(client(), epoch, length))));
                }
                (Work::Writes, Style::Batches) => drop(tasks.spawn(write_batches(client(), epoch, length))),
            }
        }
        tasks.join_all().await;
    }
}

/// Sends a message and waits for its echo, again and again.
async fn ask(client: Arc<RcConnection>, epoch: Instant, length: Duration) {
    let mut buffer = client.pool().acquire().await;
    let mut now = Duration::ZERO;
    while now < length {
        stamp(&mut buffer, epoch);
        let (sent, returned) = client.send(buffer).await;
        sent.unwrap();
        buffer = returned;
        let message = client.recv().await.unwrap();
        now = note(&message, epoch);
    }
}

/// Writes again and again.
async fn write(client: Arc<RcConnection>, epoch: Instant, length: Duration) {
    let target = client.peer_regions()[0];
    let mut buffer = client.pool().acquire().await;
    let mut now = Duration::ZERO;
    while now < length {
        stamp(&mut buffer, epoch);
        let (written, returned) = client.write(buffer, target).await;
        written.unwrap();
        buffer = returned;
        now = note(&buffer, epoch);
    }
}

/// The same, as many as there are in flight at a time.
async fn write_batches(client: Arc<RcConnection>, epoch: Instant, length: Duration) {
    let target = client.peer_regions()[0];
    let mut buffers = acquire(&client).await;
    let mut now = Duration::ZERO;
    while now < length {
        let batch = buffers.drain(..).fold(client.batch(), |batch, mut buffer| {
            stamp(&mut buffer, epoch);
            batch.write(buffer, target)
        });
        let (written, returned) = batch.post().await;
        written.unwrap();
        buffers = returned;
        for buffer in &buffers {
            now = note(buffer, epoch);
        }
    }
}

async fn acquire(client: &RcConnection) -> Vec<Buffer> {
    let mut buffers = Vec::new();
    for _ in 0..IN_FLIGHT {
        buffers.push(client.pool().acquire().await);
    }
    buffers
}

async fn answer(server: Arc<RcConnection>) {
    while let Ok(message) = server.recv().await {
        if server.send(message).await.0.is_err() {
            break;
        }
    }
}

/// Sends as many messages as there are in flight, and waits for all echoes.
async fn ask_batches(client: Arc<RcConnection>, epoch: Instant, length: Duration) {
    let mut buffers = acquire(&client).await;
    let mut messages = Vec::with_capacity(IN_FLIGHT);
    let mut now = Duration::ZERO;
    while now < length {
        let batch = buffers.drain(..).fold(client.batch(), |batch, mut buffer| {
            stamp(&mut buffer, epoch);
            batch.send(buffer)
        });
        let (sent, returned) = batch.post().await;
        sent.unwrap();
        buffers = returned;
        while messages.len() < IN_FLIGHT {
            let left = IN_FLIGHT - messages.len();
            client.recv_many(&mut messages, left).await.unwrap();
        }
        for message in messages.drain(..) {
            now = note(&message, epoch);
        }
    }
}

/// Answers what has arrived with one batch.
async fn answer_batches(server: Arc<RcConnection>) {
    let mut messages = Vec::with_capacity(IN_FLIGHT);
    while server.recv_many(&mut messages, IN_FLIGHT).await.is_ok() {
        let buffers = messages.drain(..).map(Message::into_buffer);
        if buffers.fold(server.batch(), Batch::send).post().await.0.is_err() {
            break;
        }
    }
}

/// A thread per core, with a runtime and a queue of its own.
fn by_core(work: Work, style: Style, length: Duration) -> (f64, Latencies) {
    let core = |_| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let group = runtime.block_on(Group::new(work, style));
        (runtime, group)
    };
    let cores: Vec<_> = (0..CORES).map(core).collect();
    let start = Barrier::new(cores.len());
    let begin = Instant::now();
    let core = |(runtime, group): &(Runtime, Group)| {
        start.wait();
        runtime.block_on(group.run(length));
    };
    thread::scope(|scope| {
        let threads: Vec<_> = cores.iter().map(|own| scope.spawn(|| core(own))).collect();
        // A scope does not wait for what threads do when they end.
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    noted(begin.elapsed())
}

/// One runtime with a thread per core, between which tasks move.
fn shared(work: Work, length: Duration) -> (f64, Latencies) {
    let runtime = runtime();
    let elapsed = runtime.block_on(async {
        let mut groups = Vec::new();
        for _ in 0..CORES {
            groups.push(Group::new(work, Style::Tasks).await);
        }
        let begin = Instant::now();
        let mut runs = JoinSet::new();
        for group in groups {
            runs.spawn(async move {
                group.run(length).await;
                group
            });
        }
        let groups = runs.join_all().await;
        let elapsed = begin.elapsed();
        drop(groups);
        elapsed
    });
    // Its threads have ended then.
    drop(runtime);
    noted(elapsed)
}

// ---- TCP ----

async fn streams() -> Vec<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..PAIRS {
        let (client, server) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (client, (mut server, _)) = (client.unwrap(), server.unwrap());
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let mut bytes = [0; SIZE * IN_FLIGHT];
            while let Ok(count @ 1..) = server.read(&mut bytes).await {
                if server.write_all(&bytes[..count]).await.is_err() {
                    break;
                }
            }
        });
        streams.push(client);
    }
    streams
}

/// Whatever came in one read is answered with one write, which favours TCP.
async fn tcp(length: Duration) -> (f64, Latencies) {
    let streams = streams().await;
    let epoch = Instant::now();
    let mut tasks = JoinSet::new();
    for mut stream in streams {
        tasks.spawn(async move {
            let (mut latencies, mut bytes) = (latencies(), [0; SIZE * IN_FLIGHT]);
            bytes.chunks_mut(SIZE).for_each(|message| stamp(message, epoch));
            stream.write_all(&bytes).await.unwrap();
            let (mut filled, mut outstanding) = (0, IN_FLIGHT);
            while outstanding > 0 {
                filled += stream.read(&mut bytes[filled..]).await.unwrap();
                let whole = filled / SIZE * SIZE;
                for message in bytes[..whole].chunks(SIZE) {
                    record(&mut latencies, message, epoch);
                }
                if epoch.elapsed() < length {
                    bytes[..whole].chunks_mut(SIZE).for_each(|message| stamp(message, epoch));
                    stream.write_all(&bytes[..whole]).await.unwrap();
                } else {
                    outstanding -= whole / SIZE;
                }
                bytes.copy_within(whole..filled, 0);
                filled -= whole;
            }
            latencies
        });
    }
    let mut all = latencies();
    tasks.join_all().await.into_iter().for_each(|latencies| all.add(latencies).unwrap());
    rate(epoch.elapsed(), all)
}

// ---- the table ----

#[derive(Default)]
struct Row {
    rates: Vec<f64>,
    all: Option<Latencies>,
}

impl Row {
    fn add(&mut self, (rate, latencies): (f64, Latencies)) {
        self.rates.push(rate);
        match &mut self.all {
            Some(all) => all.add(latencies).unwrap(),
            None => self.all = Some(latencies),
        }
    }

    fn rate(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    }
}

/// Messages per second.
fn rate(elapsed: Duration, latencies: Latencies) -> (f64, Latencies) {
    (latencies.len() as f64 / elapsed.as_secs_f64(), latencies)
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(CORES).enable_all().build().unwrap()
}

fn main() {
    let mut arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let seconds =
        arguments.pop_if(|last| last.parse::<f64>().is_ok()).map_or(0.4, |last| last.parse().unwrap());
    let length = Duration::from_secs_f64(seconds);
    let futures = |work| -> [(&str, Turn); 3] {
        [
            ("futures, a runtime per core", Box::new(move || by_core(work, Style::Tasks, length))),
            ("futures, one runtime", Box::new(move || shared(work, length))),
            ("futures, batches", Box::new(move || by_core(work, Style::Batches, length))),
        ]
    };
    let tcp: Turn = Box::new(move || runtime().block_on(tcp(length)));
    for (work, name, others) in
        [(Work::Echoes, "echoes", Some(("TCP, tokio", tcp))), (Work::Writes, "writes", None)]
    {
        let first: (&str, Turn) = ("synchronous loop", Box::new(move || synchronous(work, length)));
        let rows = std::iter::once(first).chain(futures(work)).chain(others);
        let is_wanted = |row: &str| arguments.is_empty() || arguments.iter().any(|part| row.contains(part));
        let mut rows: Vec<_> = rows
            .map(|(row, turn)| (row, turn, Row::default()))
            .filter(|(row, ..)| is_wanted(&format!("{name}, {row}")))
            .collect();
        // A first turn of all, to warm up, does not count.
        for turn in 0..=TURNS {
            for (_, run, row) in &mut rows {
                let result = run();
                if turn > 0 {
                    row.add(result);
                }
            }
        }
        if !rows.is_empty() {
            println!(
                "{PAIRS} pairs x {IN_FLIGHT} {name} of {SIZE} bytes in flight, {CORES} cores, median of {TURNS} turns of {seconds} s"
            );
            print(name, &rows);
        }
    }
}

/// Sets up, runs, and takes down.
type Turn = Box<dyn Fn() -> (f64, Latencies)>;

fn print(name: &str, rows: &[(&str, Turn, Row)]) {
    println!("{:<28} {:>10}/s {:>10} {:>10} {:>8}", "", name, "p50 us", "p99 us", "ratio");
    let first = rows[0].2.rate();
    for (name, _, row) in rows {
        let all = row.all.as_ref().unwrap();
        let micros = |quantile| all.value_at_quantile(quantile) as f64 / 1e3;
        println!(
            "{name:<28} {:>12.0} {:>10.1} {:>10.1} {:>8.2}",
            row.rate(),
            micros(0.5),
            micros(0.99),
            row.rate() / first
        );
    }
}
