//! A client of the store: reads by RDMA READ, writes through its mailbox.

use std::time::Duration;

use rdma_async::{Config, Domain, RcConnection};
use rdma_core::{Buffer, RemoteSlice};
use rdma_workbench::cli::OpenDevice;
use rdma_workbench::peer::{Outcome, connect};

use crate::Options;
use crate::server::{Answer, MAX_REQUEST, Welcome};
use crate::table::{self, SLOT, Slot};

/// Reads of one slot before a client gives up: a server that is stopped while it changes a slot leaves it so.
const MAX_ATTEMPTS: u32 = 1000;

pub(crate) struct Client {
    connection: RcConnection,
    table: RemoteSlice,
    welcome: Welcome,
    /// What slots are read into. Gone after an operation failed, which ends the connection.
    buffer: Option<Buffer>,
    /// Reads that saw a slot while it was changed.
    pub(crate) torn: u64,
}

impl Client {
    pub(crate) async fn connect(address: &str, device: &OpenDevice, options: &Options) -> Outcome<Client> {
        let domain = Domain::new(&device.context)?;
        let config =
            device.configure(Config::rc()).wait_mode(options.mode.into()).receive_depth(2).spare_buffers(2);
        let connection = connect(address, &domain, &config).await?;
        let table =
            *connection.peer_regions().first().ok_or("the peer opened no memory: it is no remote_kv")?;
        let welcome = tokio::time::timeout(Duration::from_secs(5), connection.recv())
            .await
            .map_err(|_| "the server said nothing for 5 s: it is no remote_kv")??;
        let welcome: Welcome = serde_json::from_slice(&welcome)
            .map_err(|error| format!("the peer is no remote_kv, or of another version: {error}"))?;
        if welcome.slots == 0 || welcome.slots.checked_mul(SLOT as u64) != Some(table.len) {
            return Err(
                format!("the server's table of {} bytes has no {} slots", table.len, welcome.slots).into()
            );
        }
        let buffer = Some(connection.pool().acquire().await);
        Ok(Client { connection, table, welcome, buffer, torn: 0 })
    }

    /// Counted from 0 in the order of connecting.
    pub(crate) fn number(&self) -> u32 {
        self.welcome.client
    }

    /// The value of `key`; the server's program takes no part in it.
    pub(crate) async fn get(&mut self, key: &[u8]) -> Outcome<Option<Vec<u8>>> {
        for place in table::places(key, self.welcome.slots) {
            match self.read_slot(place).await?.as_deref() {
                Some(slot) => match table::parse(slot) {
                    Slot::Entry { key: found, value, .. } if found == key => return Ok(Some(value.to_vec())),
                    Slot::Entry { .. } => {}
                    Slot::Torn | Slot::Empty => return Ok(None),
                },
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// A slot that is whole; `None` for one that is empty.
    async fn read_slot(&mut self, place: u64) -> Outcome<Option<Box<[u8; SLOT]>>> {
        let remote =
            self.table.slice(place * SLOT as u64, SLOT as u64).ok_or("a slot outside of the table")?;
        for _ in 0..MAX_ATTEMPTS {
            let mut buffer = self.buffer.take().ok_or("an earlier read failed")?;
            buffer.set_len(SLOT);
            let (result, buffer) = self.connection.read(buffer, remote).await;
            result?;
            let slot = Box::new(<[u8; SLOT]>::try_from(&buffer[..])?);
            self.buffer = Some(buffer);
            match table::parse(&slot) {
                Slot::Empty => return Ok(None),
                Slot::Torn => self.torn += 1,
                Slot::Entry { .. } => return Ok(Some(slot)),
            }
        }
        Err(format!("slot {place} was being changed at each of {MAX_ATTEMPTS} reads").into())
    }

    /// Stores `value`; whoever reads `key` after this call sees it, or a later one.
    pub(crate) async fn put(&mut self, key: &[u8], value: &[u8]) -> Outcome {
        let length = 2 + key.len() + value.len();
        if key.is_empty() || length > MAX_REQUEST {
            return Err(format!(
                "a key of at least 1 byte and its value have at most {} bytes",
                MAX_REQUEST - 2
            )
            .into());
        }
        let mut request = self.connection.pool().acquire().await;
        request.set_len(length);
        request[..2].copy_from_slice(&u16::try_from(key.len())?.to_le_bytes());
        request[2..2 + key.len()].copy_from_slice(key);
        request[2 + key.len()..].copy_from_slice(value);
        self.connection.write_with_imm(request, self.welcome.mailbox, u32::try_from(length)?).await.0?;
        let answer = self.connection.recv().await?;
        match answer[..] {
            [code] if code == Answer::Stored as u8 => Ok(()),
            [code] if code == Answer::Full as u8 => {
                Err("the server's table is full around this key: start it with more --slots".into())
            }
            _ => Err("the server did not understand the request".into()),
        }
    }

    pub(crate) async fn close(self) -> Outcome {
        Ok(self.connection.close().await?)
    }
}
