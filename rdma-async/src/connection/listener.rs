//! Accepting connections.

use std::{
    collections::VecDeque,
    future::pending,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, ToSocketAddrs},
    sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
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

/// How long a peer whose first frame was answered may take for its second one when others wait for its place: honest ones need a few calls of
/// their driver.
const SLOWNESS: Duration = Duration::from_secs(1);

/// Takes connections on a TCP port.
///
/// Exchanges with several peers go on at the same time, so that a slow one holds up nobody else: where others wait for its place, it is
/// ended. Dropping the listener ends those that are not done; accepted connections live on.
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

    /// How many exchanges were ended to make room for others, because their peers were silent, before their first word or between the two,
    /// while many more came.
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
    let places = Arc::new(Places::new());
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
        let turn = Turn::new(&places);
        let stays = Arc::clone(&turn.stays);
        let crowded_out = Arc::clone(&crowded_out);
        let task = exchanges.tasks.spawn(async move {
            tokio::select! {
                biased;
                result = over_tcp(stream, &domain, &config, Some(&turn)) => {
                    turn.stay();
                    // Nobody accepts any more: the connection is dropped.
                    let _ = accepted.send(result).await;
                }
                // The exchange was dropped, with all that it held but the place.
                next = turn.crowded_out() => {
                    trace::crowded_out(&peer);
                    crowded_out.fetch_add(1, Relaxed);
                    turn.give_place(next);
                }
            }
        });
        exchanges.begun.push_back(Begun { task, peer, since: Instant::now(), stays });
    }
}

/// What a listener's exchange with one peer holds.
pub(super) struct Turn {
    /// The peer spoke, or the exchange is over.
    stays: Arc<AtomicBool>,
    places: Arc<Places>,
    place: OnceLock<OwnedSemaphorePermit>,
    /// Notified when the peer is to speak again.
    is_up_to_peer: Notify,
    /// It did.
    keeps_place: AtomicBool,
}

impl Turn {
    /// Connections that are being made, or were made and not accepted yet: each has a queue pair, and buffers.
    pub(super) const PLACES: usize = 64;

    fn new(places: &Arc<Places>) -> Turn {
        Turn {
            stays: Arc::default(),
            places: Arc::clone(places),
            place: OnceLock::new(),
            is_up_to_peer: Notify::new(),
            keeps_place: AtomicBool::new(false),
        }
    }

    /// It is not ended any more to make room for others.
    pub(super) fn stay(&self) {
        self.stays.store(true, Relaxed);
    }

    /// Waits for a place, and keeps it until the exchange is over and its connection accepted.
    pub(super) async fn place(&self) {
        if let Some(place) = self.places.take().await {
            let _ = self.place.set(place);
        }
    }

    /// From now on it loses its place to others if the peer is slow.
    pub(super) fn may_lose_place(&self) {
        self.is_up_to_peer.notify_one();
    }

    /// The exchange is over, but for what this side has to do.
    pub(super) fn keep_place(&self) {
        self.keeps_place.store(true, Relaxed);
    }

    /// Waits until it loses its place. Gives who is to have it.
    async fn crowded_out(&self) -> Waiting {
        self.is_up_to_peer.notified().await;
        tokio::time::sleep(SLOWNESS).await;
        self.places.wanted(&self.keeps_place).await
    }

    fn give_place(self, next: Waiting) {
        if let Some(place) = self.place.into_inner() {
            // If it got another one meanwhile, this is for whoever comes next.
            let _ = next.send(place);
        }
    }
}

/// An exchange that waits for a place.
type Waiting = oneshot::Sender<OwnedSemaphorePermit>;

/// The places of a listener.
struct Places {
    free: Arc<Semaphore>,
    /// Those who wait longest first; some of them wait no more.
    waiting: parking_lot::Mutex<VecDeque<Waiting>>,
    /// Notified when one more waits.
    more: Notify,
}

impl Places {
    fn new() -> Places {
        let free = Arc::new(Semaphore::new(Turn::PLACES));
        Places { free, waiting: parking_lot::Mutex::default(), more: Notify::new() }
    }

    /// Waits for a place: a free one, or that of an exchange which has to go.
    async fn take(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.free).try_acquire_owned() {
            return Some(place);
        }
        let (sender, given) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock();
            waiting.retain(|other| !other.is_closed());
            waiting.push_back(sender);
        }
        self.more.notify_one();
        tokio::select! {
            // Nobody closes the semaphore.
            place = Arc::clone(&self.free).acquire_owned() => place.ok(),
            Ok(place) = given => Some(place),
        }
    }

    /// Waits until somebody waits for a place; for ever once the caller, whose task sets that, keeps its own.
    async fn wanted(&self, keeps_place: &AtomicBool) -> Waiting {
        while !keeps_place.load(Relaxed) {
            let mut more = pin!(self.more.notified());
            more.as_mut().enable();
            let next = {
                let mut waiting = self.waiting.lock();
                std::iter::from_fn(|| waiting.pop_front()).find(|next| !next.is_closed())
            };
            if let Some(next) = next {
                return next;
            }
            more.await;
        }
        // Of one who is here for nothing another one must hear.
        self.more.notify_one();
        pending().await
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

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        task::{Context, Poll, Wake},
    };

    use super::*;

    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Relaxed);
        }
    }

    /// The peer of the exchange that was to give its place has answered meanwhile: another one gives its own.
    #[tokio::test]
    async fn who_wants_a_place_is_heard_by_all() {
        let places = Places::new();
        let held = Arc::clone(&places.free).try_acquire_many_owned(64).unwrap();
        let (first, second) = (AtomicBool::new(false), AtomicBool::new(false));
        let flags = [Arc::new(Flag::default()), Arc::new(Flag::default())];
        let wakers = flags.clone().map(std::task::Waker::from);
        let (mut a, mut b) = (Box::pin(places.wanted(&first)), Box::pin(places.wanted(&second)));
        assert!(a.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
        assert!(b.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
        let mut take = Box::pin(places.take());
        assert!(take.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())).is_pending());
        assert!(flags[0].0.load(Relaxed) && !flags[1].0.load(Relaxed));
        first.store(true, Relaxed);
        assert!(a.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
        assert!(flags[1].0.load(Relaxed));
        let Poll::Ready(next) = b.as_mut().poll(&mut Context::from_waker(&wakers[1])) else {
            panic!("it hears of who waits")
        };
        assert!(!next.is_closed());
        drop(held);
    }
}
