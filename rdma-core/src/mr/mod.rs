//! Memory: who owns it, who may touch it, and when.
//!
//! | type | who touches the bytes |
//! |---|---|
//! | [`Memory`] | nobody yet: it is to be registered |
//! | [`MemoryRegion`], [`Buffer`] | this process, or the device while posted; never a peer |
//! | [`SharedRegion`], [`SharedSlice`] | peers at any time, this process by copies and atomics |
//! | [`RemoteSlice`] | names a peer's memory; plain data |

mod access;
mod buffer;
mod memory;
mod region;
mod remote;
mod shared;

pub use access::{RegionFlags, RemoteAccess};
pub(crate) use buffer::RawBuffer;
pub use buffer::{Buffer, BufferHome, IdleBuffer};
pub use memory::{HUGE_PAGE, Memory};
pub(crate) use region::RegionInner;
pub use region::{MemoryRegion, RegionRef};
pub use remote::RemoteSlice;
pub use shared::{SharedRegion, SharedSlice};
