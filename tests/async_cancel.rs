//! Futures dropped at any point: no message lost or doubled, no byte changed in a buffer that was handed on, no buffer lost.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are small"
)]

mod common;

use std::{
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};

use fastrand::Rng;
use rdma_async::{Config, RcConnection, WaitMode};
use rdma_core::{Buffer, RemoteAccess, RemoteSlice, SharedRegion};

/// Polls `future` at most `polls` times, with other tasks running in between; `None` when it is dropped unfinished.
async fn poll_times<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Fills `buffer` with bytes that only `number` gives.
fn fill(buffer: &mut [u8], number: u64) {
    let mut rng = Rng::with_seed(number);
    let (head, tail) = buffer.split_at_mut(8);
    head.copy_from_slice(&number.to_le_bytes());
    rng.fill(tail);
}

/// The number that `buffer` was filled with; panics when a byte is wrong.
fn number(buffer: &[u8]) -> u64 {
    let number = u64::from_le_bytes(buffer[..8].try_into().unwrap());
    let mut expected = vec![0; buffer.len()];
    fill(&mut expected, number);
    assert!(buffer == expected, "bytes of message {number} are not as they were sent");
    number
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbered_messages_and_a_receiver_that_is_cancelled_at_random() {
    let count = common::count(100_000);
    for (seed, mode) in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive].into_iter().enumerate() {
        let count = if mode == WaitMode::Adaptive { count } else { count / 10 };
        let domain = common::domain();
        let (a, b) = common::pair(&domain, &Config::rc().wait_mode(mode)).await;
        let sender = tokio::spawn(async move {
            for i in 0..count {
                let mut buffer = a.pool().acquire().await;
                buffer.set_len(8);
                buffer.copy_from_slice(&i.to_le_bytes());
                a.send(buffer).await.0.unwrap();
            }
            a
        });
        let mut rng = Rng::with_seed(seed as u64);
        let mut cancelled = 0u32;
        for expected in 0..count {
            let message = loop {
                let patience = async {
                    match rng.u8(..4) {
                        0 => {}
                        1 => tokio::task::yield_now().await,
                        2 => tokio::time::sleep(Duration::from_micros(rng.u64(..50))).await,
                        _ => tokio::time::sleep(Duration::from_secs(60)).await,
                    }
                };
                tokio::select! {
                    message = b.recv() => break message.unwrap(),
                    () = patience => cancelled += 1,
                }
            };
            assert_eq!(u64::from_le_bytes(message[..].try_into().unwrap()), expected);
        }
        assert!(cancelled > 0);
        sender.await.unwrap().close().await.unwrap();
    }
}

/// One side of a connection that starts operations of every kind, and drops most of them unfinished.
struct Chaos {
    connection: RcConnection,
    rng: Rng,
    /// A peer's memory that holds `source(len)`.
    readable: RemoteSlice,
    /// A peer's memory, of one slot for each number modulo its slots.
    writable: RemoteSlice,
    next: u64,
    /// Buffers that were taken from the pool and filled: nobody may change them.
    handed_on: VecDeque<(u64, Buffer)>,
}

const SLOT: u64 = 128;

impl Chaos {
    async fn buffer(&mut self) -> Buffer {
        // Buffers of cancelled operations come back, so this ends.
        while self.handed_on.len() > 8 {
            let (expected, buffer) = self.handed_on.pop_front().unwrap();
            assert_eq!(number(&buffer), expected, "a buffer changed after it was handed on");
        }
        let mut buffer = self.connection.pool().acquire().await;
        self.next += 1;
        let len = self.rng.usize(8..=buffer.capacity().min(SLOT as usize));
        buffer.set_len(len);
        fill(&mut buffer, self.next);
        buffer
    }

    async fn step(&mut self) {
        let polls = self.rng.usize(..4);
        let buffer = self.buffer().await;
        let filled = self.next;
        let slots = self.writable.len / SLOT;
        let slot = self.writable.slice(filled % slots * SLOT, SLOT).unwrap();
        let returned = match self.rng.u8(..8) {
            0..3 => poll_times(self.connection.send(buffer), polls).await,
            3 => poll_times(self.connection.send_with_imm(buffer, 1), polls).await,
            4 => poll_times(self.connection.write(buffer, slot), polls).await,
            5 => poll_times(self.connection.write_with_imm(buffer, slot, 2), polls).await,
            6 => {
                let read = poll_times(self.connection.read(buffer, self.readable), polls).await;
                if let Some((result, buffer)) = read {
                    result.unwrap();
                    assert_eq!(&buffer[..], &source(buffer.len())[..], "bytes read are wrong");
                }
                None
            }
            _ => {
                drop(buffer);
                let word = self.readable.slice(self.readable.len - 8, 8).unwrap();
                if let Some(old) = poll_times(self.connection.fetch_and_add(word, 0), polls).await {
                    assert_eq!(old.unwrap(), 0);
                }
                None
            }
        };
        if let Some((result, buffer)) = returned {
            result.unwrap();
            assert_eq!(number(&buffer), filled, "a buffer came back changed");
        }
        // What was cancelled went back to the pool, or will: take something out and hold it.
        if let Some(mut buffer) = self.connection.pool().try_acquire() {
            self.next += 1;
            fill(&mut buffer, self.next);
            self.handed_on.push_back((self.next, buffer));
        }
    }
}

fn source(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + 3) as u8).collect()
}

fn regions(domain: &rdma_async::Domain) -> (SharedRegion, SharedRegion) {
    let mut bytes = source(4096);
    bytes.resize(4096 + 8, 0);
    let pd = domain.protection_domain();
    (pd.share(bytes, RemoteAccess::all()).unwrap(), pd.share(vec![0; 64 * 128], RemoteAccess::all()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_cancelled_at_every_point() {
    let rounds = common::count(3_000);
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let domain = common::domain();
        let (readable, writable) = regions(&domain);
        let config = Config::rc()
            .wait_mode(mode)
            .send_depth(8)
            .receive_depth(8)
            .spare_buffers(24)
            .message_size(4096)
            .regions([readable.remote(), writable.remote()]);
        let (a, b) = common::pair(&domain, &config).await;
        let pool = a.pool().clone();
        let [readable_remote, writable_remote] = a.peer_regions() else { panic!("two regions") };
        let seed = fastrand::u64(..);
        println!("{mode:?}: seed {seed}");
        let mut chaos = Chaos {
            readable: *readable_remote,
            writable: *writable_remote,
            connection: a,
            rng: Rng::with_seed(seed),
            next: 0,
            handed_on: VecDeque::new(),
        };
        let receiver = tokio::spawn(async move {
            let mut rng = Rng::with_seed(!seed);
            let mut last = 0;
            let mut received = 0u64;
            loop {
                let polls = rng.usize(..5);
                let message = match poll_times(b.recv(), polls).await {
                    Some(Ok(message)) => message,
                    Some(Err(_)) => return received,
                    None => {
                        tokio::task::yield_now().await;
                        continue;
                    }
                };
                if message.written().is_none() {
                    // In order, each at most once; only those that were not posted are missing.
                    let number = number(&message);
                    assert!(number > last, "message {number} after {last}");
                    last = number;
                    received += 1;
                }
            }
        });
        for _ in 0..rounds {
            chaos.step().await;
        }
        let Chaos { connection, handed_on, .. } = chaos;
        for (expected, buffer) in handed_on {
            assert_eq!(number(&buffer), expected, "a buffer changed after it was handed on");
        }
        connection.close().await.unwrap();
        assert!(receiver.await.unwrap() > 0);
        // Every slot of the written memory holds a whole message, or what a shorter one left of a longer one before.
        for slot in 0..64 {
            let mut bytes = [0; 8];
            writable.copy_out(slot * SLOT as usize, &mut bytes).unwrap();
            let number = u64::from_le_bytes(bytes);
            assert!(number == 0 || number % 64 == slot as u64, "slot {slot} holds message {number}");
        }
        drop(connection);
        let all = pool.capacity();
        for _ in 0..100 {
            if pool.idle() == all {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(pool.idle(), all, "every buffer is back in the pool");
    }
}
