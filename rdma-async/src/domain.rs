//! What connections of a process share: an open device, a protection domain, a completion channel and its task.

use std::sync::{Arc, Weak};

use rdma_core::{Context, Device, Error, ProtectionDomain};

use crate::{
    driver::Driver,
    events::{Events, Watchman},
    lane::Watched,
    pool::{BufferPool, Registry},
    pools::BufferPools,
    queue::CompletionQueue,
    wait::WaitMode,
};

/// An open device with a protection domain, ready for futures.
///
/// It belongs to the tokio runtime it was opened on: the task that takes the events of its completion queues runs
/// there. Clones are the same domain; everything made in it keeps it open.
#[derive(Clone, Debug)]
pub struct Domain {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pd: ProtectionDomain,
    driver: Arc<Driver>,
    watchman: Watchman,
    pools: Arc<Registry>,
}

impl Domain {
    /// Opens the device named `device`; with `None` the first one with an active port that libibverbs lists, else the
    /// built-in one ([`Device::named_or_chosen`]).
    ///
    /// # Errors
    ///
    /// No such device (with the names that exist), or what the verbs say.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with I/O enabled.
    pub fn open(device: Option<&str>) -> Result<Domain, Error> {
        Domain::new(&Device::named_or_chosen(device)?.device.open()?)
    }

    /// Makes a domain on a device that is already open.
    ///
    /// # Errors
    ///
    /// What the verbs say, or the runtime to the completion channel's file descriptor.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with I/O enabled.
    pub fn new(context: &Context) -> Result<Domain, Error> {
        let pd = context.protection_domain()?;
        let driver = Driver::spawn(context)?;
        let watchman = Watchman::spawn(context);
        Ok(Domain { shared: Arc::new(Shared { pd, driver, watchman, pools: Arc::default() }) })
    }

    /// The open device.
    #[must_use]
    pub fn context(&self) -> Context {
        self.shared.pd.context()
    }

    /// The protection domain, to register memory in.
    #[must_use]
    pub fn protection_domain(&self) -> &ProtectionDomain {
        &self.shared.pd
    }

    /// A completion queue with room for `depth` work requests in flight, for connections to share.
    ///
    /// # Errors
    ///
    /// What `ibv_create_cq` says.
    pub fn completion_queue(&self, depth: u32, mode: WaitMode) -> Result<CompletionQueue, Error> {
        self.shared.driver.completion_queue(depth, mode)
    }

    /// The device's asynchronous events from now on. The domain reads them all: what else reads those of
    /// [`context`](Domain::context) takes them away.
    #[must_use]
    pub fn events(&self) -> Events {
        self.shared.watchman.subscribe()
    }

    pub(crate) fn watch(&self, qp_num: u32, pair: Weak<dyn Watched>) {
        self.shared.watchman.watch(qp_num, pair);
    }

    /// A pool of `count` buffers of at least `size` bytes.
    ///
    /// # Errors
    ///
    /// See [`BufferPool::new`].
    ///
    /// # Panics
    ///
    /// If `count` is 0.
    pub fn buffer_pool(&self, count: usize, size: usize) -> Result<BufferPool, Error> {
        BufferPool::found_in(&self.shared.pd, count, size, Some(&self.shared.pools))
    }

    /// Pools of several sizes: of each pair, a number of buffers of at least so many bytes.
    ///
    /// # Errors
    ///
    /// See [`BufferPool::new`].
    ///
    /// # Panics
    ///
    /// If a number of buffers is 0.
    pub fn buffer_pools(&self, classes: &[(usize, usize)]) -> Result<BufferPools, Error> {
        BufferPools::new(classes, |count, size| self.buffer_pool(count, size))
    }
}
