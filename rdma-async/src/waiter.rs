//! How one future waits for a completion of a queue.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rdma_core::Error;

use crate::{
    duty::Role,
    queue::{Shared, yield_to_runtime},
    wait::{BUSY_TURN, WaitMode},
};

/// Looks at the queue between two at the clock, and at what others may have found: either takes as long as a look at an adapter's queue.
const ROUND: u64 = 8;

/// So many operations, and messages, in a row may be ready at their first polls before the next one lets other tasks run: a program that
/// awaits them in a loop would keep its thread for itself.
pub(crate) const IN_A_ROW: u64 = 4096;

/// So long the futures of a queue may find what they wait for by spinning before one of them lets other tasks run: they may be about to post
/// what would be under way at the same time.
const TURN: Duration = Duration::from_micros(200);

#[derive(Clone, Copy)]
enum Rest {
    Not,
    OnPoller,
    GivesWay,
}

/// When futures of a queue last let others run.
#[derive(Debug)]
pub(crate) struct Turn {
    epoch: Instant,
    /// Nanoseconds since then.
    began: AtomicU64,
}

impl Turn {
    pub(crate) fn new() -> Turn {
        Turn { epoch: Instant::now(), began: AtomicU64::new(0) }
    }

    /// Whether the turn is over; then the next one begins.
    #[inline]
    fn is_over(&self, now: Instant) -> bool {
        let now = u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX);
        let is_over = now.wrapping_sub(self.began.load(Relaxed)) >= u64::from(TURN.subsec_nanos());
        if is_over {
            self.began.store(now, Relaxed);
        }
        is_over
    }
}

/// One future's wait for a completion of a queue, over any number of polls.
pub(crate) struct Waiter<'q> {
    queue: &'q Shared,
    /// When it first looked in vain.
    since: Option<Instant>,
    /// It counts among those who wait on the queue.
    is_counted: bool,
    /// It looks for all who wait, within this poll.
    spins: bool,
    /// Why it is pending since this poll, before it looked for itself.
    rests: Rest,
}

impl<'q> Waiter<'q> {
    #[inline]
    pub(crate) fn new(queue: &'q Shared) -> Self {
        Waiter { queue, since: None, is_counted: false, spins: false, rests: Rest::Not }
    }

    /// Polls until `check` is ready, or somebody else looks, or it is time to let other tasks run.
    ///
    /// `check` looks whether what the future waits for is there; with a context it registers the waker if not.
    ///
    /// # Errors
    ///
    /// A poll of the completion queue that failed: what the future waits for may never come.
    #[inline]
    pub(crate) fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut check: impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Poll<Result<T, Error>> {
        if let Poll::Ready(value) = check(None) {
            self.found();
            return Poll::Ready(Ok(value));
        }
        // Where futures sleep, arming the queue reads what is there, and an armed one tells of what comes.
        if !self.queue.duty.is_polled() && !self.sleeps_at_once() {
            match self.queue.dispatch() {
                Ok(0) => {}
                Ok(_) => {
                    if let Poll::Ready(value) = check(None) {
                        self.found();
                        return Poll::Ready(Ok(value));
                    }
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        let result = self.wait(cx, check);
        // A poll that was cut short by an error, or by a panic of a waker: see `drop`.
        if self.spins {
            self.found();
        }
        result
    }

    fn wait<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut check: impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Poll<Result<T, Error>> {
        let queue = self.queue;
        loop {
            let spin =
                if queue.mode == WaitMode::Event { self.rely_or_sleep() } else { self.spin(&mut check) };
            match spin {
                Ok(Spin::Found(value)) => {
                    self.found();
                    return Poll::Ready(Ok(value));
                }
                Ok(Spin::Rely) => {
                    if let Poll::Ready(value) = check(Some(cx)) {
                        self.found();
                        return Poll::Ready(Ok(value));
                    }
                    // With the waker in place: whoever gives up the duty for good wakes all.
                    if queue.duty.is_seen_to() {
                        return Poll::Pending;
                    }
                }
                Ok(Spin::Yield) => {
                    // In its place in line before others run.
                    if let Poll::Ready(value) = check(Some(cx)) {
                        self.found();
                        return Poll::Ready(Ok(value));
                    }
                    yield_to_runtime(cx);
                    return Poll::Pending;
                }
                Ok(Spin::Sleep) => break,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        // Sleep. The future counts as waiting; then its waker, then the flag: an event that the driver takes after it saw nobody wait
        // leaves the flag cleared for us, and any other dispatches our completion, whose waker is in place.
        if let Poll::Ready(value) = check(Some(cx)) {
            self.found();
            return Poll::Ready(Ok(value));
        }
        match self.fall_asleep() {
            Ok(true) => return Poll::Pending,
            Ok(false) => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
        match check(None) {
            Poll::Ready(value) => {
                self.found();
                Poll::Ready(Ok(value))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Whether a wait does not begin with spinning.
    #[inline]
    pub(crate) fn sleeps_at_once(&self) -> bool {
        self.queue.mode == WaitMode::Event
    }

    /// Goes to sleep; the waker is where it will be called. False when the queue had to be armed, which dispatched what had come before:
    /// then a last look is due.
    #[inline]
    pub(crate) fn sleep(&mut self) -> Result<bool, Error> {
        if self.count() && self.queue.post.is_reliable() {
            return Ok(true);
        }
        self.fall_asleep()
    }

    /// One that sleeps, because the queue is armed: its waker is to be registered under the lock under which nothing was found. Then it is
    /// pending: whoever takes the event dispatches under that lock, and then sees that it is counted.
    #[inline]
    pub(crate) fn asleep(queue: &'q Shared) -> Option<Self> {
        if queue.mode != WaitMode::Event || !queue.duty.rely_on_event() {
            return None;
        }
        queue.statistics.sleeps.fetch_add(1, Relaxed);
        Some(Waiter { queue, since: None, is_counted: true, spins: false, rests: Rest::Not })
    }

    /// One that relies on the poller, if it looks: its waker is to be registered, and then `rests` to be asked.
    #[inline]
    pub(crate) fn relying(queue: &'q Shared) -> Option<Self> {
        let relies = queue.duty.is_polled() && queue.duty.join(|| queue.post.is_reliable());
        relies.then(|| Waiter { queue, since: None, is_counted: true, spins: false, rests: Rest::OnPoller })
    }

    /// One that lets other tasks run: `yield_to_runtime` must follow, without locks. It does not count as waiting.
    #[inline]
    pub(crate) fn giving_way(queue: &'q Shared) -> Self {
        let mut waiter = Waiter::new(queue);
        waiter.rests = Rest::GivesWay;
        waiter
    }

    /// Whether the future is pending since this poll; its waker is registered by now.
    #[inline]
    pub(crate) fn rests(&mut self) -> bool {
        match std::mem::replace(&mut self.rests, Rest::Not) {
            Rest::Not => false,
            Rest::GivesWay => true,
            // Who gives up polling wakes all whose wakers are there.
            Rest::OnPoller => self.queue.duty.is_seen_to(),
        }
    }

    /// Counts as waiting from now on; whether the poller looks.
    #[inline]
    fn count(&mut self) -> bool {
        let duty = &self.queue.duty;
        if self.is_counted {
            return duty.is_polled() && duty.is_seen_to();
        }
        self.is_counted = true;
        duty.count()
    }

    #[inline]
    fn fall_asleep(&mut self) -> Result<bool, Error> {
        self.queue.statistics.sleeps.fetch_add(1, Relaxed);
        self.queue.driver.check()?;
        let Some(is_to_arm) = self.queue.duty.sleep(self.spins) else {
            // It ended in between.
            self.queue.driver.check()?;
            return Ok(false);
        };
        self.spins = false;
        if !is_to_arm {
            return Ok(true);
        }
        match self.queue.arm_and_drain() {
            Ok(_) => Ok(false),
            Err(error) => {
                // Those who relied on this meet the error themselves.
                self.queue.wake_all();
                Err(error)
            }
        }
    }

    /// What a future that does not spin does instead.
    fn rely_or_sleep<T>(&mut self) -> Result<Spin<T>, Error> {
        Ok(if self.count() && self.queue.post.is_reliable() { Spin::Rely } else { Spin::Sleep })
    }

    fn spin<T>(
        &mut self,
        check: &mut impl FnMut(Option<&mut Context<'_>>) -> Poll<T>,
    ) -> Result<Spin<T>, Error> {
        let queue = self.queue;
        let is_busy = queue.mode == WaitMode::Busy;
        let role = queue.duty.enter(self.is_counted, is_busy, || queue.post.is_reliable());
        self.is_counted = true;
        match role {
            Role::Spin => self.spins = true,
            // Others look too: by turns, one look each.
            Role::SpinApart => {}
            Role::Rely => return Ok(Spin::Rely),
            Role::Call => {
                queue.call_poller();
                return Ok(Spin::Rely);
            }
        }
        let now = Instant::now();
        let (start, limit) =
            if is_busy { (now, BUSY_TURN) } else { (*self.since.get_or_insert(now), queue.times.spin()) };
        // At the first poll that finds nothing; later ones are those of a future that others ran before.
        if start == now && queue.turn.is_over(now) {
            return Ok(self.hand_over());
        }
        let mut spins = 0;
        let end = loop {
            let is_round = spins % ROUND == 0;
            if is_round && start.elapsed() >= limit {
                break if is_busy { self.hand_over() } else { Spin::Sleep };
            }
            spins += 1;
            // No pause, as a lock that is waited for has: what is found a little later is late.
            let dispatched = queue.dispatch()?;
            // Also without a completion: another thread may have dispatched ours.
            if (dispatched > 0 || is_round)
                && let Poll::Ready(value) = check(None)
            {
                break Spin::Found(value);
            }
            // Other futures were woken, probably of this thread: they have something to do, this one has not.
            if role == Role::SpinApart || dispatched > 0 && queue.duty.has_others() {
                break self.hand_over();
            }
        };
        queue.statistics.spins.fetch_add(spins, Relaxed);
        Ok(end)
    }

    /// Spins no longer, because others wait too, or want to run.
    fn hand_over<T>(&mut self) -> Spin<T> {
        if !std::mem::take(&mut self.spins) {
            return Spin::Yield;
        }
        let Some(is_to_call) = self.queue.duty.hand_over() else { return Spin::Yield };
        if is_to_call {
            self.queue.call_poller();
        }
        if self.queue.post.is_reliable() { Spin::Rely } else { Spin::Yield }
    }

    /// What the future waited for is there.
    #[inline]
    pub(crate) fn found(&mut self) {
        self.leave();
        if let Some(since) = self.since.take() {
            self.queue.times.learn(since.elapsed());
        }
    }

    #[inline]
    fn leave(&mut self) {
        if std::mem::take(&mut self.is_counted) && self.queue.duty.leave(std::mem::take(&mut self.spins)) {
            self.queue.call_poller();
        }
    }
}

enum Spin<T> {
    Found(T),
    /// Somebody else looks.
    Rely,
    Yield,
    Sleep,
}

impl Drop for Waiter<'_> {
    #[inline]
    fn drop(&mut self) {
        self.leave();
    }
}
