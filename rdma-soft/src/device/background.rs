//! The thread that works for programs that do not call: targets of RDMA WRITE and READ, and timers.
//!
//! It is in one of two modes.
//!
//! * *Ticking*, while the program drives the device: a counter shows that, and as long as the count moves the
//!   thread keeps its hands off the socket and looks every millisecond. So a packet wakes nobody but the
//!   thread that waits for it.
//! * *Watching*, when the count has not moved for a tick: the thread drains the socket itself, sends
//!   acknowledgements that are owed, then sleeps until the socket has something, the next timer is due, or
//!   it is told of work. With no timer it sleeps without end: an idle device costs nothing.
//!
//! Telling it costs a system call, so it is told only what it would sleep through. It publishes in
//! `wakes_at` when it will look by itself, then looks for work once more, then sleeps; who makes work
//! publishes that first, then compares `wakes_at`. Both sides put a full fence in between, so one of the
//! two sees the other: no work is slept through. While it ticks, nobody has to tell it anything.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::Device;
use super::progress::TICK;
use super::queue_pair::NEVER;
use super::scratch;

/// Receive calls without result, each with a yield, before the thread sleeps again after work: a stream's
/// next packets are worth waiting for, waking up costs more.
const LINGER: u32 = 50;

/// The shortest turn on the processor that the kernel grants, in nanoseconds. The thread serves programs that spin on
/// memory, maybe on every processor there is: it must not wait for the end of their turns, which take milliseconds.
const TURN: u64 = 100_000;

/// What others know of the thread.
#[derive(Debug)]
pub(super) struct Background {
    eventfd: OwnedFd,
    /// When it looks by itself, in nanoseconds of the device's clock; 0 while it is awake.
    wakes_at: AtomicU64,
    stop: AtomicBool,
}

impl Background {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Background {
            eventfd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            wakes_at: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    /// Wakes the thread unless it looks at about `time` by itself. The work must be visible already.
    pub(super) fn expect_by(&self, time: u64) {
        fence(Ordering::SeqCst);
        let latest = time.saturating_add(2 * TICK);
        let wakes_at = self.wakes_at.load(Ordering::Relaxed);
        // The exchange lets one of several threads make the system call.
        if wakes_at > latest
            && self.wakes_at.compare_exchange(wakes_at, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.wake();
        }
    }

    fn wake(&self) {
        // Cannot fail: the counter is far from its limit.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }
}

/// Starts the thread of `device`.
pub(super) fn start(device: Arc<Device>) -> io::Result<JoinHandle<()>> {
    let watch = Watch::new(&device)?;
    std::thread::Builder::new().name("rdma-soft".into()).spawn(move || {
        crate::sys::block_signals();
        crate::sys::short_turns(TURN);
        run(&device, watch);
    })
}

/// The descriptors that the thread sleeps on.
struct Watch {
    epoll: OwnedFd,
    has_socket: bool,
}

impl Watch {
    fn new(device: &Device) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &device.background.eventfd, data, epoll::EventFlags::IN)?;
        epoll::add(&epoll, device.multicast.fd(), data, epoll::EventFlags::IN)?;
        Ok(Watch { epoll, has_socket: false })
    }

    /// Off means off: a descriptor that watches the socket for nothing costs every packet time all the same.
    fn watch_socket(&mut self, device: &Device, wanted: bool) {
        if self.has_socket == wanted {
            return;
        }
        let socket = device.socket.as_fd();
        let done = if wanted {
            epoll::add(&self.epoll, socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
        } else {
            epoll::delete(&self.epoll, socket)
        };
        // Fails for want of memory only; the next round tries again.
        if done.is_ok() {
            self.has_socket = wanted;
        }
    }

    fn sleep(&self, nanoseconds: Option<u64>) {
        let timeout = nanoseconds.map(|n| {
            // Whole milliseconds, rounded up: epoll knows no finer ones everywhere.
            let milliseconds = n.div_ceil(1_000_000).min(60_000);
            Timespec {
                tv_sec: i64::try_from(milliseconds / 1000).unwrap_or(60),
                tv_nsec: i64::try_from(milliseconds % 1000 * 1_000_000).unwrap_or(0),
            }
        });
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        // Interrupted or not, the loop looks again.
        let _ = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
    }
}

fn run(device: &Arc<Device>, mut watch: Watch) {
    let mut drives = device.counters.drives();
    loop {
        let _ = rustix::io::read(&device.background.eventfd, &mut [0; 8]);
        // After the read, which may have taken the wake-up of `stop`.
        if device.background.stop.load(Ordering::SeqCst) {
            return;
        }
        let seen = std::mem::replace(&mut drives, device.counters.drives());
        let driven = seen != drives;
        if driven {
            watch.watch_socket(device, false);
            device.serve_overdue();
        } else {
            watch.watch_socket(device, true);
            device.work_alone();
        }
        let background = &device.background;
        let now = device.now().nanoseconds();
        let mut wakes_at = if driven { now + TICK } else { device.next_deadline.load(Ordering::Relaxed) };
        background.wakes_at.store(wakes_at, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !driven {
            // Work that was made before its maker could see `wakes_at`.
            if device.has_work() {
                background.wakes_at.store(0, Ordering::Relaxed);
                continue;
            }
            wakes_at = wakes_at.min(device.next_deadline.load(Ordering::SeqCst));
            if device.has_delayed() || !watch.has_socket {
                // Nothing says when the socket takes more, or has something.
                wakes_at = wakes_at.min(now + TICK);
            }
        }
        let timeout = (wakes_at != NEVER).then(|| wakes_at.saturating_sub(now));
        watch.sleep(timeout);
        background.wakes_at.store(0, Ordering::Relaxed);
    }
}

impl Device {
    /// Timers, and turns that nobody takes, while the program drives the socket.
    fn serve_overdue(&self) {
        scratch::with(|scratch| {
            let now = self.now();
            if now.nanoseconds() >= self.next_deadline.load(Ordering::Relaxed)
                || self.lists.runnable.len() > 0
            {
                self.serve_lists(now, scratch);
            }
            self.serve_all_inboxes(scratch);
            self.serve_held(scratch);
            self.serve_groups(scratch);
            self.serve_overruns(scratch);
            self.serve_sleepers(scratch);
        });
    }

    /// Everything, until the socket has been empty for a while.
    fn work_alone(&self) {
        let drives = self.counters.drives();
        let mut empty = LINGER;
        loop {
            let worked = scratch::with(|scratch| {
                let mut worked = false;
                if let Ok(mut receiver) = self.receiver.try_lock() {
                    worked |= self.receive(&mut receiver, scratch) > 0;
                }
                worked |= self.serve_all_inboxes(scratch);
                worked |= self.serve_sent_to(true, scratch);
                // While packets come, what is owed waits for more of them.
                if !worked {
                    worked |= self.serve_held(scratch);
                }
                worked |= self.serve_lists(self.now(), scratch);
                worked |= self.serve_groups(scratch);
                worked |= self.serve_overruns(scratch);
                worked |= self.serve_sleepers(scratch);
                worked
            });
            if worked {
                empty = 0;
                // The program is back and does it itself.
                if self.counters.drives() != drives {
                    return;
                }
                continue;
            }
            empty += 1;
            if empty > LINGER {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn has_work(&self) -> bool {
        self.lists.runnable.len() > 0
            || self.overruns.any()
            || self.next_deadline.load(Ordering::SeqCst) <= self.now().nanoseconds()
    }
}
