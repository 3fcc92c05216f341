//! Buffers of several sizes.

use rdma_core::{Buffer, Error};

use crate::pool::BufferPool;

/// Pools of several buffer sizes, from which a message takes the smallest that it fits into. Made by
/// [`Domain::buffer_pools`](crate::Domain::buffer_pools); clones are the same pools.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), rdma_core::Error> {
/// let domain = rdma_async::Domain::open(None)?;
/// let pools = domain.buffer_pools(&[(64, 256), (8, 64 << 10)])?;
/// assert_eq!(pools.acquire(200).await.map(|buffer| (buffer.len(), buffer.capacity())), Some((200, 256)));
/// assert_eq!(pools.acquire(300).await.map(|buffer| (buffer.len(), buffer.capacity())), Some((300, 64 << 10)));
/// assert!(pools.acquire(1 << 20).await.is_none());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct BufferPools {
    /// By size.
    classes: Vec<BufferPool>,
}

impl BufferPools {
    /// Makes a pool of each pair of a number of buffers and their size.
    pub(crate) fn new(
        classes: &[(usize, usize)],
        pool: impl Fn(usize, usize) -> Result<BufferPool, Error>,
    ) -> Result<BufferPools, Error> {
        let classes = classes.iter().map(|&(count, size)| pool(count, size));
        let mut classes: Vec<_> = classes.collect::<Result<_, _>>()?;
        classes.sort_by_key(BufferPool::buffer_size);
        Ok(BufferPools { classes })
    }

    /// A buffer that shows `length` bytes: of the smallest size that has one idle. `None` when none has, or no size is large enough.
    #[must_use]
    pub fn try_acquire(&self, length: usize) -> Option<Buffer> {
        let mut buffer = self.fitting(length).find_map(BufferPool::try_acquire)?;
        buffer.set_len(length);
        Some(buffer)
    }

    /// As [`try_acquire`](BufferPools::try_acquire), but waits for one of the smallest size that fits when no size has one idle. `None`
    /// when no size is large enough.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a dropped call leaves every buffer in its pool.
    pub async fn acquire(&self, length: usize) -> Option<Buffer> {
        if let Some(buffer) = self.try_acquire(length) {
            return Some(buffer);
        }
        let mut buffer = self.fitting(length).next()?.acquire().await;
        buffer.set_len(length);
        Some(buffer)
    }

    /// The pools, by size.
    #[must_use]
    pub fn classes(&self) -> &[BufferPool] {
        &self.classes
    }

    fn fitting(&self, length: usize) -> impl Iterator<Item = &BufferPool> {
        self.classes.iter().filter(move |pool| pool.buffer_size() >= length)
    }
}
