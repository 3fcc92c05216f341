//! What programs ask of queue pairs: create, change, post, destroy.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::Device;
use super::completion_queue::{CompletionQueue, Polled};
use super::peer::Peer;
use super::queue_pair::{Inner, Parts, QpHost, QueuePair, flushed_receive, with_host};
use super::receive_queue::ReceiveError;
use super::scratch::{self, Scratch};
use super::slab::Full;
use crate::proto::{self, Acks, Attributes, Host, ModifyError, PostError, SendRequest, Sge, State, Time};
use crate::wire::Transport;

/// Takes requests for a queue pair whose lock is held.
pub(crate) struct Poster<'a> {
    machine: &'a mut proto::QueuePair,
    host: QpHost<'a>,
    now: Time,
}

/// A receive queue that keeps what is posted, locked.
pub(crate) struct KeptReceives<'q> {
    inner: MutexGuard<'q, Inner>,
    polled: &'q Polled,
}

impl KeptReceives<'_> {
    #[inline(always)]
    pub(crate) fn push(
        &mut self,
        wr_id: u64,
        sges: impl ExactSizeIterator<Item = Sge>,
    ) -> Result<(), ReceiveError> {
        self.inner.receive.push(self.polled, wr_id, sges)
    }
}

impl QueuePair {
    /// For a list of receives: the receive queue, locked, if the queue pair just keeps them in its state.
    pub(crate) fn lock_receives(&self) -> Option<KeptReceives<'_>> {
        let inner = self.lock();
        let keeps = self.srq.is_none() && !matches!(inner.machine.state(), State::Reset | State::Err);
        keeps.then(|| KeptReceives { inner, polled: &self.recv_place.polled })
    }
}

impl Poster<'_> {
    #[inline(always)]
    pub(crate) fn post(&mut self, request: &SendRequest<'_>) -> Result<(), PostError> {
        self.machine.post_send(self.now, &mut self.host, request)
    }
}

impl Device {
    pub(crate) fn create_completion_queue(&self, cq: CompletionQueue) -> Arc<CompletionQueue> {
        let cq = Arc::new(cq);
        let mut all = self.completion_queues.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::downgrade(&cq));
        cq
    }

    pub(crate) fn create_queue_pair(&self, parts: Parts) -> Result<Arc<QueuePair>, Full> {
        let mut created = None;
        // 0 and 1 are the management queue pairs, the highest number is that of multicast.
        self.queue_pairs_mut().insert_with(
            |qp_num| qp_num > 1 && qp_num != 0xff_ffff,
            |qp_num| {
                let qp = Arc::new(QueuePair::new(parts, qp_num));
                created = Some(Arc::clone(&qp));
                qp
            },
        )?;
        let qp = created.ok_or(Full)?;
        // Anybody may send to a datagram queue pair, and its route header shows the traffic class; a socket
        // that cannot say it leaves it at zero.
        if qp.transport == Transport::Ud {
            self.remote_peers.fetch_add(1, Ordering::Relaxed);
            let _ = self.socket.report_traffic_class();
        }
        qp.send_cq.users.fetch_add(1, Ordering::AcqRel);
        qp.recv_cq.users.fetch_add(1, Ordering::AcqRel);
        if let Some(srq) = &qp.srq {
            srq.users.fetch_add(1, Ordering::AcqRel);
        }
        Ok(qp)
    }

    /// Packets for it find nobody from now on, and its timers are off. What it posted is forgotten without
    /// completions.
    pub(crate) fn destroy_queue_pair(&self, qp: &Arc<QueuePair>) {
        self.send_owed(qp);
        self.queue_pairs_mut().remove(qp.qp_num);
        self.lists.destroyed.fetch_add(1, Ordering::Release);
        scratch::with(|scratch| {
            let mut inner = qp.lock();
            let now = self.now();
            let attributes = *inner.machine.attributes();
            // RESET is reached from every state.
            let _ = with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
                machine.modify(now, &mut host, State::Reset, &attributes)
            });
            self.forget(qp, &mut inner);
            qp.listed.owes_ack.store(false, Ordering::Relaxed);
        });
        qp.send_cq.remove_work_queue(&qp.send_place);
        qp.recv_cq.remove_work_queue(&qp.recv_place);
        if qp.transport == Transport::Ud {
            self.remote_peers.fetch_sub(1, Ordering::Relaxed);
        }
        qp.send_cq.users.fetch_sub(1, Ordering::AcqRel);
        qp.recv_cq.users.fetch_sub(1, Ordering::AcqRel);
        if let Some(srq) = &qp.srq {
            srq.users.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Sends an acknowledgement that was held. A peer waits for it, and what is owed would be forgotten: the
    /// program saw the message complete, so the peer must be able to see it too.
    ///
    /// Alone, for a thread that sends for the queue pair at this moment would keep it for company; and the machine is asked, for the
    /// program may have seen the completion before anybody noted what it owes.
    fn send_owed(&self, qp: &Arc<QueuePair>) {
        // Answers that the peer asked for come before it.
        scratch::with(|scratch| {
            self.settle(qp, qp.lock(), Acks::Flush, self.now(), scratch);
            self.serve_sleepers(scratch);
        });
        self.send_owed_of(qp, qp.lock());
    }

    fn send_owed_of(&self, qp: &Arc<QueuePair>, mut inner: MutexGuard<'_, Inner>) {
        scratch::with(|scratch| {
            let now = self.now();
            if self.fill_owed(qp, &mut inner, now, scratch) {
                self.note_state(qp, &inner, now, scratch);
                drop(inner);
                self.send_batch(scratch);
                self.serve_sleepers(scratch);
            }
        });
    }

    /// The process ends in an orderly way: sends what is owed. Nothing is waited for, as other threads may be anywhere.
    pub(super) fn send_all_owed(&self) {
        let Ok(queue_pairs) = self.queue_pairs.try_read() else { return };
        let all: Vec<_> = queue_pairs.values().cloned().collect();
        drop(queue_pairs);
        for qp in &all {
            if let Some(inner) = qp.try_lock().filter(|inner| inner.machine.ack_pending()) {
                self.send_owed_of(qp, inner);
            }
        }
    }

    /// Moves a queue pair to another state or changes its attributes. `peer`: where its packets go from now
    /// on, if that changes, and with what traffic class.
    pub(crate) fn modify_queue_pair(
        &self,
        qp: &Arc<QueuePair>,
        to: State,
        attributes: &Attributes,
        peer: Option<(IpAddr, u8)>,
    ) -> Result<(), ModifyError> {
        if matches!(to, State::Reset | State::Err) {
            self.send_owed(qp);
        }
        let peer = peer.map(|(address, traffic_class)| self.peer_at(address, traffic_class));
        scratch::with(|scratch| {
            let mut inner = qp.lock();
            let now = self.now();
            with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
                machine.modify(now, &mut host, to, attributes)
            })?;
            if to == State::Reset {
                self.forget(qp, &mut inner);
            }
            if let Some(peer) = peer {
                self.count_remote(qp, inner.peer.as_deref(), Some(&peer));
                inner.peer = Some(Arc::new(peer));
            }
            self.settle(qp, inner, Acks::Hold, now, scratch);
            self.serve_sleepers(scratch);
            Ok(())
        })
    }

    /// Posts the requests that `post` gives one by one, then sends.
    pub(crate) fn post_send(&self, qp: &Arc<QueuePair>, post: impl FnOnce(&mut Poster<'_>)) {
        scratch::with(|scratch| self.post_locked(qp, qp.lock(), scratch, post));
    }

    /// The same if `check` allows it, given how many completions of sends wait to be polled; nobody else posts before `post` does.
    pub(crate) fn post_send_checked(
        &self,
        qp: &Arc<QueuePair>,
        check: impl FnOnce(&proto::QueuePair, u32) -> Result<(), PostError>,
        post: impl FnOnce(&mut Poster<'_>),
    ) -> Result<(), PostError> {
        scratch::with(|scratch| {
            let inner = qp.lock();
            check(&inner.machine, qp.send_place.polled.waiting_of(inner.completed_sends))?;
            self.post_locked(qp, inner, scratch, post);
            Ok(())
        })
    }

    fn post_locked<'q>(
        &self,
        qp: &'q Arc<QueuePair>,
        mut inner: MutexGuard<'q, Inner>,
        scratch: &mut Scratch,
        post: impl FnOnce(&mut Poster<'_>),
    ) {
        let now = self.now();
        with_host!(self, qp, inner, &mut scratch.wakes, now, |machine, host| {
            post(&mut Poster { machine, host, now });
        });
        // What is owed goes with what was posted.
        self.settle(qp, inner, Acks::Flush, now, scratch);
        self.serve_sleepers(scratch);
    }

    pub(crate) fn post_receive(
        &self,
        qp: &QueuePair,
        wr_id: u64,
        sges: impl ExactSizeIterator<Item = Sge>,
    ) -> Result<(), ReceiveError> {
        let mut inner = qp.lock();
        match inner.machine.state() {
            _ if qp.srq.is_some() => return Err(ReceiveError::WrongState),
            State::Reset => return Err(ReceiveError::WrongState),
            State::Err => {}
            _ => return inner.receive.push(&qp.recv_place.polled, wr_id, sges),
        }
        // Clause 10.3.1.6: what is posted to a failed queue pair is flushed.
        if sges.len() > inner.receive.ring.max_sge() {
            return Err(ReceiveError::TooManySges);
        }
        // Flushed or not, it keeps its place until that is polled.
        if !inner.receive.take_place(&qp.recv_place.polled) {
            return Err(ReceiveError::Full);
        }
        scratch::with(|scratch| {
            with_host!(self, qp, inner, &mut scratch.wakes, self.now(), |_machine, host| {
                host.complete(flushed_receive(wr_id));
            });
            drop(inner);
        });
        Ok(())
    }

    /// What a reset forgets beside the state machine, completions that were not polled yet among it.
    fn forget(&self, qp: &QueuePair, inner: &mut Inner) {
        self.count_remote(qp, inner.peer.as_deref(), None);
        inner.peer = None;
        qp.send_cq.purge(qp.qp_num);
        qp.recv_cq.purge(qp.qp_num);
        inner.receive.clear(&qp.recv_place.polled);
    }

    /// Counts connections to other processes, as their packets come through the socket.
    fn count_remote(&self, qp: &QueuePair, before: Option<&Peer>, after: Option<&Peer>) {
        let is_remote =
            |peer: Option<&Peer>| qp.transport != Transport::Ud && peer.is_some_and(|p| !p.is_local);
        match (is_remote(before), is_remote(after)) {
            (false, true) => self.remote_peers.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.remote_peers.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
    }
}
