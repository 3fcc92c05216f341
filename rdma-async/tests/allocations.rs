//! An awaited SEND and RECV allocate nothing, in whatever way the queue waits and whether or not it had to. On the null provider, so
//! that what is counted is this library's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use rdma_async::{Config, Domain, RcConnection, WaitMode, connect_over};
use rdma_core::Device;

/// The system's allocator, counting.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is being torn down allocates uncounted.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread during `future`.
async fn allocations<T>(future: impl Future<Output = T>) -> (u64, T) {
    let before = ALLOCATIONS.get();
    let output = future.await;
    (ALLOCATIONS.get() - before, output)
}

/// Two connections, each of which is its own peer, as all queue pairs of the null provider are.
async fn connections(mode: WaitMode) -> (RcConnection, RcConnection) {
    let domain = Domain::new(&Device::null().unwrap().open().unwrap()).unwrap();
    let config = Config::rc().wait_mode(mode).keep_alive(None);
    let (left, right) = tokio::io::duplex(64);
    let (a, b) = tokio::join!(connect_over(left, &domain, &config), connect_over(right, &domain, &config));
    (a.unwrap(), b.unwrap())
}

#[tokio::test]
async fn a_send_and_a_receive_allocate_nothing() {
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let (connection, _other) = connections(mode).await;
        let mut buffer = connection.pool().acquire().await;
        buffer.set_len(64);
        let mut counted = 0;
        for i in 0..1000 {
            let (count, returned) = allocations(async {
                let (result, buffer) = connection.send(buffer).await;
                result.unwrap();
                drop(connection.recv().await.unwrap());
                buffer
            })
            .await;
            buffer = returned;
            // The first rounds fill what grows once.
            if i >= 100 {
                counted += count;
            }
        }
        assert_eq!(counted, 0, "{mode:?}");
    }
}

#[tokio::test]
async fn a_receive_that_had_to_wait_allocates_nothing() {
    for mode in [WaitMode::Event, WaitMode::Busy, WaitMode::Adaptive] {
        let (connection, _other) = connections(mode).await;
        let mut buffer = connection.pool().acquire().await;
        let mut counted = 0;
        for i in 0..1000 {
            let (count, returned) = allocations(async {
                let mut receive = pin!(connection.recv());
                let mut noop = Context::from_waker(Waker::noop());
                assert!(receive.as_mut().poll(&mut noop).is_pending());
                let (result, buffer) = connection.send(buffer).await;
                result.unwrap();
                let Poll::Ready(message) = receive.as_mut().poll(&mut noop) else { panic!("not woken") };
                drop(message.unwrap());
                buffer
            })
            .await;
            buffer = returned;
            if i >= 100 {
                counted += count;
            }
            // The runtime takes the wakers of futures that yielded.
            tokio::task::yield_now().await;
        }
        assert_eq!(counted, 0, "{mode:?}");
    }
}

#[tokio::test]
async fn a_message_as_bytes_allocates_once() {
    let (connection, _other) = connections(WaitMode::Adaptive).await;
    for i in 0..200 {
        connection.send(connection.pool().acquire().await).await.0.unwrap();
        let (count, bytes) = allocations(async { connection.recv().await.unwrap().into_bytes() }).await;
        assert!(i < 100 || count == 1, "{count}");
        let idle = connection.pool().idle();
        let clone: Bytes = bytes.clone();
        drop(bytes);
        assert_eq!(connection.pool().idle(), idle);
        drop(clone);
        assert_eq!(connection.pool().idle(), idle + 1);
    }
}
