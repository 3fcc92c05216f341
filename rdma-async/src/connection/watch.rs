//! The task that watches over a connection: it notices the peer's end, and cleans up after this side's.

use std::{convert::Infallible, future::pending, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::{link::Link, transport::Connected};
use crate::{
    error::{Ended, MAX_REASON, fit_to_print},
    publish,
};

/// Says on the stream that the connection is being closed on purpose, or because the peer has ended it.
const GOODBYE: u8 = b'B';

/// Says on the stream that the connection failed; the length of the reason, two bytes, big endian, and the reason in UTF-8 follow.
const FAILED: u8 = b'F';

/// How long operations in flight have to end by themselves after the peer said that its side failed: what its device answered, such as the
/// refusal of a write, says more than that, and may still be under way.
const GRACE: Duration = Duration::from_millis(200);

/// On the stream of a transport without acknowledgements: asks whether the peer still runs, which answers with `HERE`.
const THERE: u8 = b'?';
const HERE: u8 = b'!';

/// Questions without an answer until the peer counts as lost.
const UNANSWERED: u32 = 3;

/// How long the end of a connection may take: the word to the peer, then the flush of what is in flight.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How long [`Connection::close`](super::Connection::close) waits for the watcher before it cleans up in its place: on a runtime that is
/// driven it takes milliseconds.
pub(super) const FAREWELL: Duration = Duration::from_millis(300);

/// A connection that somebody watches over: it does not outlive that. A runtime that shuts down drops its tasks, begun or not.
pub(super) struct Guarded<T: Connected>(pub(super) Arc<Link<T>>);

impl<T: Connected> Drop for Guarded<T> {
    fn drop(&mut self) {
        self.0.lane.end(Ended::RuntimeGone);
    }
}

/// Ends the connection when the peer does, or the stream; ends itself when the connection has.
pub(super) async fn watch<T: Connected, S: AsyncRead + AsyncWrite>(
    guarded: Guarded<T>,
    stream: S,
    keep_alive: Option<Duration>,
) {
    let link = &guarded.0;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let reason = tokio::select! {
        biased;
        reason = link.lane.until_ended() => reason,
        reason = converse(&mut reader, &mut writer, keep_alive.filter(|_| !T::RELIABLE)) => reason,
        never = probe_when_idle(link, keep_alive) => match never {},
        never = publish::regularly(|| link.snapshot()) => match never {},
    };
    if matches!(reason, Ended::PeerFailed { .. }) && link.lane.lock().sends_in_flight() > 0 {
        let _ = tokio::time::timeout(GRACE, link.lane.until_ended()).await;
    }
    // What the peer sent before it left is received first.
    while matches!(link.lane.queue.shared.dispatch(), Ok(1..)) {}
    link.lane.end(reason.clone());
    // The first reason counts, which may be another one by now.
    let word = farewell(&link.lane.why_ended().unwrap_or(reason));
    let _ = tokio::time::timeout(PATIENCE, async {
        writer.write_all(&word).await?;
        writer.shutdown().await
    })
    .await;
    drop((reader, writer));
    link.settle(PATIENCE).await;
    publish::now(&link.snapshot());
}

/// What the peer is told at the end.
fn farewell(reason: &Ended) -> Vec<u8> {
    match reason {
        Ended::Closed | Ended::ClosedByPeer | Ended::PeerFailed { .. } => vec![GOODBYE],
        failure => {
            let reason = fit_to_print(&failure.to_string());
            let length = u16::try_from(reason.len()).unwrap_or_default();
            [&[FAILED], &length.to_be_bytes()[..], reason.as_bytes()].concat()
        }
    }
}

/// Reads what follows a `FAILED`.
async fn failure(reader: &mut (impl AsyncRead + Unpin)) -> Ended {
    let text = tokio::time::timeout(PATIENCE, async {
        let length = usize::from(reader.read_u16().await?);
        let mut text = vec![0; length.min(MAX_REASON)];
        reader.read_exact(&mut text).await?;
        std::io::Result::Ok(text)
    });
    let reason = match text.await {
        Ok(Ok(text)) => fit_to_print(&String::from_utf8_lossy(&text)),
        _ => "it does not say how".to_owned(),
    };
    Ended::PeerFailed { reason }
}

/// Listens to the peer's side of the stream until its end, which says why the connection ended; answers the peer's questions, and asks one
/// every `interval`.
async fn converse(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    interval: Option<Duration>,
) -> Ended {
    let lost = |reason: String| Ended::PeerLost { reason };
    let mut unanswered = 0;
    let after = |interval: Duration| Instant::now().checked_add(interval);
    let mut next = interval.and_then(after);
    loop {
        let mut byte = [0];
        let due = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => pending().await,
            }
        };
        let word = tokio::select! {
            biased;
            read = reader.read(&mut byte) => match (read, byte) {
                (Ok(0), _) => return lost("its process ended or was killed (the stream to it closed without the goodbye of a connection that is closed)".into()),
                (Ok(_), [GOODBYE]) => return Ended::ClosedByPeer,
                (Ok(_), [FAILED]) => return failure(reader).await,
                (Ok(_), [THERE]) => HERE,
                (Ok(_), [HERE]) => {
                    unanswered = 0;
                    continue;
                }
                (Ok(_), [byte]) => return lost(format!("it sent {byte:#04x} where only its end may be told")),
                (Err(error), _) => return lost(format!("the stream to it failed: {error}")),
            },
            () = due => {
                if unanswered == UNANSWERED {
                    return lost(format!("it has left {UNANSWERED} questions on the stream to it unanswered: it is stopped, or the network between is gone"));
                }
                unanswered += 1;
                next = interval.and_then(after);
                THERE
            }
        };
        // A peer that reads nothing cannot hold up more than that.
        match tokio::time::timeout(PATIENCE, writer.write_all(&[word])).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return lost(format!("the stream to it failed: {error}")),
            Err(_) => return lost("it reads nothing from the stream to it".into()),
        }
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
