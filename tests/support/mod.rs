//! What the tests of `rdma-core` share: the device under test, and connected pairs on it.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test uses a part of it, and fails by panicking"
)]

mod device;

use std::time::{Duration, Instant};

pub(crate) use device::{Difference, differs, skip};
use rdma_core::qp::state::{Reset, Rts};
use rdma_core::qp::transport::{Rc, Transport, Uc, Ud, UdInit, UdRtr, UdRts};
use rdma_core::{
    AddressHandle, AddressVector, Buffer, CompletionQueue, Completions, ConnectOptions, Context, Device,
    EndpointOptions, GlobalRoute, ProtectionDomain, Provider, QueuePair,
};

/// How long anything on one machine may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// The device that `RDMA_TEST_DEVICE` names, else the built-in one. A device that is asked for and
/// missing is a failure.
pub(crate) fn open() -> Context {
    let device = match std::env::var("RDMA_TEST_DEVICE") {
        Ok(name) => Device::named(&name).unwrap(),
        Err(_) => Device::list().unwrap().into_iter().find(|d| d.provider() == Provider::Soft).unwrap(),
    };
    device.open().unwrap()
}

/// One side of a connection.
pub(crate) struct Side<T: Transport> {
    pub(crate) qp: QueuePair<T, Rts>,
    pub(crate) cq: CompletionQueue,
}

/// A context, a domain, and two connected sides.
pub(crate) struct Pair<T: Transport> {
    pub(crate) context: Context,
    pub(crate) pd: ProtectionDomain,
    pub(crate) a: Side<T>,
    pub(crate) b: Side<T>,
}

/// A queue pair that can do everything the tests ask for.
pub(crate) fn queue_pair<T: Transport>(pd: &ProtectionDomain, cq: &CompletionQueue) -> QueuePair<T, Reset> {
    pd.queue_pair::<T>(cq, cq)
        .max_send(16)
        .max_recv(16)
        .max_send_sge(3)
        .max_recv_sge(3)
        .max_inline(64)
        .build()
        .unwrap()
}

macro_rules! connected {
    ($name:ident, $transport:ident) => {
        /// Two sides on one device.
        pub(crate) fn $name() -> Pair<$transport> {
            let context = open();
            let pd = context.protection_domain().unwrap();
            let (cq_a, cq_b) = (
                context.completion_queue(64).build().unwrap(),
                context.completion_queue(64).build().unwrap(),
            );
            let (a, b) = (queue_pair::<$transport>(&pd, &cq_a), queue_pair::<$transport>(&pd, &cq_b));
            let options = EndpointOptions::default();
            let (from_a, from_b) = (a.endpoint(&options).unwrap(), b.endpoint(&options).unwrap());
            let options = ConnectOptions::default();
            let a = a.connect(&from_a, &from_b, &options).unwrap();
            let b = b.connect(&from_b, &from_a, &options).unwrap();
            Pair { context, pd, a: Side { qp: a, cq: cq_a }, b: Side { qp: b, cq: cq_b } }
        }
    };
}

connected!(rc, Rc);
connected!(uc, Uc);

/// The Q_Key of the tests' datagrams.
pub(crate) const QKEY: u32 = 0x1122_3344;

/// Two sides that send datagrams.
pub(crate) fn ud() -> Pair<Ud> {
    let context = open();
    let pd = context.protection_domain().unwrap();
    let side = || {
        let cq = context.completion_queue(64).build().unwrap();
        let qp = queue_pair::<Ud>(&pd, &cq);
        let qp = qp.init(&UdInit { port: 1, pkey_index: 0, qkey: QKEY }).unwrap();
        let qp = qp.rtr(&UdRtr {}).unwrap().rts(&UdRts { sq_psn: 7 }).unwrap();
        Side { qp, cq }
    };
    let (a, b) = (side(), side());
    Pair { context: context.clone(), pd, a, b }
}

impl<T: Transport> Pair<T> {
    /// A buffer that holds `bytes`.
    pub(crate) fn buffer(&self, bytes: &[u8]) -> Buffer {
        self.pd.register(bytes.to_vec()).unwrap().into_buffer()
    }

    /// A buffer of `len` bytes of 0.
    pub(crate) fn empty(&self, len: usize) -> Buffer {
        self.pd.allocate(len).unwrap().into_buffer()
    }
}

impl Pair<Ud> {
    /// The address of this device.
    pub(crate) fn address(&self) -> AddressHandle {
        let gid = self.context.choose_gid(1).unwrap().entry;
        let route = GlobalRoute::new(gid.gid, u8::try_from(gid.index).unwrap());
        self.pd.address_handle(&AddressVector::global(1, route)).unwrap()
    }
}

/// A completion as the tests look at it: number, result, buffers.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) id: u64,
    pub(crate) result: Result<(u32, Option<u32>), rdma_core::CompletionError>,
    pub(crate) buffers: Vec<Buffer>,
}

/// Polls until `count` completions came.
pub(crate) fn collect(cq: &CompletionQueue, count: usize) -> Vec<Done> {
    let mut done = Vec::new();
    let mut completions = Completions::new();
    let start = Instant::now();
    while done.len() < count {
        assert!(start.elapsed() < LIMIT, "{} of {count} completions: {done:?}", done.len());
        for mut completion in cq.poll(&mut completions).unwrap() {
            let result = completion.result().map(|s| (u32::try_from(s.len()).unwrap(), s.imm()));
            let buffers = completion.take_buffers().collect();
            done.push(Done { id: completion.id(), result, buffers });
        }
    }
    done
}
