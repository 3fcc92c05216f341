//! The task that watches over a connection: it notices the peer's end, and cleans up after this side's.

use std::{convert::Infallible, future::pending, sync::Arc, time::Duration};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{link::Link, transport::Connected};
use crate::error::Ended;

/// Says on the stream that the connection is being closed on purpose.
const GOODBYE: u8 = b'B';

/// How long the end of a connection may take: the word to the peer, then the flush of what is in flight.
const PATIENCE: Duration = Duration::from_secs(1);

/// Ends the connection when the peer does, or the stream; ends itself when the connection has.
pub(super) async fn watch<T: Connected, S: AsyncRead + AsyncWrite>(
    link: Arc<Link<T>>,
    stream: S,
    keep_alive: Option<Duration>,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let reason = tokio::select! {
        biased;
        reason = link.until_ended() => reason,
        reason = farewell(&mut reader) => reason,
        never = probe_when_idle(&link, keep_alive) => match never {},
    };
    // What the peer sent before it left is received first.
    while matches!(link.lane.queue.shared.dispatch(), Ok(1..)) {}
    link.end(reason);
    let _ = tokio::time::timeout(PATIENCE, async {
        writer.write_all(&[GOODBYE]).await?;
        writer.shutdown().await
    })
    .await;
    drop((reader, writer));
    link.settle(PATIENCE).await;
}

/// What the end of the peer's side of the stream says.
async fn farewell(reader: &mut (impl AsyncRead + Unpin)) -> Ended {
    let mut byte = [0];
    match reader.read(&mut byte).await {
        Ok(0) => Ended::PeerLost {
            reason: "its process ended or was killed (the stream to it closed without the goodbye of a connection that is closed)".into(),
        },
        Ok(_) if byte == [GOODBYE] => Ended::ClosedByPeer,
        Ok(_) => {
            Ended::PeerLost { reason: format!("it sent {:#04x} where only a goodbye may come", byte[0]) }
        }
        Err(error) => Ended::PeerLost { reason: format!("the stream to it failed: {error}") },
    }
}

/// Looks whether the peer still answers whenever nothing happened for `interval`.
async fn probe_when_idle<T: Connected>(link: &Link<T>, interval: Option<Duration>) -> Infallible {
    let (Some(interval), true) = (interval, T::RELIABLE) else { return pending().await };
    loop {
        let before = link.counters();
        tokio::time::sleep(interval).await;
        // What is in flight is being watched by the device's own timer.
        if link.count_keep_alive(before) {
            // A failure ended the connection.
            let _ = link.probe().await;
        }
    }
}
