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

impl CanSend for Rts {}
impl CanRecv for Init {}
impl CanRecv for Rtr {}
impl CanRecv for Rts {}
impl CanRecv for Sqd {}
impl CanRecv for Sqe {}

mod sealed {
    pub trait State {}
}
