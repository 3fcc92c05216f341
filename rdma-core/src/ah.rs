//! Addresses: of a path, of a UD peer.

use std::ptr::NonNull;
use std::sync::Arc;

use verbs_sys::{ibv_ah, ibv_ah_attr, ibv_global_route, ibv_grh, ibv_pd};

use crate::context::Context;
use crate::cq::Success;
use crate::inflight::{Keep, Kept};
use crate::pd::{PdInner, ProtectionDomain};
use crate::port::Gid;
use crate::{Error, leak};

/// The route part of an address (the Global Routing Header; IBTA vol. 1, 8.3). Always there on RoCE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GlobalRoute {
    /// Destination.
    pub gid: Gid,
    /// Index of the own GID to send from.
    pub source_index: u8,
    /// Hop limit (IPv4 TTL).
    pub hop_limit: u8,
    /// Traffic class (DSCP and ECN).
    pub traffic_class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
}

impl GlobalRoute {
    /// To `gid` from the own GID at `source_index`, with a hop limit of 64.
    #[must_use]
    pub fn new(gid: Gid, source_index: u8) -> GlobalRoute {
        GlobalRoute { gid, source_index, hop_limit: 64, traffic_class: 0, flow_label: 0 }
    }
}

/// A path to a destination (`struct ibv_ah_attr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressVector {
    /// Own port.
    pub port: u8,
    /// The route; `None` on InfiniBand within a subnet.
    pub route: Option<GlobalRoute>,
    /// Destination LID; 0 on RoCE.
    pub lid: u16,
    /// Service level (on RoCE: the priority).
    pub service_level: u8,
    /// Low bits of the own LID to use.
    pub source_path_bits: u8,
    /// Static rate (`enum ibv_rate`); 0 for the port's.
    pub static_rate: u8,
}

impl AddressVector {
    /// A path over RoCE from `port`.
    #[must_use]
    pub fn global(port: u8, route: GlobalRoute) -> AddressVector {
        AddressVector {
            port,
            route: Some(route),
            lid: 0,
            service_level: 0,
            source_path_bits: 0,
            static_rate: 0,
        }
    }

    /// A path to a LID of the same InfiniBand subnet.
    #[must_use]
    pub fn local(port: u8, lid: u16) -> AddressVector {
        AddressVector { port, route: None, lid, service_level: 0, source_path_bits: 0, static_rate: 0 }
    }

    /// The way back to the sender of a datagram that was received on `port` of `context` (`man ibv_init_ah_from_wc`).
    /// `received` is what the receive's buffer shows: it starts with the Global Routing Header, if the
    /// completion [has one](Success::has_grh).
    ///
    /// ```
    /// # use rdma_core::{AddressVector, Completion, Error, ProtectionDomain, WorkRequest, Payload, QueuePair};
    /// # use rdma_core::qp::{state::Rts, transport::Ud};
    /// # fn f(pd: &ProtectionDomain, qp: &QueuePair<Ud, Rts>, mut completion: Completion<'_>, qkey: u32) -> Result<(), Error> {
    /// let datagram = completion.take_buffer();
    /// if let (Some(datagram), Ok(success)) = (datagram, completion.result()) {
    ///     let sender = AddressVector::of_sender(&pd.context(), 1, &success, &datagram)?;
    ///     let sender = pd.address_handle(&sender)?;
    ///     qp.post_send(WorkRequest::send_to(datagram, &sender, success.src_qp(), qkey))?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] when `received` has less than a header, [`Error::Unsupported`] with a libibverbs that is too old,
    /// and what `ibv_init_ah_from_wc` says.
    pub fn of_sender(
        context: &Context,
        port: u8,
        completion: &Success<'_>,
        received: &[u8],
    ) -> Result<AddressVector, Error> {
        const VERB: &str = "ibv_init_ah_from_wc";
        let init = context.inner.verbs.ibv_init_ah_from_wc.ok_or(Error::Unsupported { verb: VERB })?;
        // SAFETY: integers and a union of them: all zeroes are a value.
        let mut header: ibv_grh = unsafe { std::mem::zeroed() };
        if completion.has_grh() {
            let len = size_of::<ibv_grh>();
            let bytes =
                received.get(..len).ok_or(Error::OutOfBounds { offset: 0, len, of: received.len() })?;
            // SAFETY: `len` bytes each, of integers, and `header` is ours.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut header).cast(), len) };
        }
        let mut wc = *completion.raw();
        let mut raw = AddressVector::local(port, 0).raw();
        // SAFETY: the context is live (S-1), completion and header are valid for reads, the output for writes.
        let code =
            unsafe { init(context.inner.ptr.as_ptr(), port, &raw mut wc, &raw mut header, &raw mut raw) };
        Error::check(VERB, code)?;
        Ok(AddressVector::from_raw(&raw))
    }

    pub(crate) fn raw(&self) -> ibv_ah_attr {
        // SAFETY: integers and a union of them: all zeroes are a value.
        let mut raw: ibv_ah_attr = unsafe { std::mem::zeroed() };
        raw.dlid = self.lid;
        raw.sl = self.service_level;
        raw.src_path_bits = self.source_path_bits;
        raw.static_rate = self.static_rate;
        raw.port_num = self.port;
        if let Some(route) = self.route {
            raw.is_global = 1;
            raw.grh = ibv_global_route {
                dgid: route.gid.raw(),
                flow_label: route.flow_label,
                sgid_index: route.source_index,
                hop_limit: route.hop_limit,
                traffic_class: route.traffic_class,
            };
        }
        raw
    }

    pub(crate) fn from_raw(raw: &ibv_ah_attr) -> AddressVector {
        AddressVector {
            port: raw.port_num,
            route: (raw.is_global != 0).then(|| GlobalRoute {
                gid: Gid::from_raw(raw.grh.dgid),
                source_index: raw.grh.sgid_index,
                hop_limit: raw.grh.hop_limit,
                traffic_class: raw.grh.traffic_class,
                flow_label: raw.grh.flow_label,
            }),
            lid: raw.dlid,
            service_level: raw.sl,
            source_path_bits: raw.src_path_bits,
            static_rate: raw.static_rate,
        }
    }
}

/// A live address handle.
#[derive(Debug)]
pub(crate) struct AhInner {
    pub(crate) ptr: NonNull<ibv_ah>,
    pub(crate) pd: Arc<PdInner>,
}

// SAFETY: verbs are thread-safe (S-6), the pointer lives until `drop` (S-1).
unsafe impl Send for AhInner {}
// SAFETY: as above.
unsafe impl Sync for AhInner {}

impl Drop for AhInner {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; work requests that use it hold an Arc (S-2).
        let code = unsafe { (self.pd.context.verbs.ibv_destroy_ah)(self.ptr.as_ptr()) };
        if let Err(error) = Error::check("ibv_destroy_ah", code) {
            leak(&error);
            std::mem::forget(Arc::clone(&self.pd));
        }
    }
}

/// An address handle: where a UD message goes (`man ibv_create_ah`). Posted sends keep it alive.
#[derive(Debug, Clone)]
pub struct AddressHandle {
    pub(crate) ptr: NonNull<ibv_ah>,
    pub(crate) pd: NonNull<ibv_pd>,
    pub(crate) keep: Keep,
}

// SAFETY: the pointers are used only while `keep` keeps their objects alive; verbs are thread-safe (S-6).
unsafe impl Send for AddressHandle {}
// SAFETY: as above.
unsafe impl Sync for AddressHandle {}

impl ProtectionDomain {
    /// Creates an address handle.
    ///
    /// # Errors
    ///
    /// What `ibv_create_ah` says.
    pub fn address_handle(&self, address: &AddressVector) -> Result<AddressHandle, Error> {
        let mut raw = address.raw();
        // SAFETY: the domain is live (S-1), the attributes are complete.
        let ptr = unsafe { (self.inner.context.verbs.ibv_create_ah)(self.inner.ptr.as_ptr(), &raw mut raw) };
        let ptr = NonNull::new(ptr).ok_or_else(|| Error::last("ibv_create_ah"))?;
        let kept = Kept::Address(AhInner { ptr, pd: Arc::clone(&self.inner) });
        Ok(AddressHandle { ptr, pd: self.inner.ptr, keep: Keep(Arc::new(kept)) })
    }
}
