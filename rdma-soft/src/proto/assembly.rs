//! The responder's inbound message, SEND or RDMA WRITE, packet by packet; RC and UC share it.

use super::work::{MAX_WIRE_MESSAGE, len32};
use super::{
    Completion, CompletionKind, CompletionOpcode, Counter, Host, ImmediateOrKey, QpAccess, ReceiveRequest,
    RemoteAccess, Status,
};
use crate::wire::{Operation, Packet, Position};

/// Why a packet cannot be executed. Nothing of it was, and the state is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No receive is posted.
    NotReady,
    /// First, middle, last and only are out of order (clause 9.7.4.1.2).
    Sequence,
    /// The payload has a length that its place does not allow (clause 9.7.4.1.6).
    Length,
    /// The queue pair does not allow the operation.
    NotEnabled,
    /// The message is longer than its receive.
    ReceiveTooShort,
    /// A remote key, range or right is wrong.
    RemoteAccess,
    /// The receive names memory that is not ours to write.
    LocalProtection,
    /// The key to invalidate cannot be (after the data was placed).
    Invalidate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    None,
    Send { received: u32 },
    Write { va: u64, rkey: u32, total: u32, remaining: u32 },
}

/// The message of which packets have been executed but not yet the last, and the receive it uses.
#[derive(Debug)]
pub(super) struct Assembly {
    message: Message,
    /// Taken from the host and not completed. Survives a broken UC message: the next one uses it.
    receive: Option<ReceiveRequest>,
}

impl Assembly {
    pub(super) const fn new() -> Self {
        Self { message: Message::None, receive: None }
    }

    /// Whether a message has begun and not ended.
    pub(super) fn in_message(&self) -> bool {
        self.message != Message::None
    }

    /// Forgets the message; its receive stays for the next one.
    pub(super) fn abandon(&mut self) {
        self.message = Message::None;
    }

    /// The receive in use, so that it can be completed in error.
    pub(super) fn take_receive(&mut self) -> Option<ReceiveRequest> {
        self.message = Message::None;
        self.receive.take()
    }

    /// The current receive, taken from the host if there is none.
    pub(super) fn receive(&mut self, host: &mut impl Host) -> Option<ReceiveRequest> {
        if self.receive.is_none() {
            self.receive = host.next_receive();
        }
        self.receive
    }

    /// Executes a SEND or RDMA WRITE packet that is next in sequence; says whether the message is complete.
    pub(super) fn execute(
        &mut self,
        host: &mut impl Host,
        packet: &Packet<'_>,
        mtu: u32,
        access: QpAccess,
    ) -> Result<bool, Refusal> {
        let position = packet.info().position;
        let len = len32(packet.payload().len());
        let fits = match position {
            Position::First | Position::Middle => len == mtu,
            Position::Last => (1..=mtu).contains(&len),
            Position::Only => len <= mtu,
        };
        let is_send = packet.info().operation == Operation::Send;
        let in_order = match self.message {
            Message::None => position.begins(),
            Message::Send { .. } => !position.begins() && is_send,
            Message::Write { .. } => !position.begins() && !is_send,
        };
        if !in_order {
            return Err(Refusal::Sequence);
        }
        if !fits {
            return Err(Refusal::Length);
        }
        if is_send { self.send(host, packet, len) } else { self.write(host, packet, len, access) }
    }

    fn send(&mut self, host: &mut impl Host, packet: &Packet<'_>, len: u32) -> Result<bool, Refusal> {
        let received = if let Message::Send { received } = self.message { received } else { 0 };
        let receive = self.receive(host).ok_or(Refusal::NotReady)?;
        let end = received.checked_add(len).ok_or(Refusal::ReceiveTooShort)?;
        if u64::from(end) > receive.length || end > MAX_WIRE_MESSAGE {
            return Err(Refusal::ReceiveTooShort);
        }
        if len != 0 {
            host.scatter_receive(received, packet.payload()).map_err(|_| Refusal::LocalProtection)?;
        }
        if !packet.info().position.ends() {
            self.message = Message::Send { received: end };
            return Ok(false);
        }
        let mut immediate =
            packet.immdt().map_or(ImmediateOrKey::None, |h| ImmediateOrKey::Immediate(h.data));
        if let Some(header) = packet.ieth() {
            host.invalidate_remote(header.rkey).map_err(|_| Refusal::Invalidate)?;
            immediate = ImmediateOrKey::InvalidatedKey(header.rkey);
        }
        self.complete(host, packet, CompletionOpcode::Receive, end, immediate);
        Ok(true)
    }

    fn write(
        &mut self,
        host: &mut impl Host,
        packet: &Packet<'_>,
        len: u32,
        access: QpAccess,
    ) -> Result<bool, Refusal> {
        let ends = packet.info().position.ends();
        let (va, rkey, total, remaining) = if let Message::Write { va, rkey, total, remaining } = self.message
        {
            (va, rkey, total, remaining)
        } else {
            if !access.contains(QpAccess::REMOTE_WRITE) {
                return Err(Refusal::NotEnabled);
            }
            let reth = packet.reth().ok_or(Refusal::Sequence)?;
            if reth.dma_len > MAX_WIRE_MESSAGE {
                return Err(Refusal::Length);
            }
            // A message without data touches no memory, so its key is not checked (clause 9.7.4.1.5).
            if reth.dma_len != 0 {
                host.check_remote(reth.rkey, reth.va, reth.dma_len, RemoteAccess::Write)
                    .map_err(|_| Refusal::RemoteAccess)?;
            }
            (reth.va, reth.rkey, reth.dma_len, reth.dma_len)
        };
        // The last packet brings exactly what is missing, any other leaves something for it.
        if if ends { len != remaining } else { len >= remaining } {
            return Err(Refusal::Length);
        }
        let immediate = packet.immdt();
        if immediate.is_some() && self.receive(host).is_none() {
            return Err(Refusal::NotReady);
        }
        if len != 0 {
            host.write_remote(rkey, va, packet.payload()).map_err(|_| Refusal::RemoteAccess)?;
        }
        if !ends {
            let va = va.wrapping_add(u64::from(len));
            self.message = Message::Write { va, rkey, total, remaining: remaining - len };
            return Ok(false);
        }
        if let Some(header) = immediate {
            let opcode = CompletionOpcode::ReceiveWriteWithImmediate;
            self.complete(host, packet, opcode, total, ImmediateOrKey::Immediate(header.data));
        }
        self.message = Message::None;
        Ok(true)
    }

    fn complete(
        &mut self,
        host: &mut impl Host,
        packet: &Packet<'_>,
        opcode: CompletionOpcode,
        byte_len: u32,
        immediate: ImmediateOrKey,
    ) {
        self.message = Message::None;
        let Some(receive) = self.receive.take() else { return };
        host.count(Counter::ReceivesCompleted);
        host.complete(Completion {
            kind: CompletionKind::Receive,
            wr_id: receive.wr_id,
            status: Status::Success,
            opcode,
            byte_len,
            immediate,
            src_qp: 0,
            grh: false,
            solicited: packet.bth.solicited(),
        });
    }
}

/// Completes a receive in error.
pub(super) fn fail_receive(host: &mut impl Host, receive: ReceiveRequest, status: Status) {
    host.complete(Completion {
        kind: CompletionKind::Receive,
        wr_id: receive.wr_id,
        status,
        opcode: CompletionOpcode::Receive,
        byte_len: 0,
        immediate: ImmediateOrKey::None,
        src_qp: 0,
        grh: false,
        solicited: false,
    });
}
