//! What differs between the connected transports.

use rdma_core::{
    Buffer, ConnectOptions, Endpoint, Error, QueuePair, Success, WorkCompletion,
    qp::{
        state::{Init, Rts},
        transport::{self, ConnectedInit, Rc, RdmaWrite, Uc},
    },
};

use crate::{
    lane::Carries,
    message::{Message, Note},
};

/// A transport that connects two queue pairs: [`Rc`] or [`Uc`]. Sealed.
pub trait Connected:
    transport::Connected + RdmaWrite + transport::Transport<Init = ConnectedInit> + Sealed
{
}

impl Connected for Rc {}
impl Connected for Uc {}

/// What the exchange and the watcher need to know.
pub trait Sealed: Carries<Mail = Message> {
    /// Names the transport in the exchange.
    #[doc(hidden)]
    const CODE: u8;
    /// The peer acknowledges, so a peer that is gone shows.
    #[doc(hidden)]
    const RELIABLE: bool;

    #[doc(hidden)]
    fn connect(
        pair: QueuePair<Self, Init>,
        local: &Endpoint,
        remote: &Endpoint,
        options: &ConnectOptions,
    ) -> Result<QueuePair<Self, Rts>, Error>;
}

macro_rules! connected {
    ($transport:ident, $code:literal, $reliable:literal) => {
        impl Carries for $transport {
            type Mail = Message;

            #[inline(always)]
            fn mail(mut buffer: Buffer, success: Success<'_>, _: &WorkCompletion) -> Message {
                if success.is_plain_message() {
                    buffer.truncate(success.len());
                    return Message { buffer, note: Note::NOTHING };
                }
                // An RDMA write with immediate consumes a receive without touching its buffer.
                buffer.truncate(if success.is_write_with_imm() { 0 } else { success.len() });
                Message { buffer, note: Note::of(success) }
            }
        }

        impl Sealed for $transport {
            const CODE: u8 = $code;
            const RELIABLE: bool = $reliable;

            fn connect(
                pair: QueuePair<Self, Init>,
                local: &Endpoint,
                remote: &Endpoint,
                options: &ConnectOptions,
            ) -> Result<QueuePair<Self, Rts>, Error> {
                Ok(pair.connect(local, remote, options)?)
            }
        }
    };
}

connected!(Rc, 1, true);
connected!(Uc, 2, false);
