//! What a slot keeps alive.

use std::sync::Arc;

use bytes::Bytes;

use crate::ah::AhInner;
use crate::mr::{Buffer, RegionRef, Sge, SharedSlice};
use crate::mw::WindowInner;

/// Memory of one entry of a scatter/gather list.
#[derive(Debug)]
pub(crate) enum Held {
    Buffer(Buffer),
    Shared(SharedSlice),
    /// Immutable bytes inside a registered region, in a box: rarer than the others, and larger.
    Bytes(Box<(Bytes, RegionRef)>),
}

impl Held {
    #[inline]
    pub(crate) fn sge(&self) -> Sge {
        match self {
            Held::Buffer(buffer) => buffer.sge(),
            Held::Shared(slice) => slice.sge(),
            Held::Bytes(parts) => {
                let (bytes, region) = &**parts;
                Sge { addr: bytes.as_ptr().addr() as u64, len: bytes.len(), lkey: region.inner.lkey }
            }
        }
    }
}

/// What else must live until the completion.
#[derive(Debug)]
#[allow(dead_code, reason = "held for its Drop")]
pub(crate) enum Keep {
    Address(Arc<AhInner>),
    Window(Arc<WindowInner>),
}
