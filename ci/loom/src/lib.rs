//! Every interleaving of those who may look for the completions of a queue, under the model checker (`ci/loom.sh`): the module `duty` that
//! rdma-async ships, between two futures, the poller, and a device that completes something for each and raises events.
//!
//! A wake-up that is lost is a deadlock, which loom reports.
#![cfg(all(test, loom))]

#[path = "../../../rdma-async/src/duty.rs"]
#[allow(dead_code, reason = "the models use a part of it")]
mod duty;

use std::{sync::Arc, time::Duration};

use duty::{Duty, Role};
use loom::{
    sync::{
        Mutex, Notify,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

const FUTURES: usize = 2;

/// What is under a lane's lock, for each future.
#[derive(Clone, Copy, Default)]
struct Place {
    is_ready: bool,
    has_waker: bool,
}

struct Queue {
    duty: Duty,
    /// Completions that nobody has read: a bit for each future.
    completions: AtomicUsize,
    is_armed: AtomicBool,
    places: Mutex<[Place; FUTURES]>,
    wakers: [Notify; FUTURES],
    poller: Notify,
    /// The poller is called when it is asleep, and looks at the duty before it sleeps.
    is_asleep: Mutex<bool>,
    done: AtomicUsize,
    /// Nobody takes events any more.
    is_over: AtomicBool,
    mode: Mode,
}

/// How those who wait do it.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// They sleep without a look.
    Event,
    /// They look once, then sleep.
    Adaptive,
    /// They spin by turns.
    Busy,
}

impl Queue {
    fn new(mode: Mode) -> Arc<Queue> {
        Arc::new(Queue {
            duty: Duty::new(),
            completions: AtomicUsize::new(0),
            is_armed: AtomicBool::new(false),
            places: Mutex::new([Place::default(); FUTURES]),
            wakers: [Notify::new(), Notify::new()],
            poller: Notify::new(),
            is_asleep: Mutex::new(false),
            done: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            mode,
        })
    }

    /// Reads what completed, and wakes whom it belongs to.
    fn dispatch(&self) -> usize {
        let completions = self.completions.swap(0, SeqCst);
        for i in (0..FUTURES).filter(|i| completions & 1 << i != 0) {
            let mut places = self.places.lock().unwrap();
            places[i].is_ready = true;
            if std::mem::take(&mut places[i].has_waker) {
                drop(places);
                self.wakers[i].notify();
            }
        }
        completions.count_ones() as usize
    }

    fn arm_and_drain(&self) -> usize {
        self.is_armed.swap(true, SeqCst);
        self.dispatch()
    }

    fn call_poller(&self) {
        if std::mem::take(&mut *self.is_asleep.lock().unwrap()) {
            self.poller.notify();
        }
    }

    /// Whether it is ready; leaves the waker if it is `asked` to and is not.
    fn check(&self, i: usize, leaves_waker: bool) -> bool {
        let mut places = self.places.lock().unwrap();
        places[i].has_waker = leaves_waker && !places[i].is_ready;
        places[i].is_ready
    }

    /// A task that awaits one future.
    fn wait(&self, i: usize) {
        let mut is_counted = false;
        loop {
            let polled = if self.mode == Mode::Event {
                self.poll_asleep(i, &mut is_counted)
            } else {
                self.poll(i, &mut is_counted)
            };
            match polled {
                Polled::Ready => break,
                Polled::Pending => self.wakers[i].wait(),
                Polled::Yield => thread::yield_now(),
            }
        }
        if self.done.fetch_add(1, SeqCst) + 1 == FUTURES {
            self.poller.notify();
        }
    }

    fn found(&self, spins: bool) -> Polled {
        if self.duty.leave(spins) {
            self.call_poller();
        }
        Polled::Ready
    }

    fn poll(&self, i: usize, is_counted: &mut bool) -> Polled {
        let is_ready =
            self.check(i, false) || !self.duty.is_polled() && self.dispatch() > 0 && self.check(i, false);
        if is_ready {
            return if *is_counted { self.found(false) } else { Polled::Ready };
        }
        loop {
            let role = self.duty.enter(*is_counted, self.mode == Mode::Busy, || true);
            *is_counted = true;
            let mut spins = false;
            match role {
                Role::Spin => {
                    spins = true;
                    let dispatched = self.dispatch();
                    if self.check(i, false) {
                        return self.found(true);
                    }
                    if self.mode == Mode::Busy || dispatched > 0 && self.duty.has_others() {
                        match self.duty.hand_over() {
                            None => return Polled::Yield,
                            Some(is_to_call) => {
                                if is_to_call {
                                    self.call_poller();
                                }
                                spins = false;
                            }
                        }
                    }
                }
                Role::SpinApart => unreachable!("both may rely on the poller"),
                Role::Rely => {}
                Role::Call => self.call_poller(),
            }
            if self.check(i, true) {
                return self.found(spins);
            }
            if spins {
                break;
            }
            if self.duty.is_seen_to() {
                return Polled::Pending;
            }
        }
        let Some(is_to_arm) = self.duty.sleep(true) else { return self.found(true) };
        if is_to_arm {
            self.arm_and_drain();
            if self.check(i, true) {
                return self.found(false);
            }
        }
        Polled::Pending
    }

    fn poll_asleep(&self, i: usize, is_counted: &mut bool) -> Polled {
        let mut places = self.places.lock().unwrap();
        if places[i].is_ready {
            drop(places);
            return if *is_counted { self.found(false) } else { Polled::Ready };
        }
        if !*is_counted && self.duty.rely_on_event() {
            (places[i].has_waker, *is_counted) = (true, true);
            return Polled::Pending;
        }
        drop(places);
        loop {
            let relies = if *is_counted {
                self.duty.is_polled() && self.duty.is_seen_to()
            } else {
                *is_counted = true;
                self.duty.count()
            };
            if self.check(i, true) {
                return self.found(false);
            }
            if !relies {
                break;
            }
            if self.duty.is_seen_to() {
                return Polled::Pending;
            }
        }
        let Some(is_to_arm) = self.duty.sleep(false) else { return self.found(false) };
        if is_to_arm {
            self.arm_and_drain();
            if self.check(i, true) {
                return self.found(false);
            }
        }
        Polled::Pending
    }

    /// The poller's task.
    fn serve(&self) {
        while self.done.load(SeqCst) < FUTURES {
            if self.duty.retire() {
                let mut is_asleep = self.is_asleep.lock().unwrap();
                if !self.duty.is_polled() {
                    *is_asleep = true;
                    drop(is_asleep);
                    self.poller.wait();
                }
                continue;
            }
            if self.dispatch() > 0 || self.mode == Mode::Busy {
                thread::yield_now();
                continue;
            }
            if self.is_over.load(SeqCst) {
                self.duty.give_up();
                self.wake_all();
                continue;
            }
            let found = if self.duty.arm() { self.arm_and_drain() } else { 0 };
            if found == 0 {
                self.duty.rest();
            }
        }
    }

    fn wake_all(&self) {
        for i in 0..FUTURES {
            if std::mem::take(&mut self.places.lock().unwrap()[i].has_waker) {
                self.wakers[i].notify();
            }
        }
    }

    /// The driver ends: nothing completes either, and those who would sleep meet an error.
    fn end(&self) {
        self.is_over.store(true, SeqCst);
        self.duty.end_service();
        self.wake_all();
    }

    /// The device, and the driver, which takes its events.
    fn complete(&self, i: usize) {
        self.completions.fetch_or(1 << i, SeqCst);
        if !self.is_armed.swap(false, SeqCst) {
            return;
        }
        self.duty.disarm();
        if self.duty.is_polled() {
            return;
        }
        self.dispatch();
        if self.duty.call() {
            self.call_poller();
        }
        if self.duty.rearm(true) {
            self.arm_and_drain();
        }
    }
}

enum Polled {
    Ready,
    Pending,
    Yield,
}

/// All interleavings with one preemption, and those with three for a minute: there are more than could be gone through.
fn model(run: impl Fn() + Sync + Send + Clone + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(1);
    builder.check(run.clone());
    builder.preemption_bound = Some(3);
    builder.max_duration = Some(Duration::from_secs(60));
    builder.check(run);
}

/// Where the driver `ends`, it does instead of the second completion.
fn everybody_is_served(mode: Mode, ends: bool) {
    let queue = Queue::new(mode);
    let spawn = |run: fn(&Queue)| {
        let queue = Arc::clone(&queue);
        thread::spawn(move || run(&queue))
    };
    let device = if ends {
        |queue: &Queue| {
            queue.complete(0);
            queue.end();
        }
    } else {
        |queue: &Queue| {
            queue.complete(0);
            queue.complete(1);
        }
    };
    let threads = [spawn(|queue| queue.wait(1)), spawn(Queue::serve), spawn(device)];
    queue.wait(0);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn loom_event() {
    model(|| everybody_is_served(Mode::Event, false));
}

#[test]
fn loom_adaptive() {
    model(|| everybody_is_served(Mode::Adaptive, false));
}

#[test]
fn loom_busy() {
    model(|| everybody_is_served(Mode::Busy, false));
}

#[test]
fn loom_event_ends() {
    model(|| everybody_is_served(Mode::Event, true));
}

#[test]
fn loom_adaptive_ends() {
    model(|| everybody_is_served(Mode::Adaptive, true));
}
