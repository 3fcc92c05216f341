//! What the same message costs without RDMA: a pair of unconnected UDP sockets or a TCP connection in two processes, and memory that
//! two threads share.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::latency::RoundTrips;

/// How a side waits for the next datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Asks a non-blocking socket again and again.
    Spin,
    /// Sleeps in the kernel.
    Block,
}

/// How long a side waits for its peer before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket of one side, with room for the datagrams of `wait`.
///
/// # Errors
///
/// The socket cannot be made.
pub fn socket(wait: Wait) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    match wait {
        Wait::Spin => socket.set_nonblocking(true)?,
        Wait::Block => socket.set_read_timeout(Some(PATIENCE))?,
    }
    Ok(socket)
}

/// One datagram and its sender.
fn receive(socket: &UdpSocket, wait: Wait, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    if wait == Wait::Block {
        return socket.recv_from(buffer);
    }
    let mut last_look_at_the_clock = Instant::now();
    let mut spins = 0_u32;
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        spins += 1;
        if spins.is_multiple_of(1 << 20) {
            if last_look_at_the_clock.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            last_look_at_the_clock = Instant::now();
        }
    }
}

/// Sends every datagram back to where it came from, until an empty one comes.
///
/// # Errors
///
/// The socket fails, or nothing comes for ten seconds.
pub fn udp_echo(socket: &UdpSocket, wait: Wait) -> io::Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let (length, from) = receive(socket, wait, &mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        socket.send_to(&buffer[..length], from)?;
    }
}

/// Times `iterations` round trips of `size` bytes with the echo at `peer`, after a tenth as many for warming up.
///
/// # Errors
///
/// The socket fails, or an answer does not come for ten seconds.
pub fn udp_ping_pong(wait: Wait, peer: SocketAddr, size: usize, iterations: u32) -> io::Result<RoundTrips> {
    let socket = socket(wait)?;
    let message = vec![0x5a; size.max(1)];
    let mut buffer = vec![0; 65536];
    let mut trips = RoundTrips::new();
    for iteration in 0..iterations + iterations / 10 {
        let begin = Instant::now();
        socket.send_to(&message, peer)?;
        let (length, _) = receive(&socket, wait, &mut buffer)?;
        let time = begin.elapsed();
        if length != message.len() {
            return Err(io::Error::other(format!("an answer of {length} bytes to {}", message.len())));
        }
        if iteration >= iterations / 10 {
            trips.record(time);
        }
    }
    socket.send_to(&[], peer)?;
    Ok(trips)
}

/// Times `iterations` round trips of `size` bytes over UDP, without warming up and without ending the echo.
///
/// # Errors
///
/// As [`udp_ping_pong`].
pub fn udp_round_trips(
    socket: &UdpSocket,
    wait: Wait,
    peer: SocketAddr,
    size: usize,
    iterations: u64,
) -> io::Result<Duration> {
    let message = vec![0x5a; size.max(1)];
    let mut buffer = vec![0; 65536];
    let begin = Instant::now();
    for _ in 0..iterations {
        socket.send_to(&message, peer)?;
        receive(socket, wait, &mut buffer)?;
    }
    Ok(begin.elapsed())
}

/// Sends back what arrives on the connections of `listener`, for ever.
///
/// # Errors
///
/// No connection can be accepted.
pub async fn tcp_echo(listener: TcpListener) -> io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let mut buffer = vec![0; 65536];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Times `iterations` round trips of `size` bytes over a TCP connection to [`tcp_echo`].
///
/// # Errors
///
/// The connection ends.
pub async fn tcp_round_trips(stream: &mut TcpStream, size: usize, iterations: u64) -> io::Result<Duration> {
    let mut message = vec![0x5a; size.max(1)];
    let begin = Instant::now();
    for _ in 0..iterations {
        stream.write_all(&message).await?;
        stream.read_exact(&mut message).await?;
    }
    Ok(begin.elapsed())
}

/// Times `iterations` round trips of a word between two threads that poll it: the least that two processors need.
#[must_use]
pub fn shared_memory_round_trips(iterations: u64) -> Duration {
    let (ping, pong) = (AtomicU64::new(0), AtomicU64::new(0));
    let wait = |word: &AtomicU64, value| {
        let mut spins = 0_u32;
        while word.load(Ordering::Acquire) < value {
            spins += 1;
            // Both threads may be on one processor.
            if spins.is_multiple_of(1 << 10) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for value in 1..=iterations {
                wait(&ping, value);
                pong.store(value, Ordering::Release);
            }
        });
        let begin = Instant::now();
        for value in 1..=iterations {
            ping.store(value, Ordering::Release);
            wait(&pong, value);
        }
        begin.elapsed()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_waiting_echo_every_datagram() {
        for wait in [Wait::Spin, Wait::Block] {
            let echo = socket(wait).unwrap();
            let address = echo.local_addr().unwrap();
            let server = std::thread::spawn(move || udp_echo(&echo, wait));
            let trips = udp_ping_pong(wait, address, 80, 100).unwrap();
            assert_eq!(trips.len(), 100);
            server.join().unwrap().unwrap();
        }
    }
}
