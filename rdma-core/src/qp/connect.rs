//! From RESET to RTS with what two peers tell each other.

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::QueuePair;
use super::state::{Init, Reset, Rts, State};
use super::transition::TransitionError;
use super::transport::{ConnectedInit, Rc, RcRtr, RcRts, Transport, Uc, UcRtr, UcRts};
use crate::Error;
use crate::ah::{AddressVector, GlobalRoute};
use crate::context::Context;
use crate::mr::RemoteAccess;
use crate::port::{Gid, LinkLayer, Mtu};

/// What a peer must know to connect: plain data, to be sent over any channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The kind of network.
    pub link_layer: LinkLayer,
    /// LID; 0 on RoCE.
    pub lid: u16,
    /// GID; all zero on InfiniBand without a GRH.
    pub gid: Gid,
    /// Queue pair number.
    pub qp_num: u32,
    /// First PSN sent, 24 bits.
    pub psn: u32,
    /// Largest path MTU.
    pub mtu: Mtu,
    /// RDMA reads and atomics that may be in flight towards it.
    pub max_dest_rd_atomic: u8,
}

/// Which port and GID an endpoint uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointOptions {
    /// Port, counted from 1.
    pub port: u8,
    /// GID index; chosen (see [`Context::choose_gid`](crate::Context::choose_gid)) when `None`.
    pub gid_index: Option<u8>,
}

impl Default for EndpointOptions {
    fn default() -> EndpointOptions {
        EndpointOptions { port: 1, gid_index: None }
    }
}

/// How to connect; the defaults suit most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Port, counted from 1.
    pub port: u8,
    /// Own GID index; chosen when `None`.
    pub gid_index: Option<u8>,
    /// Index of the partition key.
    pub pkey_index: u16,
    /// What the peer may do through this pair (all of it: the memory decides).
    pub access: RemoteAccess,
    /// See [`RcRtr::min_rnr_timer`]: 12, 0.64 ms.
    pub min_rnr_timer: u8,
    /// See [`RcRts::timeout`]: 14, 67 ms.
    pub timeout: u8,
    /// See [`RcRts::retry_count`]: 6 (7 retries for ever on some providers).
    pub retry_count: u8,
    /// See [`RcRts::rnr_retry`]: 7, for ever.
    pub rnr_retry: u8,
    /// Traffic class of the packets.
    pub traffic_class: u8,
    /// Hop limit of the packets.
    pub hop_limit: u8,
    /// Service level.
    pub service_level: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Static rate (`enum ibv_rate`); 0 for the port's.
    pub static_rate: u8,
}

impl Default for ConnectOptions {
    fn default() -> ConnectOptions {
        ConnectOptions {
            port: 1,
            gid_index: None,
            pkey_index: 0,
            access: RemoteAccess::all(),
            min_rnr_timer: 12,
            timeout: 14,
            retry_count: 6,
            rnr_retry: 7,
            traffic_class: 0,
            hop_limit: 64,
            service_level: 0,
            flow_label: 0,
            static_rate: 0,
        }
    }
}

/// A first PSN that differs from pair to pair, so that packets of an old connection are not taken for the new.
fn fresh_psn() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
    NEXT.fetch_add(0x9e_3779, Ordering::Relaxed).wrapping_add(time) & 0xff_ffff
}

/// The GID at an index that the caller chose; an empty one is an error that says which are not.
fn filled_gid(context: &Context, port: u8, index: u8) -> Result<Gid, Error> {
    let gid = context.gid(port, u32::from(index))?;
    if !gid.is_zero() {
        return Ok(gid);
    }
    let filled: Vec<u32> = context.gids(port)?.iter().map(|entry| entry.index).collect();
    Err(Error::Invalid { what: format!("GID {index} of port {port} is empty; filled are {filled:?}") })
}

impl<T: Transport, S: State> QueuePair<T, S> {
    fn context(&self) -> Context {
        Context { inner: std::sync::Arc::clone(&self.inner.pd.context) }
    }

    /// What to tell the peer; give the same value to `connect`.
    ///
    /// # Errors
    ///
    /// What the queries of port and GID say, and [`Error::Invalid`] for an index whose entry of the GID table is empty.
    pub fn endpoint(&self, options: &EndpointOptions) -> Result<Endpoint, Error> {
        let context = self.context();
        let port = context.port(options.port)?;
        let gid = match options.gid_index {
            Some(index) => filled_gid(&context, options.port, index)?,
            None if port.needs_gid() => context.choose_gid(options.port)?.entry.gid,
            None => Gid([0; 16]),
        };
        Ok(Endpoint {
            link_layer: port.link_layer,
            lid: port.lid,
            gid,
            qp_num: self.num(),
            psn: fresh_psn(),
            mtu: port.active_mtu,
            max_dest_rd_atomic: context.attributes()?.max_qp_rd_atom.min(16),
        })
    }

    /// The path from here to `remote`.
    fn path(&self, remote: &Endpoint, options: &ConnectOptions) -> Result<AddressVector, Error> {
        let context = self.context();
        let port = context.port(options.port)?;
        if port.needs_gid() != (remote.link_layer == LinkLayer::Ethernet) {
            return Err(Error::Invalid {
                what: format!(
                    "port {} is {:?}, the peer's {:?}",
                    options.port, port.link_layer, remote.link_layer
                ),
            });
        }
        if port.needs_gid() && remote.gid.is_zero() {
            return Err(Error::Invalid {
                what: "the peer's GID is all zeroes, and RoCE has no other address".to_owned(),
            });
        }
        let route = if port.needs_gid() || !remote.gid.is_zero() && options.gid_index.is_some() {
            let index = match options.gid_index {
                Some(index) => {
                    filled_gid(&context, options.port, index)?;
                    index
                }
                None => u8::try_from(context.choose_gid(options.port)?.entry.index).map_err(|_| {
                    Error::Invalid { what: "the GID chosen has an index above 255".to_owned() }
                })?,
            };
            Some(GlobalRoute {
                gid: remote.gid,
                source_index: index,
                hop_limit: options.hop_limit,
                traffic_class: options.traffic_class,
                flow_label: options.flow_label,
            })
        } else {
            None
        };
        Ok(AddressVector {
            port: options.port,
            route,
            lid: remote.lid,
            service_level: options.service_level,
            source_path_bits: 0,
            static_rate: options.static_rate,
        })
    }
}

/// A pair whose connecting failed may be in INIT or RTR: reset, it can try again.
fn failed<T: Transport>(
    error: Error,
    inner: std::sync::Arc<super::QpInner>,
) -> TransitionError<QueuePair<T, Reset>> {
    let queue_pair = QueuePair::new(inner);
    if let Err(error) = queue_pair.inner.command(verbs_sys::ibv_qp_state::IBV_QPS_RESET) {
        tracing::warn!(%error, "a queue pair that could not be connected could not be reset either");
    } else {
        queue_pair.inner.reclaim(false);
    }
    TransitionError { error, queue_pair }
}

macro_rules! connect {
    ($transport:ident, |$local:ident, $remote:ident, $options:ident, $path:ident, $mtu:ident| $rtr:expr, $rts:expr) => {
        impl QueuePair<$transport, Reset> {
            /// Drives the pair to RTS, connected to `remote`; `local` is what was told the peer. Both sides call it;
            /// either may send at once.
            ///
            /// # Errors
            ///
            /// What the steps say, with the pair, reset for another attempt.
            pub fn connect(
                self,
                local: &Endpoint,
                remote: &Endpoint,
                options: &ConnectOptions,
            ) -> Result<QueuePair<$transport, Rts>, TransitionError<Self>> {
                let init = ConnectedInit {
                    port: options.port,
                    pkey_index: options.pkey_index,
                    access: options.access,
                };
                self.init(&init)?.connect(local, remote, options)
            }
        }

        impl QueuePair<$transport, Init> {
            /// As `connect` of a pair in RESET: for a pair that was given receives first.
            ///
            /// # Errors
            ///
            /// What the steps say, with the pair, reset for another attempt: its receives were flushed.
            pub fn connect(
                self,
                $local: &Endpoint,
                $remote: &Endpoint,
                $options: &ConnectOptions,
            ) -> Result<QueuePair<$transport, Rts>, TransitionError<QueuePair<$transport, Reset>>> {
                let $path = match self.path($remote, $options) {
                    Ok(path) => path,
                    Err(error) => return Err(failed(error, self.inner)),
                };
                let $mtu = $local.mtu.min($remote.mtu);
                let rtr = self.rtr(&$rtr).map_err(|e| failed(e.error, e.queue_pair.inner))?;
                rtr.rts(&$rts).map_err(|e| failed(e.error, e.queue_pair.inner))
            }
        }
    };
}

connect!(
    Rc,
    |local, remote, options, path, path_mtu| RcRtr {
        path,
        path_mtu,
        dest_qp_num: remote.qp_num,
        rq_psn: remote.psn,
        max_dest_rd_atomic: local.max_dest_rd_atomic,
        min_rnr_timer: options.min_rnr_timer,
    },
    RcRts {
        sq_psn: local.psn,
        timeout: options.timeout,
        retry_count: options.retry_count,
        rnr_retry: options.rnr_retry,
        max_rd_atomic: remote.max_dest_rd_atomic.min(local.max_dest_rd_atomic),
    }
);

connect!(
    Uc,
    |local, remote, options, path, path_mtu| UcRtr {
        path,
        path_mtu,
        dest_qp_num: remote.qp_num,
        rq_psn: remote.psn,
    },
    UcRts { sq_psn: local.psn }
);
