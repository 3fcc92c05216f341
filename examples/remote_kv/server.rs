//! The server: applies writes, and lets its device serve the reads.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use rdma_async::{Config, Domain, Ended, Listener, RcConnection};
use rdma_core::{RemoteAccess, RemoteSlice, SharedRegion};
use rdma_workbench::peer::{Outcome, announce};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::Options;
use crate::table::{MAX_ENTRY, PutError, SLOT, Table};

/// A request to store: the length of the key (2 bytes, little-endian), the key, the value. Its length comes as immediate data.
pub(crate) const MAX_REQUEST: usize = 2 + MAX_ENTRY;

/// What a client must know, in the first message to it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// Counted from 0.
    pub(crate) client: u32,
    /// Slots of the table.
    pub(crate) slots: u64,
    /// Memory of the server that this client, and no other, writes its requests to.
    pub(crate) mailbox: RemoteSlice,
}

/// The answer to a request to store, one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    Stored = 0,
    Full = 1,
    BadRequest = 2,
}

pub(crate) async fn serve(address: &str, options: &Options) -> Outcome {
    let device = options.device.open()?;
    let domain = Domain::new(&device.context)?;
    // Clients may read the table. They cannot write to it: what they write to is theirs alone.
    let memory = vec![0; usize::try_from(options.slots)? * SLOT];
    let region = domain.protection_domain().share(memory, RemoteAccess::READ)?;
    let config = device
        .configure(Config::rc())
        .wait_mode(options.mode.into())
        .receive_depth(2)
        .spare_buffers(2)
        .regions([region.remote()]);
    let table = Arc::new(Mutex::new(Table::new(region)));
    let listener = Listener::bind(address, &domain, &config).await?;
    announce(listener.local_addr())?;

    let mut clients = JoinSet::new();
    let mut count = 0;
    // One future for the whole loop: a signal that comes between two of them would be lost.
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            accepted = options.peer.limit(listener.accept()), if count == 0 => welcome(&mut clients, &mut count, accepted?, &table, &domain)?,
            accepted = listener.accept(), if count > 0 => welcome(&mut clients, &mut count, accepted, &table, &domain)?,
            Some(ended) = clients.join_next() => {
                if let Err(error) = ended? {
                    eprintln!("remote_kv (server): {error}");
                }
            }
            interrupted = &mut interrupted => break interrupted?,
        }
    }
    drop(listener);
    clients.shutdown().await;
    let table = table.lock().unwrap_or_else(PoisonError::into_inner);
    eprintln!("server: {} keys in {} slots, {count} clients", table.keys, table.slots());
    Ok(())
}

/// Gives a client its mailbox and a task. A client that could not connect is no reason to stop.
fn welcome(
    clients: &mut JoinSet<Result<(), String>>,
    count: &mut u32,
    accepted: Result<RcConnection, rdma_async::ConnectError>,
    table: &Arc<Mutex<Table>>,
    domain: &Domain,
) -> Outcome {
    let connection = match accepted {
        Ok(connection) => connection,
        Err(error) => {
            eprintln!("remote_kv (server): {error}");
            return Ok(());
        }
    };
    let mailbox = domain.protection_domain().share(vec![0; MAX_REQUEST], RemoteAccess::WRITE)?;
    let slots = table.lock().unwrap_or_else(PoisonError::into_inner).slots();
    let welcome = serde_json::to_vec(&Welcome { client: *count, slots, mailbox: mailbox.remote() })?;
    let (client, table) = (*count, Arc::clone(table));
    *count += 1;
    clients.spawn(async move {
        let result = requests(&connection, &mailbox, &table, welcome).await;
        result.map_err(|error| format!("client {client}: {error}"))
    });
    Ok(())
}

/// Serves one client until it goes.
async fn requests(
    connection: &RcConnection,
    mailbox: &SharedRegion,
    table: &Mutex<Table>,
    welcome: Vec<u8>,
) -> Result<(), rdma_async::OperationError> {
    connection.send(bytes::Bytes::from(welcome)).await.0?;
    loop {
        let message = match connection.recv().await {
            Ok(message) => message,
            Err(error) => {
                return match connection.ended() {
                    Some(Ended::ClosedByPeer) => Ok(()),
                    _ => Err(error),
                };
            }
        };
        let answer = match message.imm() {
            Some(length) => store(mailbox, table, length),
            None => Answer::BadRequest,
        };
        let mut buffer = message.into_buffer();
        buffer.set_len(1);
        buffer[0] = answer as u8;
        connection.send(buffer).await.0?;
    }
}

/// Takes a request out of the mailbox, once: what the client does to the mailbox meanwhile changes nothing any more.
fn store(mailbox: &SharedRegion, table: &Mutex<Table>, length: u32) -> Answer {
    let mut request = [0; MAX_REQUEST];
    let Some(request) = request.get_mut(..length as usize) else { return Answer::BadRequest };
    if mailbox.copy_out(0, request).is_err() {
        return Answer::BadRequest;
    }
    let Some((key_length, rest)) = request.split_first_chunk() else { return Answer::BadRequest };
    let Some((key, value)) = rest.split_at_checked(u16::from_le_bytes(*key_length).into()) else {
        return Answer::BadRequest;
    };
    match table.lock().unwrap_or_else(PoisonError::into_inner).put(key, value) {
        Ok(()) => Answer::Stored,
        Err(PutError::Full) => Answer::Full,
        Err(PutError::TooLong | PutError::Memory(_)) => Answer::BadRequest,
    }
}
