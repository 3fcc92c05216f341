//! A one-way stream of UDP datagrams between two processes, with segmentation (GSO) and coalescing (GRO): the most that the
//! kernel's UDP carries on loopback, to hold bandwidth over RoCEv2 against.
//!
//! A window of unacknowledged bytes keeps the receiver's socket from overflowing, as any transport would.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

/// Bytes of each datagram: RoCEv2's largest path MTU.
pub const DATAGRAM: usize = 4096;
/// Datagrams of one segmented send: as many as fit into 64 KiB.
const SEGMENTS: usize = 15;
/// Unacknowledged bytes.
const WINDOW: usize = 256 << 10;
/// Bytes after which the receiver acknowledges.
const ACK_EVERY: usize = 64 << 10;
/// How long a side waits for its peer before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

struct Stream {
    socket: UdpSocket,
    state: UdpSocketState,
    buffer: Vec<u8>,
}

impl Stream {
    fn new(socket: UdpSocket) -> io::Result<Stream> {
        let state = UdpSocketState::new((&socket).into())?;
        socket.set_nonblocking(true)?;
        // Enough for the window however the kernel counts; less is granted silently.
        state.set_recv_buffer_size((&socket).into(), 4 << 20)?;
        Ok(Stream { socket, state, buffer: vec![0; 1 << 16] })
    }

    /// The bytes that one call yields and their sender, spinning until there are some.
    fn receive(&mut self) -> io::Result<(usize, SocketAddr)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut meta = [RecvMeta::default()];
            let mut slices = [IoSliceMut::new(&mut self.buffer)];
            match self.state.recv((&self.socket).into(), &mut slices, &mut meta) {
                Ok(_) => return Ok((meta[0].len, meta[0].addr)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
                Err(error) => return Err(error),
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

/// Receives and acknowledges until a short datagram comes.
///
/// # Errors
///
/// The socket fails, or nothing comes for ten seconds.
pub fn receiver(socket: UdpSocket) -> io::Result<()> {
    let mut stream = Stream::new(socket)?;
    let (mut received, mut acknowledged) = (0_u64, 0_u64);
    loop {
        let (length, from) = stream.receive()?;
        if length < DATAGRAM {
            return Ok(());
        }
        received += length as u64;
        if received - acknowledged >= ACK_EVERY as u64 {
            stream.socket.send_to(&received.to_le_bytes(), from)?;
            acknowledged = received;
        }
    }
}

/// Sends for `time`: bytes per second that were acknowledged.
///
/// # Errors
///
/// The socket fails, or no acknowledgement comes for ten seconds (a datagram was lost).
pub fn sender(peer: SocketAddr, time: Duration) -> io::Result<f64> {
    let mut stream = Stream::new(UdpSocket::bind("127.0.0.1:0")?)?;
    let contents = vec![0x5a; SEGMENTS * DATAGRAM];
    let segments = SEGMENTS.min(stream.state.max_gso_segments());
    let contents = &contents[..segments * DATAGRAM];
    let (mut sent, mut acknowledged) = (0_u64, 0_u64);
    let begin = Instant::now();
    while begin.elapsed() < time {
        if sent - acknowledged + contents.len() as u64 > WINDOW as u64 {
            let (length, _) = stream.receive()?;
            // Several acknowledgements may come at once; the last one counts.
            if let Some(last) = stream.buffer[..length].last_chunk() {
                acknowledged = u64::from_le_bytes(*last);
            }
            continue;
        }
        let transmit = Transmit {
            destination: peer,
            ecn: None,
            contents,
            segment_size: (segments > 1).then_some(DATAGRAM),
            src_ip: None,
        };
        stream.state.try_send((&stream.socket).into(), &transmit)?;
        sent += contents.len() as u64;
    }
    let rate = acknowledged as f64 / begin.elapsed().as_secs_f64();
    stream.socket.send_to(&[0], peer)?;
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_acknowledged() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let receiver = std::thread::spawn(move || receiver(socket));
        let rate = sender(address, Duration::from_millis(50)).unwrap();
        assert!(rate > 0.0);
        receiver.join().unwrap().unwrap();
    }
}
