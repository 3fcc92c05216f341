//! What the types rule out. Each rule is a pair of programs that differ in what the rule is about: the first
//! compiles, so that the second cannot fail for another reason. The exact messages are checked by
//! `ci/compile-fail.sh`, with one stated compiler.

macro_rules! rules {
    ($($(#[doc = $doc:literal])* $name:ident { $right:literal, $wrong:literal, $code:literal })*) => {$(
        $(#[doc = $doc])*
        #[doc = concat!("\n```\n", prelude!(), $right, "\n```\n")]
        #[doc = concat!("\n```compile_fail,", $code, "\n", prelude!(), $wrong, "\n```\n")]
        mod $name {}
    )*};
}

macro_rules! prelude {
    () => {
        "#![allow(unused, reason = \"what is checked is whether it compiles\")]
        use rdma_core::qp::{state::*, transport::*};
        use rdma_core::*;\n"
    };
}

rules! {
    /// Sends need RTS.
    send_in_rtr {
        "fn f(qp: &QueuePair<Rc, Rts>, buffer: Buffer) { let _ = qp.post_send(buffer); }",
        "fn f(qp: &QueuePair<Rc, Rtr>, buffer: Buffer) { let _ = qp.post_send(buffer); }",
        "E0277"
    }
    /// As above, for operations.
    start_send_in_init {
        "fn f(qp: &QueuePair<Uc, Rts>, buffer: Buffer) { let _ = qp.start_send(buffer); }",
        "fn f(qp: &QueuePair<Uc, Init>, buffer: Buffer) { let _ = qp.start_send(buffer); }",
        "E0277"
    }
    /// As above, for batches.
    batch_in_sqd {
        "fn f(qp: &QueuePair<Rc, Rts>) { let _ = qp.post_batch(&mut Vec::new()); }",
        "fn f(qp: &QueuePair<Rc, Sqd>) { let _ = qp.post_batch(&mut Vec::new()); }",
        "E0277"
    }
    /// Receives need INIT.
    receive_in_reset {
        "fn f(qp: &QueuePair<Rc, Init>, buffer: Buffer) { let _ = qp.post_recv(buffer); }",
        "fn f(qp: &QueuePair<Rc, Reset>, buffer: Buffer) { let _ = qp.post_recv(buffer); }",
        "E0277"
    }
    /// A receiving half does not send.
    send_on_receiving_half {
        "fn f(half: &SendHalf<Rc>, buffer: Buffer) { let _ = half.post_send(buffer); }",
        "fn f(half: &RecvHalf<Rc>, buffer: Buffer) { let _ = half.post_send(buffer); }",
        "E0277"
    }
    /// UC has no RDMA READ.
    read_on_uc {
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Rc>::read(b, r); }",
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Uc>::read(b, r); }",
        "E0277"
    }
    /// UD has no RDMA READ.
    read_on_ud {
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Rc>::read(b, r); }",
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Ud>::read(b, r); }",
        "E0277"
    }
    /// UD has no RDMA WRITE.
    write_on_ud {
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Uc>::write(b, r); }",
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Ud>::write(b, r); }",
        "E0277"
    }
    /// UC has no atomics.
    fetch_and_add_on_uc {
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Rc>::fetch_and_add(b, r, 1); }",
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Uc>::fetch_and_add(b, r, 1); }",
        "E0277"
    }
    /// UD has no atomics.
    compare_and_swap_on_ud {
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Rc>::compare_and_swap(b, r, 0, 1); }",
        "fn f(b: Buffer, r: RemoteSlice) { let _ = WorkRequest::<Ud>::compare_and_swap(b, r, 0, 1); }",
        "E0277"
    }
    /// A work request of RC is none of UC.
    read_posted_on_uc {
        "fn f(qp: &QueuePair<Rc, Rts>, b: Buffer, r: RemoteSlice) {
            let _ = qp.post_send(WorkRequest::<Rc>::read(b, r));
        }",
        "fn f(qp: &QueuePair<Uc, Rts>, b: Buffer, r: RemoteSlice) {
            let _ = qp.post_send(WorkRequest::<Rc>::read(b, r));
        }",
        "E0277"
    }
    /// RC has one peer.
    send_to_on_rc {
        "fn f(qp: &QueuePair<Ud, Rts>, b: Buffer, to: &AddressHandle) {
            let _ = qp.post_send(WorkRequest::send_to(b, to, 7, 8));
        }",
        "fn f(qp: &QueuePair<Rc, Rts>, b: Buffer, to: &AddressHandle) {
            let _ = qp.post_send(WorkRequest::send_to(b, to, 7, 8));
        }",
        "E0277"
    }
    /// UD needs a destination.
    send_on_ud {
        "fn f(qp: &QueuePair<Rc, Rts>, b: Buffer) { let _ = qp.post_send(WorkRequest::send(b)); }",
        "fn f(qp: &QueuePair<Ud, Rts>, b: Buffer) { let _ = qp.post_send(WorkRequest::send(b)); }",
        "E0277"
    }
    /// RTR is not skipped.
    init_to_rts {
        "fn f(qp: QueuePair<Rc, Rtr>, rts: &RcRts) { let _ = qp.rts(rts); }",
        "fn f(qp: QueuePair<Rc, Init>, rts: &RcRts) { let _ = qp.rts(rts); }",
        "E0277"
    }
    /// INIT is not skipped.
    reset_to_rtr {
        "fn f(qp: QueuePair<Rc, Init>, rtr: &RcRtr) { let _ = qp.rtr(rtr); }",
        "fn f(qp: QueuePair<Rc, Reset>, rtr: &RcRtr) { let _ = qp.rtr(rtr); }",
        "E0277"
    }
    /// There is no way back but through `reset`.
    rts_to_init {
        "fn f(qp: QueuePair<Rc, Reset>, init: &ConnectedInit) { let _ = qp.init(init); }",
        "fn f(qp: QueuePair<Rc, Rts>, init: &ConnectedInit) { let _ = qp.init(init); }",
        "E0277"
    }
    /// A transition consumes the pair.
    used_after_transition {
        "fn f(qp: QueuePair<Rc, Reset>, init: &ConnectedInit, b: Buffer) {
            if let Ok(next) = qp.init(init) { let _ = next.post_recv(b); }
        }",
        "fn f(qp: QueuePair<Rc, Reset>, init: &ConnectedInit, b: Buffer) {
            if let Ok(next) = qp.init(init) { let _ = qp.num(); }
        }",
        "E0382"
    }
    /// Each transport has its own attributes.
    ud_attributes_on_rc {
        "fn f(qp: QueuePair<Ud, Reset>, init: &UdInit) { let _ = qp.init(init); }",
        "fn f(qp: QueuePair<Rc, Reset>, init: &UdInit) { let _ = qp.init(init); }",
        "E0308"
    }
    /// UD has no address at RTR.
    rc_attributes_on_ud {
        "fn f(qp: QueuePair<Rc, Init>, rtr: &RcRtr) { let _ = qp.rtr(rtr); }",
        "fn f(qp: QueuePair<Ud, Init>, rtr: &RcRtr) { let _ = qp.rtr(rtr); }",
        "E0308"
    }
    /// None of an RC pair's attributes at RTR can be left out.
    missing_attribute {
        "fn f(path: AddressVector) -> RcRtr {
            RcRtr { path, path_mtu: Mtu::B1024, dest_qp_num: 1, rq_psn: 2, max_dest_rd_atomic: 1, min_rnr_timer: 12 }
        }",
        "fn f(path: AddressVector) -> RcRtr {
            RcRtr { path, path_mtu: Mtu::B1024, dest_qp_num: 1, rq_psn: 2, max_dest_rd_atomic: 1 }
        }",
        "E0063"
    }
    /// RC has no SQE.
    send_queue_error_on_rc {
        "fn f(qp: QueuePair<Uc, Rts>) { let _ = qp.send_failed(); }",
        "fn f(qp: QueuePair<Rc, Rts>) { let _ = qp.send_failed(); }",
        "E0277"
    }
    /// Point 5: a buffer that is posted is gone until its completion.
    point_05_buffer_after_post {
        "fn f(qp: &QueuePair<Rc, Rts>, b: Buffer) { let n = b[0]; let _ = qp.post_send(b); }",
        "fn f(qp: &QueuePair<Rc, Rts>, b: Buffer) { let _ = qp.post_send(b); let n = b[0]; }",
        "E0382"
    }
    /// Point 5: memory that peers reach gives no references.
    point_05_bytes_of_a_shared_region {
        "fn f(region: &MemoryRegion) -> &[u8] { region }",
        "fn f(region: &SharedRegion) -> &[u8] { region }",
        "E0308"
    }
    /// Point 2 of the safety bar: nothing is made of a raw pointer by safe code.
    point_02_memory_of_a_raw_pointer {
        "fn f(ptr: std::ptr::NonNull<u8>) -> Memory { unsafe { Memory::from_raw_parts(ptr, 8, Box::new(())) } }",
        "fn f(ptr: std::ptr::NonNull<u8>) -> Memory { Memory::from_raw_parts(ptr, 8, Box::new(())) }",
        "E0133"
    }
}
