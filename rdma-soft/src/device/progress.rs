//! Who does the work.
//!
//! * A thread that posts sends what it posted (`egress`).
//! * A thread that polls an empty completion queue [drives](Device::poll) the device: acknowledgements that
//!   it held for company leave, queue pairs that had used up their quota go on, timers that are due fire, and
//!   one receive call is made and processed. A thread that sleeps on a channel does the same when it wakes,
//!   until the socket is empty.
//! * The background thread (`background`) does it for programs that do not call.
//!
//! An acknowledgement must not stand between a message and its answer: it is held until the program posts
//! on that queue pair, and then leaves in the same segmented send; or polls in vain or goes to sleep; or has
//! emptied a completion queue and polls again after 20 us; or a millisecond has passed. Arming a queue does
//! not send it: programs arm before they answer, and the poll or sleep that follows is close enough.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::completion_queue::{CompletionQueue, Entry};
use super::counters::DeviceCounter;
use super::queue_pair::{Inner, NEVER, QueuePair, with_host};
use super::scratch::{self, Scratch};
use super::{Device, Receiver};
use crate::proto::{Acks, Time};

/// What a poll in vain counts that looked at the socket, against one that looked at memory only: about the
/// ratio of their costs.
const SOCKET_POLL: u32 = 32;
/// The processor is given away when polls in vain have counted so much, a few microseconds: a packet that
/// takes longer may come from a thread that waits for this processor.
const PATIENCE: u32 = 16 * SOCKET_POLL;
/// Between two looks at the timers, counted likewise.
const TIMERS_EVERY: u32 = 8 * SOCKET_POLL;
/// Where all peers are in this process: between two looks at the socket, counted likewise.
const LOCAL_SOCKET_EVERY: u32 = 256;
/// Where all peers are in this process: how long packets are left to the thread that they are for, and
/// acknowledgements held for its answer, counted likewise; if that is another thread, and if it is this one.
const LOCAL_HOLD: u32 = 16;
const OWN_HOLD: u32 = 1;
/// So long acknowledgements are held by a thread that always finds work to do when it polls an empty queue, in
/// nanoseconds: others may wait for nothing else.
const HOLD_WHILE_BUSY: u64 = 20_000;
/// One receive call that yields so many bytes is part of a stream. A thread that is about to sleep looks again
/// this often then: the next packets are near, and waking up costs more.
const STREAM_BYTES: usize = 16 << 10;
const LINGER: u32 = 20;
/// Queue pairs that one call looks after before it returns to its caller.
const PER_CALL: usize = 64;
/// What is read before the timers that are due are believed, in bytes: a socket's buffer, so all that had arrived then.
/// No flood of packets keeps timers from their work any longer.
const ARRIVED: usize = 8 << 20;
/// What the smallest packet takes of a socket's buffer.
const PACKET: usize = 1 << 10;
/// How long an acknowledgement may be held when nobody calls, and how late a timer may be noticed while
/// the background thread ticks; in nanoseconds.
pub(super) const TICK: u64 = 1_000_000;

impl Device {
    /// Takes up to `max` completions; if there is none, does the device's work once and looks again.
    #[inline]
    pub(crate) fn poll(
        &self,
        cq: &CompletionQueue,
        max: usize,
        mut take: impl FnMut(usize, &Entry),
    ) -> usize {
        let n = cq.poll(max, &mut take);
        if n > 0 {
            return n;
        }
        scratch::with(|scratch| {
            let worked = self.drive(cq, scratch);
            let n = cq.poll(max, &mut take);
            if n > 0 || worked {
                scratch.idle_polls = 0;
                return n;
            }
            if scratch.idle_polls >= PATIENCE {
                std::thread::yield_now();
            }
            0
        })
    }

    /// Does the device's work until `found` has something or the socket is empty.
    pub(crate) fn drive_until<T>(&self, mut found: impl FnMut() -> Option<T>) -> Option<T> {
        scratch::with(|scratch| {
            self.counters.count(DeviceCounter::Drives);
            let mut receiver = self.receiver();
            let mut linger = 0_u32;
            loop {
                let received = self.receive(&mut receiver, scratch);
                self.serve_sleepers(scratch);
                if let Some(found) = found() {
                    return Some(found);
                }
                if received >= STREAM_BYTES {
                    linger = LINGER;
                } else if received == 0 {
                    if linger == 0 {
                        return None;
                    }
                    linger -= 1;
                    // What the sender waits for.
                    self.serve_held(scratch);
                }
            }
        })
    }

    /// What has to leave before the calling thread sleeps.
    pub(crate) fn before_sleep(&self) {
        scratch::with(|scratch| {
            self.counters.count(DeviceCounter::Drives);
            // Patience begins anew: what this thread waits for wakes it.
            scratch.idle_polls = 0;
            self.serve_held(scratch);
            self.serve_lists(self.now(), scratch);
            self.serve_sent_to(true, scratch);
            self.serve_sleepers(scratch);
        });
    }

    /// One round of work by a program's thread that polled `cq` in vain; whether there was any. As short as
    /// it can be: the clock is read for a reason only.
    #[inline(always)]
    fn drive(&self, cq: &CompletionQueue, scratch: &mut Scratch) -> bool {
        self.counters.count(DeviceCounter::Drives);
        // Who answers at once has answered what came in the rounds before.
        if !scratch.held.is_empty() && scratch.held.are_older_than(HOLD_WHILE_BUSY, self.now()) {
            self.serve_held(scratch);
        }
        if !cq.inbox.is_empty() && self.serve_inbox(cq, false, scratch) {
            self.serve_sleepers(scratch);
            return true;
        }
        let before = scratch.idle_polls;
        // Once in a row: it looks at a cache line that a sender may be about to write.
        if before == 0 {
            cq.inbox.note_poller(scratch.sent_to.thread());
        }
        let passed = |every: u32, after: u32| before / every != after / every;
        let all_local = self.remote_peers.load(Ordering::Relaxed) == 0;
        let look =
            if all_local { before % LOCAL_SOCKET_EVERY == LOCAL_SOCKET_EVERY - 1 } else { !cq.just_armed() };
        scratch.idle_polls = before.wrapping_add(if look && !all_local { SOCKET_POLL } else { 1 });
        let mut worked = false;
        let hold = if scratch.held.is_foreign() { LOCAL_HOLD } else { OWN_HOLD };
        if !scratch.held.is_empty() && (!all_local || before >= hold) {
            worked |= self.serve_held(scratch);
        }
        if before >= LOCAL_HOLD && !scratch.sent_to.is_empty() {
            worked |= self.serve_sent_to(true, scratch);
        } else if before >= OWN_HOLD && scratch.sent_to.has_own() {
            worked |= self.serve_sent_to(false, scratch);
        }
        if self.lists.runnable.len() > 0 || self.has_delayed() || passed(TIMERS_EVERY, scratch.idle_polls) {
            worked |= self.serve_lists(self.now(), scratch);
        }
        // Who holds the receiver does the same work at this moment.
        if look && let Ok(mut receiver) = self.receiver.try_lock() {
            worked |= self.receive(&mut receiver, scratch) > 0;
        }
        worked |= self.serve_sleepers(scratch);
        worked
    }

    /// One receive call and what follows from it; how many bytes came.
    pub(super) fn receive(&self, receiver: &mut Receiver, scratch: &mut Scratch) -> usize {
        let Receiver { buffer, icrcs, last } = receiver;
        match self.socket.receive(buffer) {
            Ok(Some(datagrams)) => {
                self.take_datagrams(&datagrams, icrcs, last, self.now(), scratch);
                datagrams.len().max(1)
            }
            // An error is one of the socket's, and no packet came: the transport's timers deal with that.
            Ok(None) | Err(_) => 0,
        }
    }

    /// Takes what waits in the socket, up to `left` bytes; who holds the receiver does the same at this moment.
    fn receive_arrived(&self, left: &mut usize, scratch: &mut Scratch) {
        let Ok(mut receiver) = self.receiver.try_lock() else { return };
        while *left > 0 {
            match self.receive(&mut receiver, scratch) {
                0 => break,
                received => *left = left.saturating_sub(received.max(PACKET)),
            }
        }
    }

    /// Sends the acknowledgements that this thread held and that nothing took along meanwhile.
    pub(super) fn serve_held(&self, scratch: &mut Scratch) -> bool {
        let mut worked = false;
        // Those that are held now: one that another thread is sending for comes back to the list.
        let held = scratch.held.take();
        for &qp_num in &held {
            // Most have answered meanwhile; one may be destroyed, which paid what it owed.
            let owes = |qp: &&Arc<QueuePair>| qp.listed.owes_ack.load(Ordering::Relaxed);
            let Some(qp) = self.queue_pairs().get(qp_num).filter(owes).cloned() else { continue };
            self.settle(&qp, qp.lock(), Acks::Flush, self.now(), scratch);
            worked = true;
        }
        scratch.held.give_back(held);
        worked
    }

    /// Queue pairs in turn, delayed sends and timers.
    pub(super) fn serve_lists(&self, now: Time, scratch: &mut Scratch) -> bool {
        let mut worked = false;
        for _ in 0..self.lists.runnable.len().min(PER_CALL) {
            let Some(qp) = self.lists.runnable.pop() else { break };
            let waits = self.settle(&qp, qp.lock(), Acks::Hold, now, scratch);
            worked = true;
            if waits {
                // Its receiver needs a processor, maybe this one. Who is next in turn most likely waits for the same.
                std::thread::yield_now();
                break;
            }
        }
        self.send_delayed();
        if now.nanoseconds() >= self.next_deadline.load(Ordering::Relaxed) {
            worked |= self.serve_timers(now, scratch);
        }
        worked
    }

    fn serve_timers(&self, now: Time, scratch: &mut Scratch) -> bool {
        let mut due = Vec::new();
        self.next_deadline.store(NEVER, Ordering::SeqCst);
        let earliest = self.lists.timers.take_due(now, &mut due);
        self.next_deadline.fetch_min(earliest, Ordering::SeqCst);
        let earliest = self.expire_moderated(now, &mut scratch.wakes);
        self.next_deadline.fetch_min(earliest, Ordering::SeqCst);
        let mut left = ARRIVED;
        for qp in &due {
            // An acknowledgement that has arrived is not late: with many to look after, sending again for one after the
            // other takes longer than the next timeout, and what answers them would never be looked at.
            self.receive_arrived(&mut left, scratch);
            let mut inner = qp.lock();
            with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
                machine.handle_timeout(now, &mut host);
            });
            // An acknowledgement that was held until now was held long enough.
            self.settle(qp, inner, Acks::Flush, now, scratch);
        }
        self.release_held(scratch);
        !due.is_empty()
    }

    /// Enters a queue pair into the lists that its state asks for.
    #[inline(never)]
    pub(super) fn note_state(&self, qp: &Arc<QueuePair>, inner: &Inner, now: Time, scratch: &mut Scratch) {
        let mut deadline = inner.machine.poll_timeout().map_or(NEVER, Time::nanoseconds);
        let owes = inner.machine.ack_pending();
        if owes != qp.listed.owes_ack.load(Ordering::Relaxed) {
            // Changed under the queue pair's lock only.
            qp.listed.owes_ack.store(owes, Ordering::Relaxed);
            if !owes {
                scratch.held.settled(qp.qp_num);
            }
        }
        if owes {
            let is_foreign = qp.recv_cq.inbox.is_for_another(scratch.sent_to.thread());
            scratch.held.add(qp.qp_num, now, is_foreign);
            deadline = deadline.min(now.nanoseconds() + TICK);
        }
        if self.lists.timers.set(qp, deadline) {
            self.expect_timer(deadline);
        }
    }

    /// A timer that is listed is due at `deadline`.
    #[inline(never)]
    pub(super) fn expect_timer(&self, deadline: u64) {
        self.next_deadline.fetch_min(deadline, Ordering::SeqCst);
        self.background.expect_by(deadline);
    }

    /// Arms a completion queue that a thread is about to sleep for.
    pub(crate) fn arm(&self, cq: &CompletionQueue, solicited_only: bool) -> io::Result<()> {
        if let Some(channel) = &cq.channel {
            channel.watch_socket(self)?;
        }
        cq.arm(solicited_only);
        // Packets that came before: their sender did not see that the queue is armed. See `Open::close`.
        fence(Ordering::SeqCst);
        scratch::with(|scratch| {
            if self.serve_inbox(cq, true, scratch) {
                self.serve_sleepers(scratch);
            }
        });
        Ok(())
    }

    /// Work that has no timer of its own is to be looked at soon.
    pub(super) fn note_deadline(&self, now: Time) {
        self.background.expect_by(now.nanoseconds());
    }
}
