//! What a queue pair costs in memory, and that its data path allocates nothing.

#![allow(unsafe_code, reason = "a counting allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use rdma_soft::proto::{
    Acks, Attributes, Config, Data, Host, MAX_PACKET_LEN, PacketMeta, PathMtu, QpAccess, QueuePair,
    SendFlags, SendOperation, SendRequest, Sge, State, Time,
};
use rdma_soft::proto::{
    AtomicOp, BindRequest, Completion, Counter, Event, LocalError, ReceiveRequest, RemoteAccess, RemoteError,
};
use rdma_soft::wire::{Packet, Transport};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

fn account(bytes: i64) {
    ALLOCATIONS.set(ALLOCATIONS.get() + u64::from(bytes > 0));
    BYTES.set(BYTES.get() + bytes);
}

// SAFETY: passes everything on to the system's allocator and only counts beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        account(i64::try_from(layout.size()).unwrap_or(i64::MAX));
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        account(-i64::try_from(layout.size()).unwrap_or(i64::MAX));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A host that does nothing, so that only the queue pair can allocate.
struct Nothing {
    completions: u64,
}

impl Host for Nothing {
    fn gather(&mut self, _: &[Sge], _: u32, out: &mut [u8]) -> Result<(), LocalError> {
        out.fill(1);
        Ok(())
    }
    fn scatter(&mut self, _: &[Sge], _: u32, _: &[u8]) -> Result<(), LocalError> {
        Ok(())
    }
    fn next_receive(&mut self) -> Option<ReceiveRequest> {
        Some(ReceiveRequest { wr_id: 1, length: 1 << 20 })
    }
    fn scatter_receive(&mut self, _: u32, _: &[u8]) -> Result<(), LocalError> {
        Ok(())
    }
    fn flush_receives(&mut self) {}
    fn check_remote(&mut self, _: u32, _: u64, _: u32, _: RemoteAccess) -> Result<(), RemoteError> {
        Ok(())
    }
    fn write_remote(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), RemoteError> {
        Ok(())
    }
    fn read_remote(&mut self, _: u32, _: u64, out: &mut [u8]) -> Result<(), RemoteError> {
        out.fill(2);
        Ok(())
    }
    fn atomic(&mut self, _: u32, _: u64, _: AtomicOp) -> Result<u64, RemoteError> {
        Ok(0)
    }
    fn invalidate_remote(&mut self, _: u32) -> Result<(), RemoteError> {
        Ok(())
    }
    fn invalidate_local(&mut self, _: u32) -> Result<(), LocalError> {
        Ok(())
    }
    fn bind_window(&mut self, _: &BindRequest) -> Result<(), LocalError> {
        Ok(())
    }
    fn complete(&mut self, _: Completion) {
        self.completions += 1;
    }
    fn event(&mut self, _: Event) {}
    fn add(&mut self, _: Counter, _: u64) {}
}

fn connected(qp_num: u32, dest_qp: u32, host: &mut Nothing) -> QueuePair {
    let mut qp = QueuePair::new(&Config::new(Transport::Rc, qp_num));
    let attributes = Attributes {
        dest_qp,
        path_mtu: PathMtu::Mtu4096,
        access: QpAccess::all(),
        timeout: 14,
        retry_count: 7,
        max_rd_atomic: 16,
        max_dest_rd_atomic: 16,
        ..Attributes::default()
    };
    for state in [State::Init, State::Rtr, State::Rts] {
        qp.modify(Time::ZERO, host, state, &attributes).expect("a transition of the specification");
    }
    qp
}

#[test]
fn a_connected_queue_pair_fits_in_ten_kibibytes() {
    let mut host = Nothing { completions: 0 };
    let before = BYTES.get();
    let qp = connected(1, 2, &mut host);
    let heap = BYTES.get() - before;
    let total = usize::try_from(heap).expect("grew") + size_of::<QueuePair>();
    assert!(total <= 10 << 10, "{total} bytes with a send queue of 64");
    drop(qp);
    assert_eq!(BYTES.get(), before);
    println!("{} bytes inline, {heap} on the heap", size_of::<QueuePair>());
}

#[test]
fn no_operation_allocates() {
    let mut hosts = [Nothing { completions: 0 }, Nothing { completions: 0 }];
    let mut qps = [connected(1, 2, &mut hosts[0]), connected(2, 1, &mut hosts[1])];
    let mut buffer = vec![0; MAX_PACKET_LEN];
    let before = ALLOCATIONS.get();
    let (va, rkey, immediate) = (0, 1, [0; 4]);
    let operations = [
        SendOperation::Send,
        SendOperation::SendWithInvalidate(1),
        SendOperation::Write { va, rkey },
        SendOperation::WriteWithImmediate { va, rkey, immediate },
        SendOperation::Read { va, rkey },
        SendOperation::FetchAdd { va, rkey, add: 1 },
        SendOperation::LocalInvalidate(1),
        SendOperation::AtomicWrite { va, rkey },
    ];
    for round in 0..100 {
        for (wr_id, operation) in (0..).zip(operations) {
            let length = if matches!(operation, SendOperation::AtomicWrite { .. }) { 8 } else { 20_000 };
            let sges = [Sge { addr: 0, length, lkey: 1 }];
            let data = Data::Gather(&sges);
            let request =
                SendRequest { wr_id, operation, flags: SendFlags::SIGNALED, data, destination: None };
            qps[0].post_send(Time::ZERO, &mut hosts[0], &request).expect("accepted");
        }
        let mut busy = true;
        while std::mem::take(&mut busy) {
            for from in 0..2 {
                while let Some(sent) =
                    qps[from].poll_transmit(Time::ZERO, &mut hosts[from], Acks::Flush, &mut buffer)
                {
                    busy = true;
                    let packet = Packet::parse(&buffer[..sent.len + 4]).expect("own packets parse");
                    let to = 1 - from;
                    qps[to].handle_packet(Time::ZERO, &mut hosts[to], &packet, &PacketMeta::default());
                }
            }
        }
        assert_eq!(hosts[0].completions, (round + 1) * 8);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
