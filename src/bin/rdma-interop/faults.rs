//! Requests that must fail, with what each side reports (IBTA volume 1, 9.9 and 10.10).

use std::time::{Duration, Instant};

use rdma_core::qp::transport::Rc;
use rdma_core::{AsyncEvents, Event, EventKind, Observed, RemoteAccess, RemoteSlice, WorkRequest};

use crate::Fallible;
use crate::cases::Fault;
use crate::session::{Pair, Role, Session};

/// The size of the memory that the responder shares, and of the messages.
const SIZE: usize = 64;

/// What the completions of both sides say; `None` where a side has none.
struct Expected {
    requester: &'static str,
    receive: Option<&'static str>,
}

impl Fault {
    /// What the specification says, but where the responder is the kernel's rxe and known to differ
    /// (docs/INTEROP.md).
    fn expected(self, responder_is_rxe: bool) -> Expected {
        let receive = match self {
            // rxe takes the receive for malformed.
            Fault::ReceiveTooSmall if responder_is_rxe => {
                return Expected { requester: "IBV_WC_REM_OP_ERR", receive: Some("IBV_WC_LOC_QP_OP_ERR") };
            }
            Fault::ReceiveTooSmall => Some("IBV_WC_LOC_LEN_ERR"),
            _ => None,
        };
        let requester = match self {
            Fault::WriteWithWrongKey
            | Fault::WriteOutOfBounds
            | Fault::WriteWithoutPermission
            | Fault::ReadWithWrongKey
            | Fault::ReadOutOfBounds
            | Fault::ReadWithoutPermission
            | Fault::AtomicWithWrongKey
            | Fault::AtomicOutOfBounds
            | Fault::AtomicWithoutPermission => "IBV_WC_REM_ACCESS_ERR",
            Fault::ReceiveTooSmall => "IBV_WC_REM_INV_REQ_ERR",
            Fault::ReceiveNeverPosted => "IBV_WC_RNR_RETRY_EXC_ERR",
            Fault::ResponderGone => "IBV_WC_RETRY_EXC_ERR",
        };
        Expected { requester, receive }
    }

    /// What the shared memory permits.
    fn access(self) -> RemoteAccess {
        match self {
            Fault::WriteWithoutPermission | Fault::AtomicWithoutPermission => RemoteAccess::READ,
            Fault::ReadWithoutPermission => RemoteAccess::WRITE,
            _ => RemoteAccess::all(),
        }
    }

    /// The pair of a responder that refused a request is in the error state; one that could not
    /// take a message yet is not (IBTA volume 1, 9.9.3).
    fn fails_responder(self) -> bool {
        !matches!(self, Fault::ReceiveNeverPosted | Fault::ResponderGone)
    }
}

impl Session {
    pub(crate) fn fault(&mut self, fault: Fault) -> Fallible<String> {
        let pair = self.rc(1024, |options| {
            if fault == Fault::ReceiveNeverPosted {
                options.rnr_retry = 1;
            }
            options.retry_count = 3;
        })?;
        match self.role {
            Role::Requester => self.do_wrong(&pair, fault),
            Role::Responder => self.be_wronged(pair, fault),
        }
    }

    fn do_wrong(&mut self, pair: &Pair<Rc>, fault: Fault) -> Fallible<String> {
        let responder_is_rxe: bool = self.link.hear()?;
        let expected = fault.expected(responder_is_rxe).requester;
        let target: RemoteSlice = self.link.hear()?;
        let wrong_key = RemoteSlice { rkey: target.rkey ^ 0x5a5a_5a5a, ..target };
        // Half of it lies behind the end.
        let beyond = RemoteSlice { addr: target.addr + SIZE as u64 / 2, ..target };
        let word = RemoteSlice { len: 8, ..target };
        let buffer = self.buffer(SIZE)?;
        let request = match fault {
            Fault::WriteWithWrongKey => WorkRequest::write(buffer, wrong_key),
            Fault::WriteOutOfBounds => WorkRequest::write(buffer, beyond),
            Fault::WriteWithoutPermission => WorkRequest::write(buffer, target),
            Fault::ReadWithWrongKey => WorkRequest::read(buffer, wrong_key),
            Fault::ReadOutOfBounds => WorkRequest::read(buffer, beyond),
            Fault::ReadWithoutPermission => WorkRequest::read(buffer, target),
            Fault::AtomicWithWrongKey => {
                WorkRequest::fetch_and_add(self.buffer(8)?, RemoteSlice { rkey: wrong_key.rkey, ..word }, 1)
            }
            Fault::AtomicOutOfBounds => {
                let behind = RemoteSlice { addr: target.addr + SIZE as u64, ..word };
                WorkRequest::compare_and_swap(self.buffer(8)?, behind, 0x7777_7777_7777_7777, 1)
            }
            Fault::AtomicWithoutPermission => WorkRequest::fetch_and_add(self.buffer(8)?, word, 1),
            Fault::ReceiveTooSmall | Fault::ReceiveNeverPosted | Fault::ResponderGone => {
                WorkRequest::send(buffer)
            }
        };
        let operation = pair.qp.start_send(request).map_err(|error| error.to_string())?;
        let finished = self.finish(operation)?;
        let verdict = match finished.result() {
            Ok(_) => Err(format!("the request succeeded instead of {expected}").into()),
            Err(error) if error.status().name() == Some(expected) => Ok(expected.to_owned()),
            Err(error) => Err(format!("{} instead of {expected}", error.status()).into()),
        };
        self.link.tell(&())?;
        verdict
    }

    fn be_wronged(&mut self, pair: Pair<Rc>, fault: Fault) -> Fallible<String> {
        let expected = fault.expected(self.is_rxe).receive;
        self.link.tell(&self.is_rxe)?;
        let events = self.context.events()?;
        let region = self.domain.share(vec![0x77; SIZE], fault.access())?;
        let receive = match fault {
            Fault::ReceiveTooSmall => {
                Some(pair.qp.start_recv(self.buffer(SIZE - 1)?).map_err(|error| error.to_string())?.detach())
            }
            _ => None,
        };
        let pair = (fault != Fault::ResponderGone).then_some(pair);
        self.link.tell(&region.remote())?;
        self.link.hear::<()>()?;

        let mut memory = vec![0; SIZE];
        region.copy_out(0, &mut memory)?;
        if memory.iter().any(|&byte| byte != 0x77) {
            return Err("memory was changed".into());
        }
        if let Some(operation) = receive {
            let finished = operation.wait(self.limit).map_err(|(error, _)| error)?;
            match finished.result() {
                Err(error) if error.status().name() == expected => {}
                Err(error) => {
                    return Err(format!("the receive: {} instead of {expected:?}", error.status()).into());
                }
                Ok(_) => return Err("the receive succeeded".into()),
            }
        }
        let Some(pair) = pair else { return Ok(String::new()) };
        let state = settled_state(&pair, fault.fails_responder())?;
        if (state == Observed::Failed) != fault.fails_responder() {
            return Err(format!("afterwards the responder's pair is {state:?}").into());
        }
        let event = if fault.fails_responder() { event_of(&events, pair.qp.num())? } else { None };
        Ok(format!("responder {state:?}, event {event:?}"))
    }
}

/// The asynchronous event of a pair, if one comes within a moment.
fn event_of(events: &AsyncEvents, pair: u32) -> Fallible<Option<EventKind>> {
    let deadline = Instant::now() + Duration::from_millis(200);
    while Instant::now() < deadline {
        while let Some(event) = events.next_event()? {
            if let Event::QueuePair(kind, Some(handle)) = event
                && handle.num() == pair
            {
                return Ok(Some(kind));
            }
        }
        let _ = events.wait(Duration::from_millis(20))?;
    }
    Ok(None)
}

/// The state of a pair, after a moment for it to fail in if it should.
pub(crate) fn settled_state(pair: &Pair<Rc>, should_fail: bool) -> Fallible<Observed> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let state = pair.qp.observe()?;
        if !should_fail || state == Observed::Failed || Instant::now() > deadline {
            return Ok(state);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
