//! What was posted and has not completed yet: each request completes at most once, and in order.

use std::collections::VecDeque;

/// Marks the identifiers of receives, since the opcode of a failed completion says nothing.
pub const RECEIVE: u64 = 1 << 63;

/// The work queues of one queue pair.
#[derive(Debug, Default)]
pub struct Account {
    /// Identifier, and whether it completes when it succeeds.
    sends: VecDeque<(u64, bool)>,
    receives: VecDeque<u64>,
}

impl Account {
    pub fn sent(&mut self, wr_id: u64, signaled: bool) {
        self.sends.push_back((wr_id, signaled));
    }

    pub fn received(&mut self, wr_id: u64) {
        self.receives.push_back(wr_id);
    }

    /// A send completed. Those before it did not ask to complete, unless completions were `lost`.
    pub fn complete_send(&mut self, wr_id: u64, success: bool, lost: bool) {
        while let Some((next, signaled)) = self.sends.pop_front() {
            if next == wr_id {
                assert!(signaled || !success, "send {wr_id} completed though nobody asked");
                return;
            }
            assert!(lost || !signaled, "send {next} was passed over by {wr_id}");
        }
        panic!("send {wr_id} completed twice or was never posted");
    }

    pub fn complete_receive(&mut self, wr_id: u64, lost: bool) {
        while let Some(next) = self.receives.pop_front() {
            if next == wr_id {
                return;
            }
            assert!(lost, "receive {next} was passed over by {wr_id}");
        }
        panic!("receive {wr_id} completed twice or was never posted");
    }

    /// After everything was flushed and polled: what is left succeeded in silence.
    pub fn assert_settled(&self) {
        assert!(self.sends.iter().all(|(_, signaled)| !signaled), "sends left: {:?}", self.sends);
        assert!(self.receives.is_empty(), "receives left: {:?}", self.receives);
    }
}
