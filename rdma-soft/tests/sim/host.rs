//! A device in miniature: regions of memory behind keys, one receive queue, lists of what was reported.

use std::collections::VecDeque;

use rdma_soft::proto::{
    AtomicOp, BindRequest, Completion, CompletionKind, CompletionOpcode, Counter, Event, Host,
    ImmediateOrKey, LocalError, ReceiveRequest, RemoteAccess, RemoteError, Sge, Status,
};

/// What may be done with a region.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rights {
    pub local_write: bool,
    pub remote_read: bool,
    pub remote_write: bool,
    pub remote_atomic: bool,
}

impl Rights {
    pub const ALL: Self =
        Self { local_write: true, remote_read: true, remote_write: true, remote_atomic: true };
}

#[derive(Debug)]
pub struct Region {
    pub addr: u64,
    pub key: u32,
    pub rights: Rights,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct TestHost {
    pub regions: Vec<Region>,
    pub receives: VecDeque<(u64, Vec<Sge>)>,
    pub completions: Vec<Completion>,
    pub events: Vec<Event>,
    pub bound: Vec<BindRequest>,
    pub shared_receive_queue: bool,
    pub flushed: u32,
    current: Option<(u64, Vec<Sge>)>,
    counters: Vec<u64>,
}

impl TestHost {
    pub fn new() -> Self {
        Self { counters: vec![0; Counter::ALL.len()], ..Self::default() }
    }

    /// Registers `bytes` and returns the element that covers them.
    pub fn register(&mut self, bytes: Vec<u8>, rights: Rights) -> Sge {
        let n = self.regions.len() as u32;
        let region = Region { addr: u64::from(n + 1) << 32, key: 0x1000 + n, rights, bytes };
        let sge = Sge { addr: region.addr, length: region.bytes.len() as u32, lkey: region.key };
        self.regions.push(region);
        sge
    }

    pub fn bytes(&self, sge: Sge) -> &[u8] {
        let region = self.regions.iter().find(|region| region.key == sge.lkey).expect("registered");
        &region.bytes[(sge.addr - region.addr) as usize..][..sge.length as usize]
    }

    pub fn post_receive(&mut self, wr_id: u64, sges: &[Sge]) {
        self.receives.push_back((wr_id, sges.to_vec()));
    }

    /// Forgets the current receive, as a host must when its queue pair goes to RESET.
    pub fn forget(&mut self) {
        self.current = None;
    }

    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters[counter.index()]
    }

    pub fn take(&mut self, kind: CompletionKind) -> Vec<Completion> {
        let (taken, kept) = std::mem::take(&mut self.completions).into_iter().partition(|c| c.kind == kind);
        self.completions = kept;
        taken
    }

    fn range(&mut self, key: u32, addr: u64, len: usize, may: impl Fn(Rights) -> bool) -> Option<&mut [u8]> {
        let region = self.regions.iter_mut().find(|region| region.key == key && may(region.rights))?;
        let start = usize::try_from(addr.checked_sub(region.addr)?).ok()?;
        region.bytes.get_mut(start..start.checked_add(len)?)
    }

    /// Calls `visit` with each piece of the list that `len` bytes from `offset` on touch.
    fn walk(
        sges: &[Sge],
        offset: u32,
        len: usize,
        mut visit: impl FnMut(Sge, std::ops::Range<usize>) -> Option<()>,
    ) -> Result<(), LocalError> {
        let (mut skip, mut done) = (u64::from(offset), 0);
        for sge in sges {
            let length = u64::from(sge.length);
            if skip >= length {
                skip -= length;
                continue;
            }
            let take = (length - skip).min((len - done) as u64);
            let piece = Sge { addr: sge.addr + skip, length: take as u32, lkey: sge.lkey };
            visit(piece, done..done + take as usize).ok_or(LocalError)?;
            done += take as usize;
            skip = 0;
            if done == len {
                break;
            }
        }
        if done == len { Ok(()) } else { Err(LocalError) }
    }
}

impl Host for TestHost {
    fn gather(&mut self, sges: &[Sge], offset: u32, out: &mut [u8]) -> Result<(), LocalError> {
        Self::walk(sges, offset, out.len(), |sge, range| {
            let bytes = self.range(sge.lkey, sge.addr, range.len(), |_| true)?;
            out[range].copy_from_slice(bytes);
            Some(())
        })
    }

    fn scatter(&mut self, sges: &[Sge], offset: u32, data: &[u8]) -> Result<(), LocalError> {
        Self::walk(sges, offset, data.len(), |sge, range| {
            let bytes = self.range(sge.lkey, sge.addr, range.len(), |rights| rights.local_write)?;
            bytes.copy_from_slice(&data[range]);
            Some(())
        })
    }

    fn next_receive(&mut self) -> Option<ReceiveRequest> {
        assert!(self.current.is_none(), "the current receive was not completed");
        let (wr_id, sges) = self.receives.pop_front()?;
        let length = sges.iter().map(|sge| u64::from(sge.length)).sum();
        self.current = Some((wr_id, sges));
        Some(ReceiveRequest { wr_id, length })
    }

    fn scatter_receive(&mut self, offset: u32, data: &[u8]) -> Result<(), LocalError> {
        let (_, sges) = self.current.clone().expect("a current receive");
        self.scatter(&sges, offset, data)
    }

    fn flush_receives(&mut self) {
        self.flushed += 1;
        assert!(self.current.is_none(), "the current receive is flushed first");
        if self.shared_receive_queue {
            return;
        }
        while let Some((wr_id, _)) = self.receives.pop_front() {
            self.completions.push(Completion {
                kind: CompletionKind::Receive,
                wr_id,
                status: Status::WrFlush,
                opcode: CompletionOpcode::Receive,
                byte_len: 0,
                immediate: ImmediateOrKey::None,
                src_qp: 0,
                grh: false,
                solicited: false,
            });
        }
    }

    fn check_remote(
        &mut self,
        rkey: u32,
        va: u64,
        length: u32,
        access: RemoteAccess,
    ) -> Result<(), RemoteError> {
        assert_ne!(length, 0, "a length of zero is not checked");
        let may = |rights: Rights| match access {
            RemoteAccess::Read => rights.remote_read,
            RemoteAccess::Write => rights.remote_write,
            RemoteAccess::Atomic => rights.remote_atomic,
        };
        self.range(rkey, va, length as usize, may).map(|_| ()).ok_or(RemoteError)
    }

    fn write_remote(&mut self, rkey: u32, va: u64, data: &[u8]) -> Result<(), RemoteError> {
        let bytes = self.range(rkey, va, data.len(), |rights| rights.remote_write).ok_or(RemoteError)?;
        bytes.copy_from_slice(data);
        Ok(())
    }

    fn read_remote(&mut self, rkey: u32, va: u64, out: &mut [u8]) -> Result<(), RemoteError> {
        let bytes = self.range(rkey, va, out.len(), |rights| rights.remote_read).ok_or(RemoteError)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn atomic(&mut self, rkey: u32, va: u64, op: AtomicOp) -> Result<u64, RemoteError> {
        assert_eq!(va % 8, 0, "unaligned atomics are refused before");
        let may = |rights: Rights| match op.access() {
            RemoteAccess::Write => rights.remote_write,
            _ => rights.remote_atomic,
        };
        let bytes = self.range(rkey, va, 8, may).ok_or(RemoteError)?;
        let original = u64::from_ne_bytes((&*bytes).try_into().expect("eight bytes"));
        let value = match op {
            AtomicOp::CompareSwap { compare, swap } if compare == original => swap,
            AtomicOp::CompareSwap { .. } => original,
            AtomicOp::FetchAdd { add } => original.wrapping_add(add),
            AtomicOp::Store { value } => value,
        };
        bytes.copy_from_slice(&value.to_ne_bytes());
        Ok(original)
    }

    fn invalidate_remote(&mut self, rkey: u32) -> Result<(), RemoteError> {
        let place = self.regions.iter().position(|region| region.key == rkey).ok_or(RemoteError)?;
        self.regions.remove(place);
        Ok(())
    }

    fn invalidate_local(&mut self, key: u32) -> Result<(), LocalError> {
        self.invalidate_remote(key).map_err(|RemoteError| LocalError)
    }

    fn bind_window(&mut self, request: &BindRequest) -> Result<(), LocalError> {
        if request.window == u32::MAX {
            return Err(LocalError);
        }
        self.bound.push(*request);
        Ok(())
    }

    fn complete(&mut self, completion: Completion) {
        if completion.kind == CompletionKind::Receive {
            let (wr_id, _) = self.current.take().expect("only the current receive is completed");
            assert_eq!(wr_id, completion.wr_id);
        }
        self.completions.push(completion);
    }

    fn event(&mut self, event: Event) {
        self.events.push(event);
    }

    fn add(&mut self, counter: Counter, n: u64) {
        self.counters[counter.index()] += n;
    }
}
