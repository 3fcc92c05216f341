//! Memory regions and windows: keys, protection domains, bounds and rights.
//!
//! One lock guards the table, and every copy happens under its read side: when a deregistration
//! returns, no thread touches the memory any more. It is sharded: each reader locks a cache line of its own.

use std::collections::BTreeSet;
use std::sync::PoisonError;

use bitflags::bitflags;
use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};

use super::memory::{Fault, RawMemory};
use super::random;
use super::slab::{Full, Slab};
use crate::proto::{AtomicOp, BindRequest, LocalError, RemoteAccess, RemoteError, Sge};
use crate::wire::Qpn;

bitflags! {
    /// Rights of a region or window; the bits of `enum ibv_access_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Access: u32 {
        const LOCAL_WRITE = 1;
        const REMOTE_WRITE = 1 << 1;
        const REMOTE_READ = 1 << 2;
        const REMOTE_ATOMIC = 1 << 3;
        const MW_BIND = 1 << 4;
        const ZERO_BASED = 1 << 5;
        const ON_DEMAND = 1 << 6;
        const HUGETLB = 1 << 7;
        const FLUSH_GLOBAL = 1 << 8;
        const FLUSH_PERSISTENT = 1 << 9;
        /// `IBV_ACCESS_OPTIONAL_RANGE`: what a device may ignore, relaxed ordering first.
        const OPTIONAL = 0x3ff0_0000;
    }
}

impl Access {
    /// With any of these the device writes to the memory.
    pub(crate) const CHANGES: Access = Access::LOCAL_WRITE.union(Access::REMOTE_CHANGES);
    const REMOTE_CHANGES: Access = Access::REMOTE_WRITE.union(Access::REMOTE_ATOMIC);

    fn of(remote: RemoteAccess) -> Access {
        match remote {
            RemoteAccess::Read => Access::REMOTE_READ,
            RemoteAccess::Write => Access::REMOTE_WRITE,
            RemoteAccess::Atomic => Access::REMOTE_ATOMIC,
        }
    }
}

/// A memory region: a range of memory under a protection domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region {
    pub(crate) pd: u32,
    /// The address that peers and work requests use for the first byte.
    pub(crate) start: u64,
    pub(crate) memory: RawMemory,
    pub(crate) access: Access,
}

impl Region {
    fn part(&self, va: u64, len: usize) -> Option<RawMemory> {
        let offset = usize::try_from(va.checked_sub(self.start)?).ok()?;
        self.memory.part(offset, len)
    }
}

/// How a window is bound (clause 10.6.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WindowType {
    /// By `ibv_bind_mw`; any queue pair of the protection domain.
    One,
    /// By a work request with a key the program chose; one queue pair (type 2B).
    Two,
}

#[derive(Debug)]
struct Window {
    pd: u32,
    kind: WindowType,
    bound: Option<Binding>,
}

#[derive(Debug)]
struct Binding {
    /// Slab key of the region below.
    region: u32,
    /// The part that is open, with the window's rights.
    part: Region,
    /// The only queue pair it is open for, with type 2.
    qp: Option<Qpn>,
}

#[derive(Debug)]
enum Object {
    Region { region: Region, windows: u32 },
    Window(Window),
}

#[derive(Debug)]
struct Entry {
    /// The low eight bits of the key; those of a window change with each bind.
    tag: u8,
    object: Object,
}

/// Who accesses: the queue pair and its protection domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Accessor {
    pub(crate) pd: u32,
    pub(crate) qp: Qpn,
}

/// Why an object could not be removed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RemoveError {
    Unknown,
    /// Windows are bound to the region.
    Bound,
}

/// No queue pair has this protection domain.
const NO_DOMAIN: u32 = 0;

/// All regions and windows of a device.
#[derive(Debug)]
pub(crate) struct MemoryTable(ShardedLock<Table>);

type Table = Slab<Entry, 24>;

/// As many regions and windows together.
pub(crate) const MAX_KEYS: usize = 1 << 20;

fn split(key: u32) -> (u32, u8) {
    let [.., tag] = key.to_be_bytes();
    (key >> 8, tag)
}

fn entry(table: &Table, key: u32) -> Option<&Entry> {
    let (slot, tag) = split(key);
    table.get(slot).filter(|e| e.tag == tag)
}

impl MemoryTable {
    pub(crate) fn new() -> Self {
        MemoryTable(ShardedLock::new(Slab::new(MAX_KEYS)))
    }

    fn read(&self) -> ShardedLockReadGuard<'_, Table> {
        // A panic cannot leave the table half changed: each change is one assignment.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> ShardedLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, object: Object) -> Result<u32, Full> {
        let [tag, ..] = random::u32().to_ne_bytes();
        // Key 0 marks "no key" in many programs.
        let slot = self.write().insert_with(|k| k != 0, |_| Entry { tag, object })?;
        Ok(slot << 8 | u32::from(tag))
    }

    /// The new region's key, local and remote.
    pub(crate) fn add_region(&self, region: Region) -> Result<u32, Full> {
        self.add(Object::Region { region, windows: 0 })
    }

    /// The new window's first key, which nothing is bound to.
    pub(crate) fn add_window(&self, pd: u32, kind: WindowType) -> Result<u32, Full> {
        self.add(Object::Window(Window { pd, kind, bound: None }))
    }

    /// A region as it is.
    pub(crate) fn region(&self, key: u32) -> Option<Region> {
        match self.read().get(split(key).0)?.object {
            Object::Region { region, .. } => Some(region),
            Object::Window(_) => None,
        }
    }

    /// Replaces a region that no window is bound to; its key stays.
    pub(crate) fn change_region(&self, key: u32, new: Region) -> Result<(), RemoveError> {
        let mut table = self.write();
        match table.get_mut(split(key).0) {
            Some(Entry { object: Object::Region { windows: 1.., .. }, .. }) => Err(RemoveError::Bound),
            Some(Entry { object: Object::Region { region, .. }, .. }) => {
                *region = new;
                Ok(())
            }
            _ => Err(RemoveError::Unknown),
        }
    }

    pub(crate) fn remove_region(&self, key: u32) -> Result<(), RemoveError> {
        let mut table = self.write();
        match table.get(split(key).0) {
            Some(Entry { object: Object::Region { windows: 0, .. }, .. }) => {
                table.remove(split(key).0);
                Ok(())
            }
            Some(Entry { object: Object::Region { .. }, .. }) => Err(RemoveError::Bound),
            _ => Err(RemoveError::Unknown),
        }
    }

    /// Removes a window, bound or not, whatever its current tag.
    pub(crate) fn remove_window(&self, key: u32) -> Result<(), RemoveError> {
        let mut table = self.write();
        let slot = split(key).0;
        match table.get_mut(slot) {
            Some(Entry { object: Object::Window(window), .. }) => {
                let bound = window.bound.take();
                release(&mut table, bound);
                table.remove(slot);
                Ok(())
            }
            _ => Err(RemoveError::Unknown),
        }
    }

    /// What belongs to these protection domains is accessible to nobody from now on. Its keys stay taken until it is
    /// removed.
    pub(crate) fn withdraw(&self, domains: &BTreeSet<u32>) {
        for entry in self.write().values_mut() {
            // A window and the region that it is bound to are of one domain.
            match &mut entry.object {
                Object::Region { region, windows } if domains.contains(&region.pd) => {
                    (region.pd, *windows) = (NO_DOMAIN, 0);
                }
                Object::Window(window) if domains.contains(&window.pd) => {
                    (window.pd, window.bound) = (NO_DOMAIN, None);
                }
                _ => {}
            }
        }
    }

    /// Whether an element lies in a region of the domain, writable if asked.
    pub(crate) fn covers(&self, pd: u32, sge: &Sge, write: bool) -> bool {
        let need = if write { Access::LOCAL_WRITE } else { Access::empty() };
        local(&self.read(), pd, sge, 0, sge.length as usize, need).is_ok()
    }

    /// Copies from a gather list, all of `out` or nothing that counts.
    pub(crate) fn gather(
        &self,
        pd: u32,
        sges: &[Sge],
        offset: u32,
        out: &mut [u8],
    ) -> Result<(), LocalError> {
        let table = self.read();
        let mut rest = out;
        walk(sges, offset, rest.len(), |sge, skip, len| {
            let part = local(&table, pd, sge, skip, len, Access::empty())?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            part.read(now).map_err(|Fault| LocalError)?;
            rest = later;
            Ok(())
        })
    }

    /// Copies to a scatter list.
    pub(crate) fn scatter(&self, pd: u32, sges: &[Sge], offset: u32, data: &[u8]) -> Result<(), LocalError> {
        let table = self.read();
        let mut rest = data;
        walk(sges, offset, rest.len(), |sge, skip, len| {
            let part = local(&table, pd, sge, skip, len, Access::LOCAL_WRITE)?;
            let (now, later) = rest.split_at(len);
            part.write(now).map_err(|Fault| LocalError)?;
            rest = later;
            Ok(())
        })
    }

    pub(crate) fn check_remote(
        &self,
        who: Accessor,
        rkey: u32,
        va: u64,
        length: u32,
        access: RemoteAccess,
    ) -> Result<(), RemoteError> {
        remote(&self.read(), who, rkey, va, length as usize, Access::of(access)).map(|_| ())
    }

    pub(crate) fn write_remote(
        &self,
        who: Accessor,
        rkey: u32,
        va: u64,
        data: &[u8],
    ) -> Result<(), RemoteError> {
        let table = self.read();
        remote(&table, who, rkey, va, data.len(), Access::REMOTE_WRITE)?
            .write(data)
            .map_err(|Fault| RemoteError)
    }

    pub(crate) fn read_remote(
        &self,
        who: Accessor,
        rkey: u32,
        va: u64,
        out: &mut [u8],
    ) -> Result<(), RemoteError> {
        let table = self.read();
        remote(&table, who, rkey, va, out.len(), Access::REMOTE_READ)?.read(out).map_err(|Fault| RemoteError)
    }

    pub(crate) fn atomic(&self, who: Accessor, rkey: u32, va: u64, op: AtomicOp) -> Result<u64, RemoteError> {
        let table = self.read();
        let word = remote(&table, who, rkey, va, size_of::<u64>(), Access::of(op.access()))?;
        word.update_word(|old| match op {
            AtomicOp::CompareSwap { compare, swap } => {
                if old == compare {
                    swap
                } else {
                    old
                }
            }
            AtomicOp::FetchAdd { add } => old.wrapping_add(add),
            AtomicOp::Store { value } => value,
        })
        .ok_or(RemoteError)
    }

    /// Unbinds a type 2 window because its key is invalidated; regions of programs cannot be.
    pub(crate) fn invalidate(&self, who: Accessor, key: u32) -> Result<(), LocalError> {
        let mut table = self.write();
        let (slot, tag) = split(key);
        let bound = match table.get_mut(slot) {
            Some(Entry { tag: t, object: Object::Window(window) })
                if *t == tag && window.kind == WindowType::Two && window.pd == who.pd =>
            {
                match &window.bound {
                    Some(binding) if binding.qp == Some(who.qp) => window.bound.take(),
                    _ => return Err(LocalError),
                }
            }
            _ => return Err(LocalError),
        };
        release(&mut table, bound);
        Ok(())
    }

    /// Binds a window, or unbinds it with a length of zero (clause 10.6.7.2).
    pub(crate) fn bind(&self, who: Accessor, request: &BindRequest) -> Result<(), LocalError> {
        let mut table = self.write();
        let (slot, tag) = split(request.rkey);
        let part = match request.length {
            0 => None,
            _ => Some(bindable(&table, who.pd, request)?),
        };
        let Some(Entry { tag: current, object: Object::Window(window) }) = table.get_mut(slot) else {
            return Err(LocalError);
        };
        if window.pd != who.pd || slot != request.window {
            return Err(LocalError);
        }
        let qp = match window.kind {
            WindowType::One => None,
            // A bound one must be invalidated first, it is never unbound by a bind, and the key changes.
            WindowType::Two if window.bound.is_some() || part.is_none() || *current == tag => {
                return Err(LocalError);
            }
            WindowType::Two => Some(who.qp),
        };
        *current = tag;
        let region = split(request.lkey).0;
        let before = std::mem::replace(&mut window.bound, part.map(|part| Binding { region, part, qp }));
        release(&mut table, before);
        if part.is_some()
            && let Some(Entry { object: Object::Region { windows, .. }, .. }) = table.get_mut(region)
        {
            *windows += 1;
        }
        Ok(())
    }
}

/// The part of a region that a window may open.
fn bindable(table: &Table, pd: u32, request: &BindRequest) -> Result<Region, LocalError> {
    let Some(Entry { object: Object::Region { region, .. }, .. }) = entry(table, request.lkey) else {
        return Err(LocalError);
    };
    let access = Access::from_bits_retain(request.access);
    let may_change = access.intersects(Access::REMOTE_CHANGES);
    if region.pd != pd
        || !region.access.contains(Access::MW_BIND)
        || (may_change && !region.access.contains(Access::LOCAL_WRITE))
    {
        return Err(LocalError);
    }
    let len = usize::try_from(request.length).map_err(|_| LocalError)?;
    let memory = region.part(request.addr, len).ok_or(LocalError)?;
    let start = if access.contains(Access::ZERO_BASED) { 0 } else { request.addr };
    Ok(Region { pd, start, memory, access })
}

fn release(table: &mut Table, bound: Option<Binding>) {
    if let Some(binding) = bound
        && let Some(Entry { object: Object::Region { windows, .. }, .. }) = table.get_mut(binding.region)
    {
        *windows -= 1;
    }
}

/// Calls `each` for the pieces of a list that hold `len` bytes from `offset` on: element, bytes to skip in
/// it, bytes of it.
fn walk(
    sges: &[Sge],
    offset: u32,
    len: usize,
    mut each: impl FnMut(&Sge, u64, usize) -> Result<(), LocalError>,
) -> Result<(), LocalError> {
    let (mut skip, mut left) = (u64::from(offset), len);
    for sge in sges {
        if left == 0 {
            break;
        }
        let length = u64::from(sge.length);
        if skip >= length {
            skip -= length;
            continue;
        }
        let here = usize::try_from(length - skip).map_or(left, |here| here.min(left));
        each(sge, skip, here)?;
        left -= here;
        skip = 0;
    }
    if left == 0 { Ok(()) } else { Err(LocalError) }
}

fn local(
    table: &Table,
    pd: u32,
    sge: &Sge,
    skip: u64,
    len: usize,
    need: Access,
) -> Result<RawMemory, LocalError> {
    match entry(table, sge.lkey) {
        Some(Entry { object: Object::Region { region, .. }, .. })
            if region.pd == pd && region.access.contains(need) =>
        {
            // The whole element has to be inside, as hardware checks it.
            let element = region.part(sge.addr, sge.length as usize).ok_or(LocalError)?;
            element.part(usize::try_from(skip).map_err(|_| LocalError)?, len).ok_or(LocalError)
        }
        _ => Err(LocalError),
    }
}

fn remote(
    table: &Table,
    who: Accessor,
    rkey: u32,
    va: u64,
    len: usize,
    need: Access,
) -> Result<RawMemory, RemoteError> {
    let part = match &entry(table, rkey).ok_or(RemoteError)?.object {
        Object::Region { region, .. } => region,
        Object::Window(Window { bound: Some(binding), .. }) if binding.qp.is_none_or(|qp| qp == who.qp) => {
            &binding.part
        }
        Object::Window(_) => return Err(RemoteError),
    };
    if part.pd != who.pd || !part.access.contains(need) {
        return Err(RemoteError);
    }
    part.part(va, len).ok_or(RemoteError)
}

#[cfg(test)]
mod tests {
    use super::super::memory::Paging;
    use super::*;

    const ME: Accessor = Accessor { pd: 1, qp: 17 };

    fn table(memory: &mut [u64], access: Access) -> (MemoryTable, u32, u64) {
        let table = MemoryTable::new();
        let start = memory.as_ptr().addr() as u64;
        // SAFETY: the tests keep the memory alive and touch it through the table only.
        let raw = unsafe { RawMemory::new(memory.as_mut_ptr().cast(), size_of_val(memory), Paging::Mapped) };
        let key = table.add_region(Region { pd: 1, start, memory: raw, access }).unwrap();
        (table, key, start)
    }

    /// RDMA/rxe: Fix integer overflow in mr_check_range() leading to OOB access
    #[test]
    fn ranges_are_checked_without_overflow() {
        let mut memory = [0; 4];
        let (table, key, start) = table(&mut memory, Access::all());
        let ok = |va, len| table.check_remote(ME, key, va, len, RemoteAccess::Read).is_ok();
        assert!(ok(start, 32) && ok(start + 31, 1));
        assert!(!ok(start, 33) && !ok(start - 1, 1) && !ok(start + 32, 1));
        assert!(!ok(u64::MAX, 2) && !ok(u64::MAX - 31, 32) && !ok(start, u32::MAX));
    }

    #[test]
    fn rights_keys_and_domains_are_checked() {
        let mut memory = [0; 4];
        let (table, key, start) = table(&mut memory, Access::REMOTE_READ);
        let read = |who, key| table.check_remote(who, key, start, 8, RemoteAccess::Read).is_ok();
        assert!(read(ME, key));
        assert!(!read(Accessor { pd: 2, ..ME }, key) && !read(ME, key ^ 1) && !read(ME, key ^ 0x100));
        assert!(table.check_remote(ME, key, start, 8, RemoteAccess::Write).is_err());
        assert!(table.write_remote(ME, key, start, &[1]).is_err());
        let sge = Sge { addr: start, length: 8, lkey: key };
        assert!(table.scatter(1, &[sge], 0, &[1]).is_err(), "no local write");
        assert!(table.gather(1, &[sge], 0, &mut [0]).is_ok());
        assert!(table.gather(2, &[sge], 0, &mut [0]).is_err());
        table.remove_region(key).unwrap();
        assert!(!read(ME, key));
    }

    /// RDMA/rxe: Prevent faulty rkey generation
    #[test]
    fn keys_do_not_run_out_with_their_use() {
        let mut memory = [0; 4];
        let (table, kept, start) = table(&mut memory, Access::REMOTE_READ);
        let region = table.region(kept).unwrap();
        let read = |key| table.check_remote(ME, key, start, 8, RemoteAccess::Read).is_ok();
        for _ in 0..70_000 {
            let key = table.add_region(region).unwrap();
            assert!(read(key) && key != kept);
            table.remove_region(key).unwrap();
            assert!(!read(key));
        }
        assert!(read(kept));
    }

    #[test]
    fn lists_are_walked_from_any_offset() {
        let mut memory = [0; 4];
        let (table, key, start) = table(&mut memory, Access::LOCAL_WRITE);
        let sges = [(0, 3), (8, 0), (16, 5)].map(|(at, length)| Sge { addr: start + at, length, lkey: key });
        table.scatter(1, &sges, 1, &[1, 2, 3, 4]).unwrap();
        let mut out = [9; 8];
        table.gather(1, &sges, 0, &mut out).unwrap();
        assert_eq!(out, [0, 1, 2, 3, 4, 0, 0, 0]);
        assert!(table.gather(1, &sges, 1, &mut out).is_err(), "one byte too many");
    }

    /// RDMA/rxe: Separate HW and SW l/rkeys
    #[test]
    fn windows_open_a_part_for_one_queue_pair_until_invalidated() {
        let mut memory = [0; 4];
        let (table, lkey, start) = table(&mut memory, Access::MW_BIND | Access::LOCAL_WRITE);
        let first = table.add_window(1, WindowType::Two).unwrap();
        let rkey = (first & !0xff) | (first.wrapping_add(1) & 0xff);
        let access = Access::REMOTE_WRITE.bits();
        let bind = BindRequest { window: first >> 8, rkey, lkey, access, addr: start + 8, length: 8 };
        table.bind(ME, &bind).unwrap();
        assert!(table.bind(ME, &BindRequest { rkey: rkey ^ 3, ..bind }).is_err(), "bound already");
        assert_eq!(table.write_remote(ME, rkey, start + 8, &[7; 8]), Ok(()));
        assert!(table.write_remote(ME, rkey, start + 9, &[7; 8]).is_err());
        assert!(table.write_remote(ME, first, start + 8, &[7; 8]).is_err(), "the old key");
        assert!(table.write_remote(Accessor { qp: 18, ..ME }, rkey, start + 8, &[7; 8]).is_err());
        assert_eq!(table.remove_region(lkey), Err(RemoveError::Bound));
        table.invalidate(ME, rkey).unwrap();
        assert!(table.write_remote(ME, rkey, start + 8, &[7; 8]).is_err());
        assert_eq!(table.remove_region(lkey), Ok(()));
        assert_eq!(table.remove_window(first), Ok(()));
    }

    #[test]
    fn what_is_withdrawn_is_accessible_to_nobody_and_can_be_removed() {
        let mut memory = [0; 4];
        let (table, key, start) = table(&mut memory, Access::all());
        let other = table.add_region(Region { pd: 2, ..table.region(key).unwrap() }).unwrap();
        let window = table.add_window(1, WindowType::One).unwrap();
        let rkey = window ^ 1;
        let access = Access::REMOTE_WRITE.bits();
        let bind = BindRequest { window: window >> 8, rkey, lkey: key, access, addr: start, length: 8 };
        table.bind(ME, &bind).unwrap();
        table.withdraw(&BTreeSet::from([1]));
        for rkey in [key, rkey] {
            assert!(table.write_remote(ME, rkey, start, &[7; 8]).is_err());
        }
        let sge = Sge { addr: start, length: 8, lkey: key };
        assert!(table.scatter(1, &[sge], 0, &[1]).is_err());
        assert!(table.write_remote(Accessor { pd: 2, ..ME }, other, start, &[7; 8]).is_ok());
        assert_eq!((table.remove_region(key), table.remove_window(window)), (Ok(()), Ok(())));
    }

    /// RDMA/rxe: Check PDs for memory window binds
    #[test]
    fn windows_bind_only_what_their_domain_allows() {
        let mut memory = [0; 4];
        let (table, lkey, start) = table(&mut memory, Access::MW_BIND);
        let window = table.add_window(1, WindowType::One).unwrap();
        let request = |access: Access| BindRequest {
            window: window >> 8,
            rkey: window ^ 1,
            lkey,
            access: access.bits(),
            addr: start,
            length: 8,
        };
        assert!(table.bind(ME, &request(Access::REMOTE_WRITE)).is_err(), "region without local write");
        assert!(table.bind(Accessor { pd: 2, ..ME }, &request(Access::REMOTE_READ)).is_err());
        assert!(table.bind(ME, &BindRequest { length: 33, ..request(Access::REMOTE_READ) }).is_err());
        table.bind(ME, &request(Access::REMOTE_READ)).unwrap();
        assert!(
            table.check_remote(Accessor { qp: 99, ..ME }, window ^ 1, start, 8, RemoteAccess::Read).is_ok()
        );
        table.bind(ME, &BindRequest { length: 0, rkey: window ^ 2, ..request(Access::REMOTE_READ) }).unwrap();
        assert!(table.check_remote(ME, window ^ 2, start, 8, RemoteAccess::Read).is_err());
    }
}
