//! A table whose keys cannot be guessed: the low bits of a key choose the slot, all bits are random.
//!
//! Lookup is an index and a comparison, no hashing. Slots are chosen at random among the free ones,
//! so that neither the number of entries nor their order shows in a key, and the key of a removed
//! entry is not soon given to another (predictable keys were a fix in the kernel's Soft-RoCE).

use super::random;

/// Entries under keys of `BITS` bits.
#[derive(Debug)]
pub(crate) struct Slab<T, const BITS: u32> {
    /// A power of two, at most half full before it grows.
    slots: Vec<Option<(u32, T)>>,
    len: usize,
    limit: usize,
}

/// The table holds as many entries as its limit allows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl<T, const BITS: u32> Slab<T, BITS> {
    const FIRST_SLOTS: usize = 16;

    /// At most `limit` entries, which must leave half of the keys free.
    pub(crate) fn new(limit: usize) -> Self {
        debug_assert!(limit.next_power_of_two() < 1 << BITS);
        Slab { slots: (0..Self::FIRST_SLOTS).map(|_| None).collect(), len: 0, limit }
    }

    fn slot(&self, key: u32) -> usize {
        key as usize & (self.slots.len() - 1)
    }

    pub(crate) fn get(&self, key: u32) -> Option<&T> {
        match &self.slots[self.slot(key)] {
            Some((k, value)) if *k == key => Some(value),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        let slot = self.slot(key);
        match &mut self.slots[slot] {
            Some((k, value)) if *k == key => Some(value),
            _ => None,
        }
    }

    /// All entries, in no order.
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|(_, value)| value)
    }

    /// All entries to change, in no order.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().flatten().map(|(_, value)| value)
    }

    /// Adds what `make` builds for a new key that `allowed` accepts.
    pub(crate) fn insert_with(
        &mut self,
        allowed: impl Fn(u32) -> bool,
        make: impl FnOnce(u32) -> T,
    ) -> Result<u32, Full> {
        if self.len >= self.limit {
            return Err(Full);
        }
        if self.len * 2 >= self.slots.len() {
            self.grow();
        }
        // At least half of the slots are free: a try succeeds every second time.
        let key = loop {
            let key = random::u32() & (u32::MAX >> (32 - BITS));
            if self.slots[self.slot(key)].is_none() && allowed(key) {
                break key;
            }
        };
        let slot = self.slot(key);
        self.slots[slot] = Some((key, make(key)));
        self.len += 1;
        Ok(key)
    }

    pub(crate) fn remove(&mut self, key: u32) -> Option<T> {
        self.get(key)?;
        let slot = self.slot(key);
        self.len -= 1;
        self.slots[slot].take().map(|(_, value)| value)
    }

    /// Keys that differed in the low bits still do with one bit more.
    fn grow(&mut self) {
        let doubled = (0..self.slots.len() * 2).map(|_| None).collect();
        for entry in std::mem::replace(&mut self.slots, doubled).into_iter().flatten() {
            let slot = self.slot(entry.0);
            self.slots[slot] = Some(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_is_found_until_removed() {
        let mut slab = Slab::<u32, 24>::new(10_000);
        let keys: Vec<u32> =
            (0..10_000).map(|_| slab.insert_with(|k| k > 1, |key| key ^ 0x55).unwrap()).collect();
        assert_eq!(slab.insert_with(|_| true, |_| 0), Err(Full));
        for key in &keys {
            assert!(*key > 1 && *key < 1 << 24);
            assert_eq!(slab.get(*key), Some(&(key ^ 0x55)));
        }
        for key in &keys {
            assert_eq!(slab.remove(*key), Some(key ^ 0x55));
            assert_eq!(slab.get(*key), None);
            assert_eq!(slab.remove(*key), None);
        }
        assert_eq!(slab.len, 0);
    }

    #[test]
    fn keys_do_not_count_up() {
        let mut slab = Slab::<(), 24>::new(1000);
        let keys: Vec<u32> = (0..1000).map(|_| slab.insert_with(|_| true, |_| ()).unwrap()).collect();
        let near = keys.windows(2).filter(|w| w[0].abs_diff(w[1]) < 256).count();
        // Chance makes 0.03 of them; counting up would make 999.
        assert!(near < 20, "{near} of 999 neighbours are close");
    }
}
