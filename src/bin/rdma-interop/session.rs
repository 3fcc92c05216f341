//! One side of the run: its device, and the pairs that cases ask for.

use std::time::Duration;

use rdma_core::inflight::{Finished, Operation, QueueRef};
use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::{Rc, Uc};
use rdma_core::{
    Buffer, CompletionQueue, ConnectOptions, Context, Endpoint, EndpointOptions, Mtu, ProtectionDomain,
    Provider, QueuePair,
};

use crate::Fallible;
use crate::cases::{Case, Service};
use crate::link::Link;

/// Who sends and who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Requester,
    Responder,
}

pub(crate) struct Session {
    pub(crate) context: Context,
    pub(crate) domain: ProtectionDomain,
    /// Whether the device is the kernel's rxe, which differs in places (docs/INTEROP.md).
    pub(crate) is_rxe: bool,
    pub(crate) link: Link,
    pub(crate) role: Role,
    pub(crate) gid_index: Option<u8>,
    /// Whether packets get lost on the way.
    pub(crate) lossy: bool,
    /// How often a transfer is repeated.
    pub(crate) rounds: usize,
    /// How long a completion may take.
    pub(crate) limit: Duration,
}

/// A connected pair with its completion queue.
pub(crate) struct Pair<T: rdma_core::qp::transport::Transport> {
    pub(crate) qp: QueuePair<T, Rts>,
    /// Kept: what is posted completes there.
    pub(crate) _cq: CompletionQueue,
}

macro_rules! pair {
    ($name:ident, $service:ident) => {
        /// A fresh pair, connected to the other side's.
        pub(crate) fn $name(
            &mut self,
            mtu: u32,
            tweak: impl FnOnce(&mut ConnectOptions),
        ) -> Fallible<Pair<$service>> {
            let cq = self.context.completion_queue(64).build()?;
            let qp = self.domain.queue_pair::<$service>(&cq, &cq).max_send(16).max_recv(16).build()?;
            let (local, remote) = self.endpoints(
                qp.endpoint(&EndpointOptions { gid_index: self.gid_index, ..EndpointOptions::default() })?,
                mtu,
            )?;
            let mut options = ConnectOptions { gid_index: self.gid_index, ..ConnectOptions::default() };
            tweak(&mut options);
            let qp = qp.connect(&local, &remote, &options)?;
            self.link.meet()?;
            Ok(Pair { qp, _cq: cq })
        }
    };
}

impl Session {
    pub(crate) fn new(
        context: &Context,
        is_rxe: bool,
        gid_index: Option<u8>,
        link: Link,
        role: Role,
        lossy: bool,
    ) -> Fallible<Session> {
        let (rounds, limit) =
            if lossy { (20, Duration::from_secs(60)) } else { (1, Duration::from_secs(20)) };
        let domain = context.protection_domain()?;
        Ok(Session { context: context.clone(), domain, is_rxe, link, role, gid_index, lossy, rounds, limit })
    }

    pair!(rc, Rc);
    pair!(uc, Uc);

    /// This side's endpoint and the other's, both with the path MTU of the case.
    fn endpoints(&mut self, mut local: Endpoint, mtu: u32) -> Fallible<(Endpoint, Endpoint)> {
        let mtu = Mtu::from_bytes(mtu).ok_or("not a path MTU")?;
        if mtu > local.mtu {
            return Err(format!("the port's MTU is {}", local.mtu).into());
        }
        local.mtu = mtu;
        let remote = self.link.exchange(&local)?;
        Ok((local, remote))
    }

    pub(crate) fn run(&mut self, case: &Case) -> Fallible<String> {
        match *case {
            Case::Transfer { service: Service::Rc, verb, mtu, size } => self.rc_transfer(verb, mtu, size),
            Case::Transfer { service: Service::Uc, verb, mtu, size } => self.uc_transfer(verb, mtu, size),
            Case::Atomics => self.atomics(),
            Case::SendWithInvalidate { size } => self.send_with_invalidate(size),
            Case::OwnQKey => self.own_qkey(),
            Case::Datagram { size } => self.datagram(size),
            Case::SlowReceiver => self.slow_receiver(),
            Case::Fault(fault) => self.fault(fault),
        }
    }

    /// A registered buffer of `size` bytes.
    pub(crate) fn buffer(&self, size: usize) -> Fallible<Buffer> {
        // A region has at least one byte.
        let mut buffer = self.domain.allocate(size.max(1))?.into_buffer();
        buffer.set_len(size);
        Ok(buffer)
    }

    pub(crate) fn finish(&self, operation: Operation<QueueRef<'_>>) -> Fallible<Finished> {
        operation.wait(self.limit).map_err(|(error, _)| error.into())
    }
}

/// No manufacturer has the number that rxe gives itself.
pub(crate) fn is_rxe(context: &Context, provider: Provider) -> Fallible<bool> {
    Ok(provider != Provider::Soft && context.attributes()?.vendor_id == 0xff_ffff)
}

/// What a message of `size` bytes contains.
pub(crate) fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i.wrapping_mul(31) ^ (i >> 8) ^ size).to_le_bytes()[0]).collect()
}

/// Compares and says where the first difference is.
pub(crate) fn check(what: &str, found: &[u8], expected: &[u8]) -> Fallible<()> {
    if found.len() != expected.len() {
        return Err(format!("{what} has {} bytes instead of {}", found.len(), expected.len()).into());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        Some(at) => {
            Err(format!("{what} differs at byte {at}: {} instead of {}", found[at], expected[at]).into())
        }
        None => Ok(()),
    }
}
