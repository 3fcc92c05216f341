//! What went wrong first.

use std::sync::atomic::{AtomicU64, Ordering};

use verbs_sys::{ibv_wc, ibv_wc_status};

/// The first error of a queue pair, which explains the flushes behind it.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// 0, or 1 << 63 | vendor error << 31 | status.
    first: AtomicU64,
}

impl Health {
    #[cold]
    pub(crate) fn note(&self, wc: &ibv_wc) {
        if wc.status != ibv_wc_status::IBV_WC_WR_FLUSH_ERR {
            let value = 1 << 63 | u64::from(wc.vendor_err) << 31 | u64::from(wc.status.0 & 0x7fff_ffff);
            let _ = self.first.compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Status and vendor error of the first completion that failed by itself.
    #[allow(clippy::cast_possible_truncation, reason = "the parts are masked")]
    pub(crate) fn first(&self) -> Option<(ibv_wc_status, u32)> {
        match self.first.load(Ordering::Relaxed) {
            0 => None,
            value => Some((ibv_wc_status(value as u32 & 0x7fff_ffff), (value >> 31) as u32)),
        }
    }

    pub(crate) fn clear(&self) {
        self.first.store(0, Ordering::Relaxed);
    }
}
