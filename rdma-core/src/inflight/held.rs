//! What a slot keeps alive.

use std::sync::Arc;

use bytes::Bytes;
use verbs_sys::ibv_sge;

use crate::ah::AhInner;
use crate::mr::{Buffer, RegionRef, SharedRegion, SharedSlice};
use crate::mw::WindowInner;

/// Memory of one entry of a scatter/gather list.
#[derive(Debug)]
pub(crate) enum Held {
    Buffer(Buffer),
    Shared(SharedSlice),
    /// Immutable bytes inside a registered region, in a box: rarer than the others, and larger.
    Bytes(Box<(Bytes, RegionRef)>),
}

/// The entries of a scatter/gather list: of nearly all work requests, one.
#[derive(Debug, Default)]
pub(crate) struct HeldList {
    pub(crate) first: Option<Held>,
    pub(crate) rest: Vec<Held>,
}

impl HeldList {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none() && self.rest.is_empty()
    }
}

impl IntoIterator for HeldList {
    type Item = Held;
    type IntoIter = std::iter::Chain<std::option::IntoIter<Held>, std::vec::IntoIter<Held>>;

    #[inline]
    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.rest)
    }
}

impl Held {
    #[inline]
    pub(crate) fn sge(&self) -> ibv_sge {
        match self {
            Held::Buffer(buffer) => buffer.sge(),
            Held::Shared(slice) => slice.sge(),
            Held::Bytes(parts) => {
                let (bytes, region) = &**parts;
                // `Payload::bytes` checked the length.
                let length = u32::try_from(bytes.len()).unwrap_or(0);
                ibv_sge { addr: bytes.as_ptr().addr() as u64, length, lkey: region.inner.lkey }
            }
        }
    }
}

/// What else must live until the completion: one pointer, so that a slot is a cache line.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "held for its Drop")]
pub(crate) struct Keep(pub(crate) Arc<Kept>);

/// An object that work requests use.
#[derive(Debug)]
#[allow(dead_code, reason = "held for its Drop")]
pub(crate) enum Kept {
    Address(AhInner),
    /// A window being bound, and the region it is bound to.
    Window(Arc<WindowInner>, SharedRegion),
}
