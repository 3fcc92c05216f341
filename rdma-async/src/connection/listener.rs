//! Accepting connections.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, ToSocketAddrs},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};

use super::{
    Config, Connection,
    establish::{check, over_tcp},
    transport::Connected,
};
use crate::{domain::Domain, error::ConnectError, trace};

/// Exchanges at the same time: what half-open and malicious peers can hold is this many tasks, for the handshake's timeout each. Those that
/// said nothing so far hold nothing else but a stream.
const MAX_EXCHANGES: usize = 256;

/// When there are so many, one more ends the oldest whose peer has said nothing for this long: honest peers speak first, and need
/// milliseconds.
const SILENCE: Duration = Duration::from_millis(500);

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
    /// What binding the port says; private data and regions that are too long for every peer
    /// ([`ExchangeError::OursTooLong`](crate::exchange::ExchangeError::OursTooLong)).
    pub async fn bind(
        address: impl ToSocketAddrs,
        domain: &Domain,
        config: &Config<T>,
    ) -> Result<Listener<T>, ConnectError> {
        check(config)?;
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
    let mut exchanges = Exchanges::default();
    let places = Arc::new(Semaphore::new(Turn::PLACES));
    loop {
        crowded_out.fetch_add(exchanges.make_room().await, Relaxed);
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
        let turn = Turn { stays: Arc::default(), places: Arc::clone(&places), place: OnceLock::new() };
        let stays = Arc::clone(&turn.stays);
        let task = exchanges.tasks.spawn(async move {
            let result = over_tcp(stream, &domain, &config, Some(&turn)).await;
            turn.stay();
            // Nobody accepts any more: the connection is dropped.
            let _ = accepted.send(result).await;
        });
        exchanges.begun.push_back(Begun { task, peer, since: Instant::now(), stays });
    }
}

/// What a listener's exchange with one peer holds.
pub(super) struct Turn {
    /// The peer spoke, or the exchange is over.
    stays: Arc<AtomicBool>,
    places: Arc<Semaphore>,
    place: OnceLock<OwnedSemaphorePermit>,
}

impl Turn {
    /// Connections that are being made, or were made and not accepted yet: each has a queue pair, and buffers.
    pub(super) const PLACES: usize = 64;

    /// It is not ended any more to make room for others.
    pub(super) fn stay(&self) {
        self.stays.store(true, Relaxed);
    }

    /// Waits for a place, and keeps it until the exchange is over and its connection accepted.
    pub(super) async fn place(&self) {
        // Nobody closes the semaphore.
        if let Ok(place) = Arc::clone(&self.places).acquire_owned().await {
            let _ = self.place.set(place);
        }
    }
}

/// Exchanges that go on, and what they ended with if nobody has accepted it yet.
#[derive(Default)]
struct Exchanges {
    tasks: JoinSet<()>,
    /// Oldest first.
    begun: VecDeque<Begun>,
}

struct Begun {
    task: AbortHandle,
    peer: SocketAddr,
    since: Instant,
    stays: Arc<AtomicBool>,
}

impl Exchanges {
    /// Waits until one more may begin; ends the oldest silent one if that is what it takes. Gives how many it ended.
    async fn make_room(&mut self) -> u64 {
        let mut ended = 0;
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.begun.retain(|exchange| !exchange.task.is_finished());
            if self.begun.len() < MAX_EXCHANGES {
                return ended;
            }
            let oldest = self.begun.iter().position(|exchange| !exchange.stays.load(Relaxed));
            let left = oldest.map(|oldest| SILENCE.saturating_sub(self.begun[oldest].since.elapsed()));
            match (oldest, left) {
                (Some(oldest), Some(Duration::ZERO)) => {
                    if let Some(Begun { task, peer, .. }) = self.begun.remove(oldest) {
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
