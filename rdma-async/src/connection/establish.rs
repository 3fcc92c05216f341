//! From a stream to a connection.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rdma_core::{
    ConnectOptions, Endpoint, EndpointOptions, Error, Gid, KeptPlaces, LinkLayer, Mtu, PostErrorKind,
    QueuePair, RecvRequest, RemoteSlice,
    qp::{state::Init, transport::ConnectedInit},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, ToSocketAddrs},
    sync::Mutex,
};

use super::{
    Config, Connection, Peer,
    link::Link,
    listener::Turn,
    transport::Connected,
    watch::{Guarded, watch},
};
use crate::{
    domain::Domain,
    error::{ConnectError, fit_to_print},
    exchange::{self, Exchange},
    lane::Lane,
    queue::{CompletionQueue, Places},
    trace,
};

/// The first frame: what this side is. A side that cannot even make its queue pair says why instead.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    transport: u8,
    endpoint: Endpoint,
    message_size: u64,
    regions: Vec<RemoteSlice>,
    private_data: Vec<u8>,
}

impl Hello {
    fn new<T: Connected>(endpoint: Endpoint, message_size: u64, config: &Config<T>) -> Self {
        let (regions, private_data) = (config.regions.clone(), config.private_data.clone());
        Hello { transport: T::CODE, endpoint, message_size, regions, private_data }
    }
}

/// What `hear` and `swap` give for a first frame.
type FirstFrame = Result<Hello, String>;

/// Whether the first frame of `config` fits, whatever its numbers will be.
///
/// # Errors
///
/// [`ExchangeError::OursTooLong`](crate::exchange::ExchangeError::OursTooLong).
pub(super) fn check<T: Connected>(config: &Config<T>) -> Result<(), ConnectError> {
    let longest = Endpoint {
        link_layer: LinkLayer::Unknown(u8::MAX),
        lid: u16::MAX,
        gid: Gid([u8::MAX; 16]),
        qp_num: u32::MAX,
        psn: u32::MAX,
        mtu: Mtu::B4096,
        max_dest_rd_atomic: u8::MAX,
    };
    let hello: FirstFrame = Ok(Hello::new(longest, u64::MAX, config));
    exchange::check(&hello).map_err(|source| ConnectError::Exchange { peer: None, source })
}

/// The second frame: this side is ready to receive, or why it is not.
type Ready = Result<(), String>;

/// Connects to a [`Listener`](super::Listener) at `address`.
///
/// # Errors
///
/// [`ConnectError`].
///
/// # Cancel safety
///
/// A dropped call leaves nothing behind but a peer whose exchange ends early.
pub async fn connect<T: Connected>(
    address: impl ToSocketAddrs,
    domain: &Domain,
    config: &Config<T>,
) -> Result<Connection<T>, ConnectError> {
    let stream = tokio::time::timeout(config.handshake_timeout, TcpStream::connect(address)).await;
    let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let stream = stream.map_err(|source| ConnectError::Stream { verb: "connect", source })?;
    over_tcp(stream, domain, config, None).await
}

/// Connects to a peer that does the same at the other end of `stream`, whatever that is (TLS, a Unix socket). The stream stays
/// open as long as the connection.
///
/// # Errors
///
/// [`ConnectError`].
///
/// # Cancel safety
///
/// A dropped call drops the stream.
pub async fn connect_over<T: Connected, S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    domain: &Domain,
    config: &Config<T>,
) -> Result<Connection<T>, ConnectError> {
    trace::establishing(T::NAME, establish(stream, None, domain, config, None)).await
}

pub(super) async fn over_tcp<T: Connected>(
    stream: TcpStream,
    domain: &Domain,
    config: &Config<T>,
    turn: Option<&Turn>,
) -> Result<Connection<T>, ConnectError> {
    let peer = stream.peer_addr().ok();
    prepare(&stream, config.keep_alive)
        .map_err(|source| ConnectError::Stream { verb: "set options of", source })?;
    trace::establishing(T::NAME, establish(stream, peer, domain, config, turn)).await
}

/// No delays, and an end when the peer's machine is gone without a word.
fn prepare(stream: &TcpStream, keep_alive: Option<Duration>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(interval) = keep_alive else { return Ok(()) };
    // The options count in seconds, up to so many (Linux: MAX_TCP_KEEPIDLE).
    let interval = interval.clamp(Duration::from_secs(1), Duration::from_secs(32_767));
    let options = socket2::TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(3);
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_keepalive(&options)?;
    socket.set_tcp_user_timeout(Some(4 * interval))
}

async fn establish<T: Connected, S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    address: Option<SocketAddr>,
    domain: &Domain,
    config: &Config<T>,
    turn: Option<&Turn>,
) -> Result<Connection<T>, ConnectError> {
    let mut exchange = Exchange::new(stream, config.handshake_timeout);
    let failed = |source| ConnectError::Exchange { peer: address, source };
    let refused = |reason: String| ConnectError::Refused { peer: address, reason: fit_to_print(&reason) };
    // A peer that says nothing costs a listener no queue pair.
    let heard = match turn {
        Some(turn) => {
            let theirs = match exchange.hear::<FirstFrame>().await {
                Ok(theirs) => theirs,
                Err(error) => {
                    if error.is_of_a_speaker() {
                        exchange.refuse(&FirstFrame::Err(reason(&error))).await;
                    }
                    return Err(failed(error));
                }
            };
            turn.stay();
            let theirs = theirs.map_err(refused)?;
            // Held until the connection is accepted.
            let place = tokio::time::timeout_at(exchange.deadline(), turn.place()).await;
            place.map_err(|_| ConnectError::NotAccepted {
                peer: address,
                made: Turn::PLACES,
                timeout: config.handshake_timeout,
            })?;
            Some(theirs)
        }
        None => None,
    };
    let prepared = Prepared::when_there_is_room(domain, config).await;
    let prepared = prepared.map_err(ConnectError::from).and_then(|prepared| {
        let size = prepared.lane.pool.buffer_size() as u64;
        let hello: FirstFrame = Ok(Hello::new(prepared.endpoint, size, config));
        exchange::check(&hello).map_err(failed)?;
        Ok((prepared, hello))
    });
    let (prepared, hello) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            let why = FirstFrame::Err(reason(&error));
            // The peer learns why; whether it does changes nothing here.
            let _ = match heard {
                Some(_) => exchange.tell(&why).await,
                None => exchange.swap::<_, FirstFrame>(&why).await.map(drop),
            };
            return Err(error);
        }
    };
    let mtu = prepared.endpoint.mtu;
    let theirs = match heard {
        Some(theirs) => exchange.tell(&hello).await.map(|()| theirs).map_err(failed)?,
        None => exchange.swap::<_, FirstFrame>(&hello).await.map_err(failed)?.map_err(refused)?,
    };
    let connected = if theirs.transport == T::CODE {
        prepared.connect(&theirs.endpoint).map_err(ConnectError::from)
    } else {
        let reason = format!("it is not configured for {}, as this side is", T::NAME.to_uppercase());
        Err(ConnectError::Mismatch { peer: address, reason })
    };
    let ready: Ready = connected.as_ref().map(drop).map_err(|error| reason(error));
    if let Some(turn) = turn {
        turn.may_lose_place();
    }
    let answer = exchange.swap::<Ready, Ready>(&ready).await;
    if let Some(turn) = turn {
        turn.keep_place();
    }
    let link = Arc::new(connected?);
    answer.map_err(failed)?.map_err(refused)?;
    // What the runtime allocates for the first task that lets others run it allocates here, and for no operation.
    tokio::task::yield_now().await;
    domain.watch(link.qp_num, link.lane.watched());
    let watcher = watch(Guarded(Arc::clone(&link)), exchange.into_inner(), config.keep_alive);
    let watcher = tokio::spawn(trace::watching(link.qp_num, watcher));
    let peer = Peer {
        address,
        message_size: usize::try_from(theirs.message_size).unwrap_or(usize::MAX),
        // What `connect` chose.
        path_mtu: mtu.min(theirs.endpoint.mtu).bytes(),
        regions: theirs.regions,
        data: theirs.private_data,
    };
    Ok(Connection { link, domain: domain.clone(), peer, watcher: Mutex::new(Some(watcher)) })
}

/// An error for the peer.
fn reason(error: &dyn std::error::Error) -> String {
    fit_to_print(&error.to_string())
}

/// A queue pair with receives posted, about to be connected.
struct Prepared<T: Connected> {
    pair: QueuePair<T, Init>,
    endpoint: Endpoint,
    options: ConnectOptions,
    lane: Lane<T>,
}

impl<T: Connected> Prepared<T> {
    /// Waits for places of the completion queue, which sends of other connections may have for the moment: they go to nobody else.
    async fn when_there_is_room(domain: &Domain, config: &Config<T>) -> Result<Self, Error> {
        const LIMIT: Duration = Duration::from_secs(2);
        const BETWEEN: Duration = Duration::from_millis(1);
        let queue = match &config.queue {
            Some(queue) => queue.clone(),
            // One more, for the signalled send that ends a run of unsignalled ones.
            None => {
                let depth = config.send_depth.saturating_add(config.receive_depth).saturating_add(1);
                domain.completion_queue(depth, config.wait_mode)?
            }
        };
        // Those that there never is room for need not wait.
        let places = queue.shared.keep_places(config.receive_depth)?;
        let kept = queue.shared.cq.keep_places(config.receive_depth);
        let begin = Instant::now();
        while !kept.is_ready() && begin.elapsed() < LIMIT {
            tokio::time::sleep(BETWEEN).await;
        }
        Self::new(domain, config, &queue, places, &kept)
    }

    fn new(
        domain: &Domain,
        config: &Config<T>,
        queue: &CompletionQueue,
        places: Places,
        kept: &KeptPlaces,
    ) -> Result<Self, Error> {
        let cq = &queue.shared.cq;
        let pair = domain
            .protection_domain()
            .queue_pair::<T>(cq, cq)
            .max_send(config.send_depth)
            .max_recv(config.receive_depth)
            .max_send_sge(config.max_sge)
            .keep_receives(kept)
            .build()?;
        let buffers = (config.receive_depth as usize).saturating_add(config.spare_buffers);
        let pool = domain.buffer_pool(buffers, config.message_size)?;
        let gid_index = config.gid_index.map(u8::try_from).transpose().map_err(|_| Error::Invalid {
            what: "the GID index is above 255, more than an address vector holds".to_owned(),
        })?;
        let endpoint = pair.endpoint(&EndpointOptions { port: config.port, gid_index })?;
        let options = ConnectOptions { port: config.port, gid_index, ..ConnectOptions::default() };
        let init =
            ConnectedInit { port: options.port, pkey_index: options.pkey_index, access: options.access };
        let pair = pair.init(&init)?;
        // Before the peer can send: what finds no receive waits for a timer.
        let receive_depth = config.receive_depth.min(pair.capacity().max_recv).max(1);
        let lane = Lane::new(queue, pool, places, pair.capacity().max_send, receive_depth);
        while lane.lock().in_flight() < receive_depth {
            let Some(buffer) = lane.pool.try_acquire() else { break };
            match pair.post_recv(RecvRequest::new(buffer).id(lane.receive_id())) {
                Ok(()) => lane.lock().receive_posted(),
                Err(error) if error.kind == PostErrorKind::QueueFull => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Prepared { pair, endpoint, options, lane })
    }

    fn connect(self, remote: &Endpoint) -> Result<Link<T>, Error> {
        let pair = T::connect(self.pair, &self.endpoint, remote, &self.options)?;
        Ok(Link::new(pair, self.lane))
    }
}
