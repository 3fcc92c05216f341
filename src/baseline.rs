//! What the same message costs without RDMA: a pair of unconnected UDP sockets in two processes.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

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
