//! Accepting connections.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, ToSocketAddrs},
    sync::{Mutex, mpsc},
    task::{AbortHandle, JoinSet},
};

use super::{Config, Connection, establish::over_tcp, transport::Connected};
use crate::{domain::Domain, error::ConnectError, trace};

/// Exchanges at the same time, with those that are done and not accepted yet: what half-open and malicious peers can hold is this many
/// tasks, for the handshake's timeout each.
const MAX_HANDSHAKES: usize = 64;

/// When there are so many, one more ends the oldest that has gone on for this long: honest peers need milliseconds, so it is one that says
/// nothing.
const LONG: Duration = Duration::from_millis(500);

/// Takes connections on a TCP port.
///
/// Exchanges with several peers go on at the same time, so that a slow one holds up nobody else. Dropping the listener ends
/// those that are not done; accepted connections live on.
#[derive(Debug)]
pub struct Listener<T: Connected> {
    address: SocketAddr,
    accepted: Mutex<mpsc::Receiver<Result<Connection<T>, ConnectError>>>,
    crowded_out: Arc<AtomicU64>,
    task: AbortHandle,
}

impl<T: Connected> Listener<T> {
    /// Listens on `address`; every connection is made in `domain` as `config` says.
    ///
    /// # Errors
    ///
    /// What binding the port says.
    pub async fn bind(
        address: impl ToSocketAddrs,
        domain: &Domain,
        config: &Config<T>,
    ) -> Result<Listener<T>, ConnectError> {
        let failed = |source| ConnectError::Listen { source };
        let tcp = TcpListener::bind(address).await.map_err(failed)?;
        let address = tcp.local_addr().map_err(failed)?;
        let (sender, accepted) = mpsc::channel(1);
        let crowded_out = Arc::new(AtomicU64::new(0));
        let serve = serve(tcp, domain.clone(), config.clone(), sender, Arc::clone(&crowded_out));
        let task = tokio::spawn(serve).abort_handle();
        Ok(Listener { address, accepted: Mutex::new(accepted), crowded_out, task })
    }

    /// The address it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// How many exchanges were ended to make room for others, because their peers were silent while many more came.
    #[must_use]
    pub fn crowded_out(&self) -> u64 {
        self.crowded_out.load(Relaxed)
    }

    /// The next connection.
    ///
    /// # Errors
    ///
    /// The exchange with one peer failed, or one could not be accepted. The listener goes on: call again.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped call loses no connection.
    pub async fn accept(&self) -> Result<Connection<T>, ConnectError> {
        let closed = || ConnectError::Listen {
            source: io::Error::other("the listener's task ended with its runtime"),
        };
        self.accepted.lock().await.recv().await.unwrap_or_else(|| Err(closed()))
    }
}

impl<T: Connected> Drop for Listener<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve<T: Connected>(
    tcp: TcpListener,
    domain: Domain,
    config: Config<T>,
    accepted: mpsc::Sender<Result<Connection<T>, ConnectError>>,
    crowded_out: Arc<AtomicU64>,
) {
    let mut handshakes = Handshakes::default();
    loop {
        crowded_out.fetch_add(handshakes.make_room().await, Relaxed);
        let (stream, peer) = match tcp.accept().await {
            Ok(accepted) => accepted,
            Err(source) => {
                if accepted.send(Err(ConnectError::Listen { source })).await.is_err() {
                    return;
                }
                // Out of file descriptors, most likely: let some go before the next attempt.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (domain, config, accepted) = (domain.clone(), config.clone(), accepted.clone());
        let is_done = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&is_done);
        let task = handshakes.tasks.spawn(async move {
            let result = over_tcp(stream, &domain, &config).await;
            done.store(true, Relaxed);
            // Nobody accepts any more: the connection is dropped.
            let _ = accepted.send(result).await;
        });
        handshakes.begun.push_back(Handshake { task, peer, since: Instant::now(), is_done });
    }
}

/// Exchanges that go on, and what they ended with if nobody has accepted it yet.
#[derive(Default)]
struct Handshakes {
    tasks: JoinSet<()>,
    /// Oldest first.
    begun: VecDeque<Handshake>,
}

struct Handshake {
    task: AbortHandle,
    peer: SocketAddr,
    since: Instant,
    /// It waits for the program to accept.
    is_done: Arc<AtomicBool>,
}

impl Handshakes {
    /// Waits until one more may begin; ends the oldest if that is what it takes. Gives how many it ended.
    async fn make_room(&mut self) -> u64 {
        let mut ended = 0;
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.begun.retain(|handshake| !handshake.task.is_finished());
            if self.begun.len() < MAX_HANDSHAKES {
                return ended;
            }
            let oldest = self.begun.iter().position(|handshake| !handshake.is_done.load(Relaxed));
            let left = oldest.map(|oldest| LONG.saturating_sub(self.begun[oldest].since.elapsed()));
            match (oldest, left) {
                (Some(oldest), Some(Duration::ZERO)) => {
                    if let Some(Handshake { task, peer, .. }) = self.begun.remove(oldest) {
                        trace::crowded_out(&peer);
                        task.abort();
                        ended += 1;
                    }
                }
                // Until the program accepts one, or a peer's time is over.
                (_, left) => {
                    let _ = tokio::time::timeout(left.unwrap_or(Duration::MAX), self.tasks.join_next()).await;
                }
            }
        }
    }
}
