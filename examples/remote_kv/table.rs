//! The table in the server's memory, that clients read without asking the server.
//!
//! Slots of one size; a key is in one of a few slots from the one that its hash names. An RDMA READ is not atomic: it may see a
//! slot half changed. So a slot carries a version, odd while the server changes it, and a checksum over version, key and
//! value; a reader that finds them wrong reads again. (Nothing is ever removed, so that an empty slot ends a search.)

use rdma_core::{Error, SharedRegion};

/// Bytes of a slot.
pub(crate) const SLOT: usize = 256;
/// Version, checksum, lengths of key and value.
const HEADER: usize = 8 + 4 + 2 + 2;
/// Slots that a key may be in.
pub(crate) const PROBES: u64 = 16;
/// The longest key and value, together.
pub(crate) const MAX_ENTRY: usize = SLOT - HEADER;

/// What a reader finds in a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Slot<'a> {
    /// No key was ever here.
    Empty,
    /// It was changed while it was read.
    Torn,
    /// A key and its value.
    Entry { version: u64, key: &'a [u8], value: &'a [u8] },
}

/// Where the search for `key` begins, and where it goes on, in a table of `slots`.
pub(crate) fn places(key: &[u8], slots: u64) -> impl Iterator<Item = u64> {
    // FNV-1a: both sides must agree, whatever machine or version they are.
    let hash = key.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (0..PROBES.min(slots)).map(move |probe| (hash % slots + probe) % slots)
}

/// Reads a slot as it was copied from the server's memory.
pub(crate) fn parse(slot: &[u8; SLOT]) -> Slot<'_> {
    let (head, entry) = slot.split_at(HEADER);
    let number = |from: usize, to: usize| {
        head[from..to].iter().rev().fold(0_u64, |number, &byte| number << 8 | u64::from(byte))
    };
    let (version, sum) = (number(0, 8), number(8, 12));
    let lengths = (usize::try_from(number(12, 14)), usize::try_from(number(14, 16)));
    if version == 0 {
        return Slot::Empty;
    }
    let (Ok(key), Ok(value)) = lengths else { return Slot::Torn };
    if version % 2 == 1 || key + value > MAX_ENTRY {
        return Slot::Torn;
    }
    let (key, rest) = entry.split_at(key);
    let value = &rest[..value];
    if sum != u64::from(checksum(version, key, value)) {
        return Slot::Torn;
    }
    Slot::Entry { version, key, value }
}

/// A slot's bytes.
fn emit(version: u64, key: &[u8], value: &[u8]) -> Option<Vec<u8>> {
    let mut slot = Vec::with_capacity(SLOT);
    slot.extend_from_slice(&version.to_le_bytes());
    slot.extend_from_slice(&checksum(version, key, value).to_le_bytes());
    slot.extend_from_slice(&u16::try_from(key.len()).ok()?.to_le_bytes());
    slot.extend_from_slice(&u16::try_from(value.len()).ok()?.to_le_bytes());
    slot.extend_from_slice(key);
    slot.extend_from_slice(value);
    (slot.len() <= SLOT).then_some(slot)
}

fn checksum(version: u64, key: &[u8], value: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&version.to_le_bytes());
    // Where the key ends.
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.finalize()
}

/// The server's side of the table: the only one that changes it.
#[derive(Debug)]
pub(crate) struct Table {
    region: SharedRegion,
    slots: u64,
    /// Keys in it.
    pub(crate) keys: u64,
}

/// Why a value could not be stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PutError {
    #[error("the slots that the key may be in are taken")]
    Full,
    #[error("a key of at least 1 byte and its value have at most {MAX_ENTRY} bytes together")]
    TooLong,
    #[error(transparent)]
    Memory(#[from] Error),
}

impl Table {
    /// An empty table in zeroed memory.
    pub(crate) fn new(region: SharedRegion) -> Table {
        let slots = (region.len() / SLOT) as u64;
        Table { region, slots, keys: 0 }
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> u64 {
        self.slots
    }

    /// Stores `value`, in the place of the key's former one if there is one.
    pub(crate) fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), PutError> {
        if key.is_empty() || key.len() + value.len() > MAX_ENTRY {
            return Err(PutError::TooLong);
        }
        for place in places(key, self.slots) {
            let Ok(place) = usize::try_from(place) else { continue };
            let offset = place * SLOT;
            let mut bytes = [0; SLOT];
            self.region.copy_out(offset, &mut bytes)?;
            let version = match parse(&bytes) {
                Slot::Empty => {
                    self.keys += 1;
                    0
                }
                Slot::Entry { version, key: found, .. } if found == key => version,
                Slot::Entry { .. } => continue,
                Slot::Torn => unreachable!("nobody else changes the table"),
            };
            let slot = emit(version + 2, key, value).ok_or(PutError::TooLong)?;
            // Who reads from here on sees an odd version, or a checksum that does not fit, until the last store.
            self.region.store(offset, (version + 1).to_le())?;
            self.region.copy_in(offset + 8, &slot[8..])?;
            self.region.store(offset, (version + 2).to_le())?;
            return Ok(());
        }
        Err(PutError::Full)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn slot(version: u64, key: &[u8], value: &[u8]) -> [u8; SLOT] {
        let mut bytes = emit(version, key, value).unwrap();
        bytes.resize(SLOT, 0xee);
        bytes.try_into().unwrap()
    }

    #[test]
    fn a_slot_reads_as_it_was_written() {
        for (key, value) in [(&b"k"[..], &b""[..]), (b"key", b"value"), (b"", &[7; MAX_ENTRY])] {
            assert_eq!(parse(&slot(4, key, value)), Slot::Entry { version: 4, key, value });
        }
        assert_eq!(parse(&[0; SLOT]), Slot::Empty);
        assert!(emit(2, b"k", &[0; MAX_ENTRY]).is_none());
    }

    #[test]
    fn any_mixture_of_two_states_is_torn() {
        let (old, new) = (slot(2, b"key", &[1; 100]), slot(4, b"key", &[2; 100]));
        // What a reader may see: words of 8 bytes of either state.
        for cut in (8..16 + 103).step_by(8) {
            for (first, second) in [(&old, &new), (&new, &old)] {
                let mut mixed = *first;
                mixed[cut..].copy_from_slice(&second[cut..]);
                assert_eq!(parse(&mixed), Slot::Torn, "cut at {cut}");
            }
        }
        assert_eq!(parse(&slot(3, b"key", b"being changed")), Slot::Torn);
    }

    #[test]
    fn any_bytes_are_read_without_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..10_000 {
            let mut bytes = [0; SLOT];
            random.fill(&mut bytes);
            assert_eq!(parse(&bytes), Slot::Torn);
        }
    }

    #[test]
    fn places_are_inside_and_different() {
        for slots in [1, 5, PROBES, 1000] {
            let places: std::collections::HashSet<_> = places(b"some key", slots).collect();
            assert_eq!(places.len() as u64, PROBES.min(slots));
            assert!(places.iter().all(|&place| place < slots));
        }
    }
}
