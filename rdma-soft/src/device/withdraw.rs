//! What a program leaves behind on a context that it closes.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{AsyncEvents, Handle, QueuePair};
use crate::proto::State;

impl Handle {
    /// Takes the objects of a context out of use: its queue pairs go to RESET, where packets find nobody, and the
    /// regions and windows of its protection domains are not accessible any more. All of them can still be destroyed.
    pub(crate) fn withdraw(&self, events: &Arc<AsyncEvents>, domains: &BTreeSet<u32>) {
        // A forked child closes what its parent goes on using.
        if self.process != std::process::id() {
            return;
        }
        let belongs = |qp: &&Arc<QueuePair>| Arc::ptr_eq(&qp.async_events, events);
        let left: Vec<_> = self.queue_pairs().values().filter(belongs).cloned().collect();
        for qp in &left {
            self.multicast.detach_all(qp);
            let attributes = *qp.lock().machine.attributes();
            // RESET is reached from every state.
            let _ = self.modify_queue_pair(qp, State::Reset, &attributes, None);
        }
        self.memory.withdraw(domains);
    }
}
