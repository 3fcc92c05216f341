//! What there is to run.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the requester wants to run; both sides derive the same list from it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) mtus: Vec<u32>,
    pub(crate) sizes: Vec<usize>,
    pub(crate) lossy: bool,
    pub(crate) only: Option<String>,
}

/// How a message crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Send,
    SendImm,
    Write,
    WriteImm,
    Read,
}

/// The service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Rc,
    Uc,
}

/// What the requester does wrong, or the responder does not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    WriteWithWrongKey,
    WriteOutOfBounds,
    WriteWithoutPermission,
    ReadWithWrongKey,
    ReadOutOfBounds,
    ReadWithoutPermission,
    AtomicWithWrongKey,
    AtomicOutOfBounds,
    AtomicWithoutPermission,
    ReceiveTooSmall,
    ReceiveNeverPosted,
    ResponderGone,
}

/// One thing to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Transfer {
        service: Service,
        verb: Verb,
        mtu: u32,
        size: usize,
    },
    /// Compare-and-swap and fetch-and-add.
    Atomics,
    /// A message that takes the key of a memory window back.
    SendWithInvalidate {
        size: usize,
    },
    Datagram {
        size: usize,
    },
    /// A datagram that carries the sender's own Q_Key.
    OwnQKey,
    /// The receive comes some time after the message.
    SlowReceiver,
    Fault(Fault),
}

impl Plan {
    pub(crate) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        let verbs = |service| match service {
            Service::Rc => &[Verb::Send, Verb::SendImm, Verb::Write, Verb::WriteImm, Verb::Read][..],
            Service::Uc => &[Verb::Send, Verb::Write],
        };
        for service in [Service::Rc, Service::Uc] {
            // Nothing says that an unreliable message arrives.
            if service == Service::Uc && self.lossy {
                continue;
            }
            for &verb in verbs(service) {
                for &mtu in &self.mtus {
                    cases.extend(self.sizes.iter().map(|&size| Case::Transfer { service, verb, mtu, size }));
                }
            }
        }
        cases.extend([Case::Atomics, Case::SlowReceiver]);
        // One packet, and several.
        cases.extend([8, 3000].map(|size| Case::SendWithInvalidate { size }));
        if !self.lossy {
            cases.push(Case::OwnQKey);
            cases
                .extend(self.sizes.iter().filter(|&&size| size <= 4096).map(|&size| Case::Datagram { size }));
            cases.extend(
                [
                    Fault::WriteWithWrongKey,
                    Fault::WriteOutOfBounds,
                    Fault::WriteWithoutPermission,
                    Fault::ReadWithWrongKey,
                    Fault::ReadOutOfBounds,
                    Fault::ReadWithoutPermission,
                    Fault::AtomicWithWrongKey,
                    Fault::AtomicOutOfBounds,
                    Fault::AtomicWithoutPermission,
                    Fault::ReceiveTooSmall,
                    Fault::ReceiveNeverPosted,
                    Fault::ResponderGone,
                ]
                .map(Case::Fault),
            );
        }
        let wanted = |case: &Case| self.only.as_ref().is_none_or(|only| case.to_string().contains(only));
        cases.into_iter().filter(wanted).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Case::Transfer { service, verb, mtu, size } => {
                let service = match service {
                    Service::Rc => "RC",
                    Service::Uc => "UC",
                };
                let verb = match verb {
                    Verb::Send => "send",
                    Verb::SendImm => "send with immediate",
                    Verb::Write => "write",
                    Verb::WriteImm => "write with immediate",
                    Verb::Read => "read",
                };
                write!(f, "{service} {verb}, {size} bytes, path MTU {mtu}")
            }
            Case::Atomics => f.write_str("RC compare-and-swap, fetch-and-add"),
            Case::SendWithInvalidate { size } => write!(f, "RC send with invalidate, {size} bytes"),
            Case::OwnQKey => f.write_str("UD send with the sender's own Q_Key"),
            Case::Datagram { size } => write!(f, "UD send, {size} bytes"),
            Case::SlowReceiver => f.write_str("RC send before the receive is posted"),
            Case::Fault(fault) => f.write_str(match fault {
                Fault::WriteWithWrongKey => "error: write with a wrong key",
                Fault::WriteOutOfBounds => "error: write out of bounds",
                Fault::WriteWithoutPermission => "error: write without permission",
                Fault::ReadWithWrongKey => "error: read with a wrong key",
                Fault::ReadOutOfBounds => "error: read out of bounds",
                Fault::ReadWithoutPermission => "error: read without permission",
                Fault::AtomicWithWrongKey => "error: atomic with a wrong key",
                Fault::AtomicOutOfBounds => "error: atomic out of bounds",
                Fault::AtomicWithoutPermission => "error: atomic without permission",
                Fault::ReceiveTooSmall => "error: message longer than its receive",
                Fault::ReceiveNeverPosted => "error: no receive, one retry",
                Fault::ResponderGone => "error: the responder is gone",
            }),
        }
    }
}
