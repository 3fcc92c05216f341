//! An open device.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use verbs_sys::{Verbs, ibv_context, ibv_values_ex, ibv_values_mask, inline};

use crate::cq::{CompletionChannel, CompletionQueueBuilder};
use crate::device::{AtomicCapability, DeviceAttributes};
use crate::event::ParkedEvent;
use crate::inflight::QueueTable;
use crate::ops::DataPath;
use crate::pd::ProtectionDomain;
use crate::qp::QueuePairHandle;
use crate::srq::SrqInner;
use crate::{Error, leak};

/// A live context.
pub(crate) struct ContextInner {
    pub(crate) verbs: &'static Verbs,
    pub(crate) ptr: NonNull<ibv_context>,
    pub(crate) name: String,
    pub(crate) data_path: DataPath,
    pub(crate) queues: Arc<QueueTable>,
    /// Queue pairs and shared receive queues by the address of the provider's object, for events.
    pub(crate) qps: Mutex<HashMap<NonZeroUsize, QueuePairHandle>>,
    pub(crate) srqs: Mutex<HashMap<NonZeroUsize, Weak<SrqInner>>>,
    /// Events that someone who waited for another one took.
    pub(crate) events: Mutex<VecDeque<ParkedEvent>>,
    attributes: OnceLock<DeviceAttributes>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for ContextInner {}
// SAFETY: as above.
unsafe impl Sync for ContextInner {}

impl ContextInner {
    /// # Safety
    ///
    /// `ptr` is of `ibv_open_device` of these verbs, and is given up.
    pub(crate) unsafe fn new(
        verbs: &'static Verbs,
        ptr: NonNull<ibv_context>,
        name: String,
    ) -> Arc<ContextInner> {
        let queues = Arc::new(QueueTable::new());
        // SAFETY: just opened.
        let data_path = unsafe { DataPath::of(ptr) };
        Arc::new(ContextInner {
            verbs,
            ptr,
            name,
            data_path,
            queues,
            qps: Mutex::default(),
            srqs: Mutex::default(),
            events: Mutex::default(),
            attributes: OnceLock::new(),
        })
    }

    /// The device's attributes, asked for once.
    pub(crate) fn attributes(&self) -> Result<&DeviceAttributes, Error> {
        if let Some(attributes) = self.attributes.get() {
            return Ok(attributes);
        }
        let attributes = DeviceAttributes::query(self)?;
        Ok(self.attributes.get_or_init(|| attributes))
    }

    pub(crate) fn require_global_atomics(&self) -> Result<(), Error> {
        if self.attributes()?.atomic_capability == AtomicCapability::Global {
            return Ok(());
        }
        Err(Error::Unsupported {
            verb: "atomic operations of the CPU on shared memory (atomic_cap is not GLOB)",
        })
    }
}

impl Drop for ContextInner {
    fn drop(&mut self) {
        // SAFETY: opened by `Device::open`, closed once; everything made in it holds an Arc (S-1).
        let code = unsafe { (self.verbs.ibv_close_device)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_close_device", code) {
            leak(&error);
        }
    }
}

impl std::fmt::Debug for ContextInner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("device", &self.name).finish_non_exhaustive()
    }
}

/// An open device (`man ibv_open_device`). Cloning gives another handle to the same; it closes after
/// everything made in it is gone.
#[derive(Debug, Clone)]
pub struct Context {
    pub(crate) inner: Arc<ContextInner>,
}

impl Context {
    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What the device can do (`man ibv_query_device`), asked for once per context.
    ///
    /// # Errors
    ///
    /// What `ibv_query_device` says.
    pub fn attributes(&self) -> Result<&DeviceAttributes, Error> {
        self.inner.attributes()
    }

    /// The number of completion vectors (interrupts) that completion queues can choose from.
    #[must_use]
    pub fn completion_vectors(&self) -> u32 {
        // SAFETY: live (S-1).
        u32::try_from(unsafe { self.inner.ptr.as_ref() }.num_comp_vectors).unwrap_or(1)
    }

    /// The device's clock now (`man ibv_query_rt_values_ex`): ticks of [`clock_khz`](DeviceAttributes::clock_khz), by which
    /// completions are stamped that are asked for [`CompletionClock::Device`](crate::CompletionClock::Device).
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the provider has no clock to read, and what the verb says.
    pub fn clock(&self) -> Result<u64, Error> {
        const VERB: &str = "ibv_query_rt_values_ex";
        let mut values =
            ibv_values_ex { comp_mask: ibv_values_mask::IBV_VALUES_MASK_RAW_CLOCK.0, ..Default::default() };
        // SAFETY: the context is live (S-1), the output valid for writes.
        let code = unsafe { inline::ibv_query_rt_values_ex(self.inner.ptr.as_ptr(), &raw mut values) };
        Error::check(VERB, code)?;
        if values.comp_mask & ibv_values_mask::IBV_VALUES_MASK_RAW_CLOCK.0 == 0 {
            return Err(Error::Unsupported { verb: VERB });
        }
        let (seconds, rest) = (values.raw_clock.tv_sec, values.raw_clock.tv_nsec);
        Ok(seconds.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(rest.cast_unsigned()))
    }

    /// Allocates a protection domain.
    ///
    /// # Errors
    ///
    /// What `ibv_alloc_pd` says.
    pub fn protection_domain(&self) -> Result<ProtectionDomain, Error> {
        ProtectionDomain::new(&self.inner)
    }

    /// Creates a completion channel.
    ///
    /// # Errors
    ///
    /// What `ibv_create_comp_channel` says.
    pub fn completion_channel(&self) -> Result<CompletionChannel, Error> {
        CompletionChannel::new(&self.inner)
    }

    /// Starts a completion queue that holds at least `depth` completions.
    pub fn completion_queue(&self, depth: u32) -> CompletionQueueBuilder<'_> {
        CompletionQueueBuilder::new(&self.inner, depth)
    }
}
