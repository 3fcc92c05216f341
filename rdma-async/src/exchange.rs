//! The exchange of connection data between two peers before their queue pairs can talk: framed, versioned, bounded.
//!
//! Both sides do the same: each sends one frame and reads one frame, at the same time, over any reliable byte
//! stream (TCP, TLS, a Unix socket). Only a [`Listener`](crate::Listener) reads the first frame before it sends its
//! own. A frame is a 12-byte header and a body in
//! [postcard](https://postcard.jamesmunns.com/wire-format) encoding:
//!
//! | bytes | content |
//! |---|---|
//! | 0..4 | magic `RDMX` |
//! | 4..6 | version, big endian |
//! | 6..8 | zero, reserved |
//! | 8..12 | length of the body, big endian |
//!
//! A frame with its header is at most [`MAX_FRAME`] bytes, all frames of one exchange share one timeout, and nothing
//! that a peer sends makes this side allocate more than a frame. A peer that misbehaves gets an [`ExchangeError`]
//! that says how.

use std::{io, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

/// Longest frame that is sent or accepted, in bytes, header included.
pub const MAX_FRAME: usize = 4096;

/// Version of the frames and of what a connection's frames hold. Peers of different versions refuse each other.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"RDMX";
const HEADER: usize = 12;

/// Why an exchange with a peer failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The first bytes are not those of this protocol: something else speaks on that port.
    #[error("the peer does not speak this protocol: it began with {}, not with \"RDMX\"", .received.escape_ascii())]
    NotOurProtocol {
        /// The bytes that came instead of the magic, at most four.
        received: Vec<u8>,
    },
    /// The peer runs another version of this protocol: upgrade the older side.
    #[error(
        "the peer speaks version {theirs} of the exchange, this side version {ours}: upgrade the older one"
    )]
    VersionMismatch {
        /// Version of this side.
        ours: u16,
        /// Version of the peer.
        theirs: u16,
    },
    /// The peer announced a frame longer than [`MAX_FRAME`].
    #[error("the peer announced a frame of {announced} bytes, the limit is {MAX_FRAME}")]
    TooLong {
        /// Length of the peer's frame, header included.
        announced: u64,
    },
    /// What this side wants to send does not fit into a frame: shorten the private data or the list of regions.
    #[error(
        "this side's frame would have {length} bytes, the limit is {MAX_FRAME}: \
         shorten the private data or the list of regions"
    )]
    OursTooLong {
        /// Length of the frame that was not sent, header included.
        length: usize,
    },
    /// The peer closed the stream in the middle of a frame.
    #[error("the peer closed the stream after {received} of {expected} bytes of its frame")]
    Truncated {
        /// Bytes of the frame that came.
        received: usize,
        /// Bytes of the frame as far as it is known: the header's length until the header is complete.
        expected: usize,
    },
    /// The peer closed the stream before it sent anything.
    #[error("the peer closed the stream without sending anything")]
    Closed,
    /// The exchange took longer than its timeout.
    #[error(
        "the exchange did not end within {timeout:?}: the peer had sent {received} bytes of its current frame"
    )]
    TimedOut {
        /// The timeout of the whole exchange.
        timeout: Duration,
        /// Bytes of the unfinished frame that came.
        received: usize,
    },
    /// The frame is well-formed but its body is not what was expected here.
    #[error("the peer's frame cannot be decoded: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
    /// The stream itself failed.
    #[error("the stream to the peer failed: {0}")]
    Io(#[from] io::Error),
}

/// One exchange over a stream: any number of frames each way under one timeout.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), rdma_async::exchange::ExchangeError> {
/// use rdma_async::exchange::Exchange;
/// use std::time::Duration;
///
/// let (left, right) = tokio::io::duplex(64);
/// let mut left = Exchange::new(left, Duration::from_secs(1));
/// let mut right = Exchange::new(right, Duration::from_secs(1));
/// let (from_right, from_left): (Result<u32, _>, Result<String, _>) =
///     tokio::join!(left.swap(&"hello"), right.swap(&7u32));
/// assert_eq!(from_right?, 7);
/// assert_eq!(from_left?, "hello");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Exchange<S> {
    stream: S,
    timeout: Duration,
    deadline: Instant,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Exchange<S> {
    /// Starts an exchange over `stream` that has to end within `timeout` from now.
    pub fn new(stream: S, timeout: Duration) -> Self {
        let now = Instant::now();
        // A timeout too long for the clock means none; a year is as good.
        let deadline = now.checked_add(timeout).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        Exchange { stream, timeout, deadline }
    }

    /// Sends `ours` and returns what the peer sent.
    ///
    /// # Errors
    ///
    /// See [`ExchangeError`]. After an error the stream stands at an unknown position: drop it.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: a dropped call may have sent or read a part of a frame. Drop the stream with it.
    pub async fn swap<T, R>(&mut self, ours: &T) -> Result<R, ExchangeError>
    where
        T: Serialize + ?Sized,
        R: DeserializeOwned,
    {
        let frame = encode(ours)?;
        let (reader, writer) = tokio::io::split(&mut self.stream);
        let mut received = 0;
        // Both directions at once: two peers that write first cannot block each other, whatever the stream buffers.
        let both = async { tokio::try_join!(send(writer, &frame), receive(reader, &mut received)) };
        match tokio::time::timeout_at(self.deadline, both).await {
            Ok(result) => decode(&result?.1),
            Err(_) => Err(ExchangeError::TimedOut { timeout: self.timeout, received }),
        }
    }

    /// Returns what the peer sent, as the first half of a `swap` whose other half is [`Exchange::tell`].
    pub(crate) async fn hear<R: DeserializeOwned>(&mut self) -> Result<R, ExchangeError> {
        let mut received = 0;
        let frame = receive(&mut self.stream, &mut received);
        match tokio::time::timeout_at(self.deadline, frame).await {
            Ok(body) => decode(&body?),
            Err(_) => Err(ExchangeError::TimedOut { timeout: self.timeout, received }),
        }
    }

    /// Sends `ours`.
    pub(crate) async fn tell<T: Serialize + ?Sized>(&mut self, ours: &T) -> Result<(), ExchangeError> {
        let frame = encode(ours)?;
        let sent = tokio::time::timeout_at(self.deadline, send(&mut self.stream, &frame)).await;
        sent.unwrap_or(Err(ExchangeError::TimedOut { timeout: self.timeout, received: 0 }))
    }

    /// Sends `why` to a peer whose frame was not understood. What is unread when a TCP stream is closed resets it, which may overtake `why`: as
    /// much as has come of at most a frame is read before.
    pub(crate) async fn refuse<T: Serialize + ?Sized>(&mut self, why: &T) {
        let mut rest = vec![0; MAX_FRAME];
        let _ = tokio::time::timeout(Duration::ZERO, self.stream.read(&mut rest)).await;
        // The peer learns why; whether it does changes nothing here.
        let _ = self.tell(why).await;
    }

    /// When it has to have ended.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Ends the exchange and returns the stream.
    pub fn into_inner(self) -> S {
        self.stream
    }
}

impl ExchangeError {
    /// The peer speaks this protocol, if not as this side does, and waits for an answer.
    pub(crate) fn is_of_a_speaker(&self) -> bool {
        matches!(
            self,
            ExchangeError::VersionMismatch { .. }
                | ExchangeError::TooLong { .. }
                | ExchangeError::Malformed { .. }
        )
    }
}

/// Whether `ours` fits into a frame.
///
/// # Errors
///
/// [`ExchangeError::OursTooLong`].
pub(crate) fn check<T: Serialize + ?Sized>(ours: &T) -> Result<(), ExchangeError> {
    encode(ours).map(drop)
}

fn encode<T: Serialize + ?Sized>(body: &T) -> Result<Vec<u8>, ExchangeError> {
    let mut frame = postcard::to_extend(body, vec![0; HEADER])
        .map_err(|error| ExchangeError::Malformed { reason: format!("this side's own message: {error}") })?;
    let too_long = ExchangeError::OursTooLong { length: frame.len() };
    if frame.len() > MAX_FRAME {
        return Err(too_long);
    }
    let body = u32::try_from(frame.len() - HEADER).map_err(|_| too_long)?;
    frame[..4].copy_from_slice(&MAGIC);
    frame[4..6].copy_from_slice(&VERSION.to_be_bytes());
    frame[8..HEADER].copy_from_slice(&body.to_be_bytes());
    Ok(frame)
}

fn decode<R: DeserializeOwned>(body: &[u8]) -> Result<R, ExchangeError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => {
            Err(ExchangeError::Malformed { reason: format!("{} bytes behind the message", rest.len()) })
        }
        Err(error) => Err(ExchangeError::Malformed { reason: error.to_string() }),
    }
}

async fn send(mut writer: impl AsyncWrite + Unpin, frame: &[u8]) -> Result<(), ExchangeError> {
    writer.write_all(frame).await.map_err(stream_error)?;
    writer.flush().await.map_err(stream_error)
}

/// Reads one frame and returns its body; `received` counts its bytes so far, for the error of a timeout.
async fn receive(mut reader: impl AsyncRead + Unpin, received: &mut usize) -> Result<Vec<u8>, ExchangeError> {
    let mut header = [0; HEADER];
    while *received < HEADER {
        *received += read_some(&mut reader, &mut header[*received..], *received, HEADER).await?;
        // Checked byte by byte as they come: a foreign protocol may send less than a header and wait.
        let magic = &header[..4.min(*received)];
        if !MAGIC.starts_with(magic) {
            return Err(ExchangeError::NotOurProtocol { received: magic.to_vec() });
        }
    }
    let [_, _, _, _, v0, v1, r0, r1, l0, l1, l2, l3] = header;
    let theirs = u16::from_be_bytes([v0, v1]);
    if theirs != VERSION {
        return Err(ExchangeError::VersionMismatch { ours: VERSION, theirs });
    }
    if [r0, r1] != [0, 0] {
        return Err(ExchangeError::Malformed {
            reason: "the reserved bytes of the header are not zero".into(),
        });
    }
    let body = u32::from_be_bytes([l0, l1, l2, l3]);
    let announced = u64::from(body) + HEADER as u64;
    if announced > MAX_FRAME as u64 {
        return Err(ExchangeError::TooLong { announced });
    }
    let mut body = vec![0; body as usize];
    let expected = HEADER + body.len();
    while *received < expected {
        *received += read_some(&mut reader, &mut body[*received - HEADER..], *received, expected).await?;
    }
    Ok(body)
}

/// At least one byte into `space`, or the error of a stream that ended after `received` of `expected` bytes.
async fn read_some(
    reader: &mut (impl AsyncRead + Unpin),
    space: &mut [u8],
    received: usize,
    expected: usize,
) -> Result<usize, ExchangeError> {
    match reader.read(space).await.map_err(stream_error)? {
        0 if received == 0 => Err(ExchangeError::Closed),
        0 => Err(ExchangeError::Truncated { received, expected }),
        count => Ok(count),
    }
}

/// A peer that closed its socket shows as a broken pipe to the writer.
fn stream_error(error: io::Error) -> ExchangeError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => ExchangeError::Closed,
        _ => ExchangeError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// What an honest side that wants a `String` reports when `peer` is at the other end.
    async fn against<F: Future<Output = DuplexStream>>(
        peer: impl FnOnce(DuplexStream) -> F,
    ) -> Result<String, ExchangeError> {
        let (ours, theirs) = duplex(16);
        let mut exchange = Exchange::new(ours, TIMEOUT);
        let honest = exchange.swap::<_, String>("ours");
        let mut honest = std::pin::pin!(honest);
        // The peer's end stays open until the honest side has made up its mind.
        tokio::select! {
            biased;
            result = &mut honest => result,
            _open = peer(theirs) => honest.await,
        }
    }

    async fn send_and_hold(bytes: &[u8]) -> Result<String, ExchangeError> {
        against(async |mut peer: DuplexStream| {
            let (mut reader, mut writer) = tokio::io::split(&mut peer);
            let mut sink = tokio::io::sink();
            let write = async {
                let _ = writer.write_all(bytes).await;
                std::future::pending::<()>().await;
            };
            tokio::join!(write, tokio::io::copy(&mut reader, &mut sink)).1.unwrap();
            peer
        })
        .await
    }

    async fn send_and_close(bytes: &[u8]) -> Result<String, ExchangeError> {
        let (ours, theirs) = duplex(MAX_FRAME);
        let mut theirs = theirs;
        theirs.write_all(bytes).await.unwrap();
        theirs.shutdown().await.unwrap();
        Exchange::new(ours, TIMEOUT).swap("ours").await
    }

    fn frame(version: u16, length: u32, body: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &version.to_be_bytes(), &[0, 0], &length.to_be_bytes(), body].concat()
    }

    #[tokio::test(start_paused = true)]
    async fn two_honest_peers_swap_several_frames() {
        let (left, right) = duplex(1);
        let (mut left, mut right) = (Exchange::new(left, TIMEOUT), Exchange::new(right, TIMEOUT));
        for round in 0..3u32 {
            let long = "x".repeat(3000);
            let (a, b) = tokio::join!(left.swap::<_, u32>(&long), right.swap::<_, String>(&round));
            assert_eq!((a.unwrap(), b.unwrap()), (round, long));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn another_protocol() {
        let error = send_and_hold(b"GET / HTTP/1.1\r\n\r\n").await.unwrap_err();
        assert!(
            matches!(&error, ExchangeError::NotOurProtocol { received } if received == b"GET "),
            "{error}"
        );
        let error = send_and_hold(b"R!").await.unwrap_err();
        assert!(matches!(&error, ExchangeError::NotOurProtocol { received } if received == b"R!"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_version() {
        let error = send_and_hold(&frame(VERSION + 1, 0, b"")).await.unwrap_err();
        assert!(
            matches!(error, ExchangeError::VersionMismatch { ours: VERSION, theirs } if theirs == VERSION + 1)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn too_much() {
        let error = send_and_hold(&frame(VERSION, u32::MAX, b"")).await.unwrap_err();
        assert!(matches!(error, ExchangeError::TooLong { announced } if announced == (1 << 32) + 11));
        let most = u32::try_from(MAX_FRAME - HEADER).unwrap();
        assert!(matches!(
            send_and_hold(&frame(VERSION, most + 1, b"")).await,
            Err(ExchangeError::TooLong { .. })
        ));
        let error =
            Exchange::new(duplex(1).0, TIMEOUT).swap::<_, ()>(&"x".repeat(MAX_FRAME)).await.unwrap_err();
        assert!(matches!(error, ExchangeError::OursTooLong { length } if length > MAX_FRAME), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_frame_passes() {
        let body = postcard::to_stdvec(&"y".repeat(MAX_FRAME - HEADER - 2)).unwrap();
        assert_eq!(HEADER + body.len(), MAX_FRAME);
        let longest = frame(VERSION, u32::try_from(body.len()).unwrap(), &body);
        assert_eq!(send_and_hold(&longest).await.unwrap().len(), MAX_FRAME - HEADER - 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_early_end() {
        assert!(matches!(send_and_close(b"").await, Err(ExchangeError::Closed)));
        let whole = frame(VERSION, 5, b"\x04four");
        for cut in 1..whole.len() {
            let error = send_and_close(&whole[..cut]).await.unwrap_err();
            assert!(
                matches!(error, ExchangeError::Truncated { received, expected }
                    if received == cut && expected == if cut < HEADER { HEADER } else { whole.len() }),
                "cut at {cut}: {error}"
            );
        }
        assert_eq!(send_and_close(&whole).await.unwrap(), "four");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_a_slow_loris_end_at_the_timeout() {
        let start = Instant::now();
        assert!(matches!(send_and_hold(b"").await, Err(ExchangeError::TimedOut { received: 0, .. })));
        assert_eq!(start.elapsed().as_secs(), TIMEOUT.as_secs());

        let start = Instant::now();
        let error = against(async |mut peer: DuplexStream| {
            for byte in frame(VERSION, 2000, &[0; 2000]) {
                peer.write_all(&[byte]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            peer
        })
        .await
        .unwrap_err();
        assert!(matches!(error, ExchangeError::TimedOut { received: 40..=60, .. }), "{error}");
        assert_eq!(start.elapsed().as_secs(), TIMEOUT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_reads_nothing_ends_at_the_timeout() {
        let (ours, _theirs) = duplex(1);
        assert!(matches!(
            Exchange::new(ours, TIMEOUT).swap::<_, String>("ours").await,
            Err(ExchangeError::TimedOut { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_of_another_type() {
        for body in [&b"\xff\xff\xff\xff\x0fabc"[..], b"\x03\xff\xfe\xfd", b"", b"\x01ab"] {
            let bytes = frame(VERSION, u32::try_from(body.len()).unwrap(), body);
            let error = send_and_hold(&bytes).await.unwrap_err();
            assert!(matches!(error, ExchangeError::Malformed { .. }), "{body:?}: {error}");
        }
        let mut reserved = frame(VERSION, 5, b"\x04four");
        reserved[7] = 1;
        assert!(matches!(send_and_hold(&reserved).await, Err(ExchangeError::Malformed { .. })));
    }
}
