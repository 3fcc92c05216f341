//! The states of a queue pair, as types.

/// A state of the queue-pair state machine (IBTA vol. 1, 10.3.1). Sealed.
pub trait State: sealed::State + Send + Sync + 'static {
    /// The state's name.
    const NAME: &'static str;
}

/// Sends may be posted: RTS only. (A send posted in SQD waits, and in SQE or ERR it is flushed.)
#[diagnostic::on_unimplemented(
    message = "a queue pair in state `{Self}` cannot send",
    label = "sends need a queue pair in RTS",
    note = "drive it there first: `init`, then `rtr`, then `rts`, or `connect` for all of them"
)]
pub trait CanSend: State {}

/// Receives may be posted: from INIT on.
#[diagnostic::on_unimplemented(
    message = "a queue pair in state `{Self}` cannot receive",
    label = "receives need a queue pair in INIT or later",
    note = "call `init` first"
)]
pub trait CanRecv: State {}

/// INIT comes next: RESET only.
#[diagnostic::on_unimplemented(
    message = "a queue pair in state `{Self}` cannot go to INIT",
    label = "`init` needs a queue pair in RESET",
    note = "a new queue pair is in RESET; `reset` brings any other back there"
)]
pub trait CanInit: State {}

/// RTR comes next: INIT only.
#[diagnostic::on_unimplemented(
    message = "a queue pair in state `{Self}` cannot go to RTR",
    label = "`rtr` needs a queue pair in INIT",
    note = "the order is RESET, INIT, RTR, RTS: call `init` first, or `connect` for all of them"
)]
pub trait CanRtr: State {}

/// RTS comes next: RTR only. (From SQD and SQE, `resume` leads there.)
#[diagnostic::on_unimplemented(
    message = "a queue pair in state `{Self}` cannot go to RTS",
    label = "`rts` needs a queue pair in RTR",
    note = "the order is RESET, INIT, RTR, RTS: call `rtr` first, or `connect` for all of them"
)]
pub trait CanRts: State {}

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name(());
        impl sealed::State for $name {}
        impl State for $name { const NAME: &'static str = $text; }
    )*};
}

states! {
    /// Just created, or reset: nothing can be posted.
    Reset = "RESET";
    /// Receives can be posted; packets are dropped.
    Init = "INIT";
    /// Ready to receive.
    Rtr = "RTR";
    /// Ready to send.
    Rts = "RTS";
    /// Send queue drained: sends posted wait.
    Sqd = "SQD";
    /// Send queue error (UC and UD only): sends are flushed, receives go on.
    Sqe = "SQE";
    /// Failed or torn down: everything is flushed.
    Errored = "ERR";
}

impl CanInit for Reset {}
impl CanRtr for Init {}
impl CanRts for Rtr {}
impl CanSend for Rts {}
impl CanRecv for Init {}
impl CanRecv for Rtr {}
impl CanRecv for Rts {}
impl CanRecv for Sqd {}
impl CanRecv for Sqe {}

mod sealed {
    pub trait State {}
}
