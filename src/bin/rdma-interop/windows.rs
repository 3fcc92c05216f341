//! A key that its owner lends and a message takes back.

use rdma_core::qp::transport::Rc;
use rdma_core::{Observed, RegionFlags, RemoteAccess, RemoteSlice, WindowType, WorkRequest};

use crate::Fallible;
use crate::faults::settled_state;
use crate::session::{Pair, Role, Session, check, pattern};
use crate::transfers::{contents, patient};

/// The bytes that the window opens, in the middle of the region.
const SIZE: usize = 64;
const BEFORE: usize = 32;

impl Session {
    /// Send with invalidate: the message names the key of a memory window of its receiver, which is void once the
    /// message was received (IBTA volume 1, 9.4.1.1.3).
    pub(crate) fn send_with_invalidate(&mut self, size: usize) -> Fallible<String> {
        let pair = self.rc(1024, |options| {
            patient(options);
            // The last request is refused, once: if the network loses that, no number of retries brings an answer.
            options.retry_count = 6;
        })?;
        match self.role {
            Role::Requester => self.take_back(&pair, size),
            Role::Responder => self.lend(pair, size),
        }
    }

    fn take_back(&mut self, pair: &Pair<Rc>, size: usize) -> Fallible<String> {
        let token: RemoteSlice = self.link.hear()?;
        self.request(pair, WorkRequest::write(self.filled(SIZE)?, token))?;
        self.request(pair, WorkRequest::send_with_invalidate(self.filled(size)?, token.rkey))?;
        let again = WorkRequest::write(self.buffer(SIZE)?, token);
        let operation = pair.qp.start_send(again).map_err(|error| error.to_string())?;
        let finished = self.finish(operation)?;
        self.link.tell(&())?;
        match finished.result() {
            Ok(_) => Err("the key was good for a write after it was invalidated".into()),
            Err(error) if error.status().name() == Some("IBV_WC_REM_ACCESS_ERR") => Ok(String::new()),
            // A pair that refused a request has failed, and drops what comes then (10.3.1.7): the other side says that it did.
            Err(error) if self.lossy && error.status().name() == Some("IBV_WC_RETRY_EXC_ERR") => {
                Ok("the refusal was lost".to_owned())
            }
            Err(error) => Err(format!("a write after it: {}", error.status()).into()),
        }
    }

    fn lend(&mut self, pair: Pair<Rc>, size: usize) -> Fallible<String> {
        let window = self.domain.memory_window(WindowType::Two)?;
        let memory = vec![0xaa; SIZE + 2 * BEFORE];
        let region = self.domain.share_with(memory, RemoteAccess::empty(), RegionFlags::WINDOWS)?;
        let (bind, token) = window.bind(&region.slice(BEFORE..BEFORE + SIZE)?, RemoteAccess::WRITE)?;
        self.request(&pair, bind)?;
        let receive = pair.qp.start_recv(self.buffer(size)?).map_err(|error| error.to_string())?;
        self.link.tell(&token)?;
        let finished = self.finish(receive)?;
        let success = finished.result()?;
        // rxe does not name it (docs/INTEROP.md).
        let named = (!self.is_rxe).then_some(token.rkey);
        if (success.len(), success.invalidated_rkey()) != (size, named) {
            return Err(format!("length and invalidated key are {success:?}").into());
        }
        let buffer = finished.into_buffer().ok_or("no buffer came back")?;
        check("the message", &buffer, &pattern(size))?;
        self.link.hear::<()>()?;
        let state = settled_state(&pair, true)?;
        if state != Observed::Failed {
            return Err(format!("after the refused write the pair is {state:?}").into());
        }
        let mut expected = vec![0xaa; SIZE + 2 * BEFORE];
        expected[BEFORE..BEFORE + SIZE].copy_from_slice(&pattern(SIZE));
        check("the memory", &contents(&region)?, &expected)?;
        Ok(named.map_or("the receive does not name the key", |_| "the receive names the key").to_owned())
    }
}
