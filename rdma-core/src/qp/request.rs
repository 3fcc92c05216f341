//! Work requests, before they are posted.

use std::marker::PhantomData;

use bytes::Bytes;
use verbs_sys::{ibv_send_flags, ibv_sge};

use super::transport::{Atomics, Connected, Datagram, RdmaRead, RdmaWrite, Transport};
use crate::ah::AddressHandle;
use crate::inflight::Held;
use crate::mr::{Buffer, RegionRef, RemoteSlice, SharedSlice};
use crate::mw::{Binding, MemoryWindow};

/// The local memory of a work request: what is sent, or where data goes.
///
/// Made from a [`Buffer`], a [`SharedSlice`], or an array or `Vec` of either (a scatter/gather list; a
/// list costs the allocation of its `Vec`). A source can also be [inline](Payload::inline), or
/// [`Bytes`] that lie [in a registered region](Payload::bytes).
#[derive(Debug)]
pub struct Payload<'d> {
    pub(crate) data: Data<'d>,
}

#[derive(Debug)]
pub(crate) enum Data<'d> {
    None,
    One(Held),
    Many(Vec<Held>),
    Inline(&'d [u8]),
}

impl<'d> Payload<'d> {
    /// No bytes: a message of length 0, or a receive that takes only those.
    #[must_use]
    pub fn empty() -> Payload<'static> {
        Payload { data: Data::None }
    }

    /// Bytes that the post copies into the work request: they need no registration, and are free
    /// again at once. At most the queue pair's
    /// [`max_inline`](crate::QueuePairCapacity::max_inline). Sources only.
    #[must_use]
    #[inline]
    pub fn inline(bytes: &'d [u8]) -> Payload<'d> {
        Payload { data: Data::Inline(bytes) }
    }

    /// Immutable bytes that lie in `region`, without a copy; kept until the completion. `None` when
    /// they do not lie there. Sources only.
    #[must_use]
    pub fn bytes(bytes: Bytes, region: &RegionRef) -> Option<Payload<'static>> {
        region
            .contains(&bytes)
            .then(|| Payload { data: Data::One(Held::Bytes(Box::new((bytes, region.clone())))) })
    }

    /// The buffers of it, given back by a failed post.
    pub fn into_buffers(self) -> impl Iterator<Item = Buffer> {
        let (one, many) = match self.data {
            Data::One(held) => (Some(held), Vec::new()),
            Data::Many(held) => (None, held),
            Data::None | Data::Inline(_) => (None, Vec::new()),
        };
        one.into_iter().chain(many).filter_map(|held| match held {
            Held::Buffer(buffer) => Some(buffer),
            Held::Shared(_) | Held::Bytes(_) => None,
        })
    }
}

impl From<Buffer> for Payload<'_> {
    #[inline]
    fn from(buffer: Buffer) -> Self {
        Payload { data: Data::One(Held::Buffer(buffer)) }
    }
}

impl From<SharedSlice> for Payload<'_> {
    fn from(slice: SharedSlice) -> Self {
        Payload { data: Data::One(Held::Shared(slice)) }
    }
}

impl From<Vec<Buffer>> for Payload<'_> {
    fn from(buffers: Vec<Buffer>) -> Self {
        Payload { data: Data::Many(buffers.into_iter().map(Held::Buffer).collect()) }
    }
}

impl<const N: usize> From<[Buffer; N]> for Payload<'_> {
    fn from(buffers: [Buffer; N]) -> Self {
        Payload { data: Data::Many(buffers.into_iter().map(Held::Buffer).collect()) }
    }
}

impl From<Vec<SharedSlice>> for Payload<'_> {
    fn from(slices: Vec<SharedSlice>) -> Self {
        Payload { data: Data::Many(slices.into_iter().map(Held::Shared).collect()) }
    }
}

impl<const N: usize> From<[SharedSlice; N]> for Payload<'_> {
    fn from(slices: [SharedSlice; N]) -> Self {
        Payload { data: Data::Many(slices.into_iter().map(Held::Shared).collect()) }
    }
}

/// What a work request of a send queue asks for.
#[derive(Debug)]
pub(crate) enum Action {
    Send,
    SendImm(u32),
    SendInvalidate(u32),
    SendTo { address: AddressHandle, qp_num: u32, qkey: u32, imm: Option<u32> },
    Write(RemoteSlice),
    WriteImm(RemoteSlice, u32),
    Read(RemoteSlice),
    CompareAndSwap { remote: RemoteSlice, expected: u64, new: u64 },
    FetchAndAdd { remote: RemoteSlice, add: u64 },
    Invalidate(u32),
    Bind(Binding),
}

/// A work request for a send queue of transport `T`.
///
/// It is signalled (its completion is reported) unless [`unsignaled`](WorkRequest::unsignaled) says
/// otherwise.
#[derive(Debug)]
#[must_use = "a work request does nothing until it is posted"]
pub struct WorkRequest<'d, T: Transport> {
    pub(crate) id: u64,
    pub(crate) action: Action,
    pub(crate) flags: u32,
    pub(crate) payload: Payload<'d>,
    transport: PhantomData<fn() -> T>,
}

impl<'d, T: Transport> WorkRequest<'d, T> {
    #[inline]
    fn new(action: Action, payload: Payload<'d>) -> Self {
        WorkRequest {
            id: 0,
            action,
            flags: ibv_send_flags::IBV_SEND_SIGNALED.0,
            payload,
            transport: PhantomData,
        }
    }

    /// Whether it is a signalled SEND of one buffer.
    #[inline(always)]
    pub(crate) fn is_plain_send(&self) -> bool {
        matches!(self.action, Action::Send)
            && matches!(self.payload.data, Data::One(Held::Buffer(_)))
            && self.flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0
    }

    /// Whether it is of one buffer, and nothing else must live until the completion.
    #[inline(always)]
    pub(crate) fn is_bare(&self) -> bool {
        !matches!(self.action, Action::SendTo { .. } | Action::Bind(_))
            && matches!(self.payload.data, Data::One(Held::Buffer(_)))
    }

    /// Drops what is left of it once it was posted: of most, nothing. The compiler does not see that, and would look.
    #[inline(always)]
    pub(crate) fn drop_posted(self) {
        let is_nothing = matches!(self.payload.data, Data::None)
            && !matches!(self.action, Action::SendTo { .. } | Action::Bind(_));
        if is_nothing {
            std::mem::forget(self);
        }
    }

    /// The parts of what is a plain send.
    #[inline(always)]
    pub(crate) fn into_plain_send(self) -> (u64, u32, Buffer) {
        let WorkRequest { id, action, flags, payload, .. } = self;
        // A SEND owns nothing; the compiler does not see that and would call for its drop.
        std::mem::forget(action);
        let Data::One(Held::Buffer(buffer)) = payload.data else { unreachable!("a plain send") };
        (id, flags, buffer)
    }

    /// The memory of one signalled buffer, if the request has nothing else that must live until the completion.
    #[inline]
    pub(crate) fn single_buffer(&self) -> Option<ibv_sge> {
        match &self.payload.data {
            Data::One(Held::Buffer(buffer))
                if self.is_bare() && self.flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0 =>
            {
                Some(buffer.sge())
            }
            _ => None,
        }
    }

    /// The parts of a request of one buffer.
    #[inline]
    pub(crate) fn into_single_buffer(self) -> (u64, Action, u32, Buffer) {
        let WorkRequest { id, action, flags, payload, .. } = self;
        let Data::One(Held::Buffer(buffer)) = payload.data else { unreachable!("one buffer") };
        (id, action, flags, buffer)
    }

    /// A request, again.
    #[cold]
    pub(crate) fn of_parts(id: u64, action: Action, flags: u32, payload: Payload<'d>) -> Self {
        WorkRequest { id, action, flags, payload, transport: PhantomData }
    }

    /// SEND: the peer's next receive takes the message.
    #[inline]
    pub fn send(source: impl Into<Payload<'d>>) -> Self
    where
        T: Connected,
    {
        Self::new(Action::Send, source.into())
    }

    /// SEND with 32 bits of immediate data.
    #[inline]
    pub fn send_with_imm(source: impl Into<Payload<'d>>, imm: u32) -> Self
    where
        T: Connected,
    {
        Self::new(Action::SendImm(imm), source.into())
    }

    /// SEND that also invalidates a key of the peer's: that of a memory window it bound.
    pub fn send_with_invalidate(source: impl Into<Payload<'d>>, rkey: u32) -> Self
    where
        T: Connected,
    {
        Self::new(Action::SendInvalidate(rkey), source.into())
    }

    /// A datagram to `qp_num` at `address`. `qkey` must be the receiver's; with its high bit set the
    /// sender's own Q_Key is sent instead (IBTA vol. 1, 10.2.5).
    #[inline]
    pub fn send_to(source: impl Into<Payload<'d>>, address: &AddressHandle, qp_num: u32, qkey: u32) -> Self
    where
        T: Datagram,
    {
        let address = address.clone();
        Self::new(Action::SendTo { address, qp_num, qkey, imm: None }, source.into())
    }

    /// A datagram with 32 bits of immediate data.
    pub fn send_to_with_imm(
        source: impl Into<Payload<'d>>,
        address: &AddressHandle,
        qp_num: u32,
        qkey: u32,
        imm: u32,
    ) -> Self
    where
        T: Datagram,
    {
        let address = address.clone();
        Self::new(Action::SendTo { address, qp_num, qkey, imm: Some(imm) }, source.into())
    }

    /// RDMA WRITE to the start of `remote`.
    #[inline]
    pub fn write(source: impl Into<Payload<'d>>, remote: RemoteSlice) -> Self
    where
        T: RdmaWrite,
    {
        Self::new(Action::Write(remote), source.into())
    }

    /// RDMA WRITE with immediate: also consumes a receive of the peer's, which gets the immediate.
    pub fn write_with_imm(source: impl Into<Payload<'d>>, remote: RemoteSlice, imm: u32) -> Self
    where
        T: RdmaWrite,
    {
        Self::new(Action::WriteImm(remote, imm), source.into())
    }

    /// RDMA READ from the start of `remote` into all of `target`.
    pub fn read(target: impl Into<Payload<'static>>, remote: RemoteSlice) -> Self
    where
        T: RdmaRead,
    {
        Self::new(Action::Read(remote), target.into())
    }

    /// Stores `new` at the 8 bytes at `remote` if they are `expected`. `target`, 8 bytes, gets what was
    /// there, in the byte order of this machine.
    pub fn compare_and_swap(
        target: impl Into<Payload<'static>>,
        remote: RemoteSlice,
        expected: u64,
        new: u64,
    ) -> Self
    where
        T: Atomics,
    {
        Self::new(Action::CompareAndSwap { remote, expected, new }, target.into())
    }

    /// Adds to the 8 bytes at `remote`. `target`, 8 bytes, gets what was there, in the byte order of
    /// this machine.
    pub fn fetch_and_add(target: impl Into<Payload<'static>>, remote: RemoteSlice, add: u64) -> Self
    where
        T: Atomics,
    {
        Self::new(Action::FetchAndAdd { remote, add }, target.into())
    }

    /// Makes the key of a memory window of type 2 invalid: peers that use it get remote access errors.
    pub fn invalidate(window: &MemoryWindow) -> Self
    where
        T: Connected,
    {
        Self::new(Action::Invalidate(window.rkey()), Payload::empty())
    }

    /// See [`MemoryWindow::bind`].
    pub(crate) fn bind(binding: Binding) -> Self {
        Self::new(Action::Bind(binding), Payload::empty())
    }

    /// The caller's number, given back by the completion.
    #[inline]
    pub fn id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// As [`id`](WorkRequest::id), in place.
    #[inline]
    pub fn set_id(&mut self, id: u64) {
        self.id = id;
    }

    /// As [`unsignaled`](WorkRequest::unsignaled), in place.
    #[inline]
    pub fn set_unsignaled(&mut self) {
        self.flags &= !ibv_send_flags::IBV_SEND_SIGNALED.0;
    }

    /// Without a completion of its own when it succeeds. Its buffers come back with the next signalled
    /// completion of the queue; the library makes one at least every half queue. It is reported
    /// then too, as a success.
    #[inline]
    pub fn unsignaled(mut self) -> Self {
        self.set_unsignaled();
        self
    }

    /// Not started before all earlier RDMA reads and atomics of the queue are complete (RC).
    #[inline]
    pub fn fence(mut self) -> Self {
        self.flags |= ibv_send_flags::IBV_SEND_FENCE.0;
        self
    }

    /// The peer's completion is a solicited event.
    #[inline]
    pub fn solicited(mut self) -> Self {
        self.flags |= ibv_send_flags::IBV_SEND_SOLICITED.0;
        self
    }

    /// The memory, given back by a failed post.
    #[must_use]
    pub fn into_payload(self) -> Payload<'d> {
        self.payload
    }
}

impl<'d, T: Connected> From<Buffer> for WorkRequest<'d, T> {
    /// A SEND.
    #[inline]
    fn from(buffer: Buffer) -> Self {
        WorkRequest::send(buffer)
    }
}

/// A work request for a receive queue.
#[derive(Debug)]
#[must_use = "a work request does nothing until it is posted"]
pub struct RecvRequest {
    pub(crate) id: u64,
    pub(crate) payload: Payload<'static>,
}

impl RecvRequest {
    /// Takes the next message into `target`. On UD the first 40 bytes are the Global Routing Header.
    #[inline]
    pub fn new(target: impl Into<Payload<'static>>) -> RecvRequest {
        RecvRequest { id: 0, payload: target.into() }
    }

    /// Whether it is one buffer.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.payload.data, Data::One(Held::Buffer(_)))
    }

    /// As [`WorkRequest::drop_posted`].
    #[inline(always)]
    pub(crate) fn drop_posted(self) {
        if matches!(self.payload.data, Data::None) {
            std::mem::forget(self);
        }
    }

    /// The parts of what is one buffer.
    #[inline(always)]
    pub(crate) fn into_plain(self) -> (u64, Buffer) {
        let Data::One(Held::Buffer(buffer)) = self.payload.data else { unreachable!("one buffer") };
        (self.id, buffer)
    }

    /// The caller's number, given back by the completion.
    #[inline]
    pub fn id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// The memory, given back by a failed post.
    #[must_use]
    pub fn into_payload(self) -> Payload<'static> {
        self.payload
    }
}

impl From<Buffer> for RecvRequest {
    #[inline]
    fn from(buffer: Buffer) -> RecvRequest {
        RecvRequest::new(buffer)
    }
}
