//! Numbers that nobody can guess, for keys and queue pair numbers.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// 32 bits from the operating system.
pub(crate) fn u32() -> u32 {
    getrandom::u32().unwrap_or_else(|_| {
        // A kernel without getrandom and a system without /dev/urandom: std's per-process seed is
        // what remains, hashed with a clock so that no two calls agree.
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u128(std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos()));
        let [a, b, c, d, ..] = hasher.finish().to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    })
}
