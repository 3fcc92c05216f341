//! Datagrams, and whose Q_Key they carry.

use rdma_core::inflight::{Operation, QueueRef};
use rdma_core::qp::state::Rts;
use rdma_core::qp::transport::{Ud, UdInit, UdRtr, UdRts};
use rdma_core::{
    AddressHandle, AddressVector, Buffer, CompletionQueue, Endpoint, EndpointOptions, GlobalRoute, QueuePair,
    RecvRequest, WorkRequest,
};

use crate::Fallible;
use crate::session::{Role, Session, check, pattern};
use crate::transfers::IMM;

const QKEY: u32 = 0x1234_5678;
/// A Q_Key with the high bit set stands for the sender's own (IBTA volume 1, 10.2.5).
const OWN_QKEY: u32 = 0x8000_0000;
const GRH: usize = 40;

/// A queue pair for datagrams, and the way to the other side's.
struct Datagrams {
    qp: QueuePair<Ud, Rts>,
    remote: Endpoint,
    address: AddressHandle,
    /// Kept: what is posted completes there.
    _cq: CompletionQueue,
}

impl Datagrams {
    fn receive(&self, buffer: Buffer) -> Fallible<Operation<QueueRef<'_>>> {
        Ok(self.qp.start_recv(RecvRequest::new(buffer)).map_err(|error| error.to_string())?)
    }

    fn send(&self, session: &Session, size: usize, qkey: u32) -> Fallible<()> {
        let payload = session.filled(size)?;
        let request = WorkRequest::send_to_with_imm(payload, &self.address, self.remote.qp_num, qkey, IMM);
        let operation = self.qp.start_send(request).map_err(|error| error.to_string())?;
        session.finish(operation)?.result()?;
        Ok(())
    }
}

impl Session {
    fn datagrams(&mut self) -> Fallible<Datagrams> {
        let cq = self.context.completion_queue(16).build()?;
        let qp = self.domain.queue_pair::<Ud>(&cq, &cq).max_send(4).max_recv(4).build()?;
        let options = EndpointOptions { gid_index: self.gid_index, ..EndpointOptions::default() };
        let local = qp.endpoint(&options)?;
        let remote: Endpoint = self.link.exchange(&local)?;
        let init = UdInit { port: 1, pkey_index: 0, qkey: QKEY };
        let qp = qp.init(&init)?.rtr(&UdRtr::default())?.rts(&UdRts { sq_psn: local.psn })?;
        let index = match self.gid_index {
            Some(index) => index,
            None => u8::try_from(self.context.choose_gid(1)?.entry.index)?,
        };
        let vector = AddressVector::global(1, GlobalRoute::new(remote.gid, index));
        let address = self.domain.address_handle(&vector)?;
        Ok(Datagrams { qp, remote, address, _cq: cq })
    }

    /// A datagram each way: the answer goes to where the first one says it came from.
    pub(crate) fn datagram(&mut self, size: usize) -> Fallible<String> {
        let pair = self.datagrams()?;
        let receive = pair.receive(self.buffer(GRH + size)?)?;
        self.link.meet()?;
        if self.role == Role::Requester {
            pair.send(self, size, QKEY)?;
        }
        let finished = self.finish(receive)?;
        let success = finished.result()?;
        let seen = (success.len(), success.imm(), success.has_grh(), success.src_qp());
        if seen != (GRH + size, Some(IMM), true, pair.remote.qp_num) {
            return Err(format!("length, immediate, header and sender are {seen:?}").into());
        }
        let buffer = finished.into_buffer().ok_or("no buffer came back")?;
        check("the datagram", &buffer[GRH..], &pattern(size))?;
        // RoCE over IPv4: the second half of the header's room is the IPv4 header (RFC 791).
        if let Some(sender) = pair.remote.gid.ipv4() {
            check("the sender's address", &buffer[GRH - 8..GRH - 4], &sender.octets())?;
        }
        if self.role == Role::Responder {
            pair.send(self, size, QKEY)?;
        }
        Ok(String::new())
    }

    /// A datagram with the sender's own Q_Key, then one with the key as a number: rxe sends the first as it was posted
    /// (docs/INTEROP.md), so that the receiver drops it.
    pub(crate) fn own_qkey(&mut self) -> Fallible<String> {
        const FIRST: usize = 1;
        const SECOND: usize = 2;
        let sender_is_rxe = match self.role {
            Role::Requester => {
                self.link.tell(&self.is_rxe)?;
                self.is_rxe
            }
            Role::Responder => self.link.hear()?,
        };
        let pair = self.datagrams()?;
        if self.role == Role::Requester {
            self.link.meet()?;
            pair.send(self, FIRST, OWN_QKEY)?;
            pair.send(self, SECOND, QKEY)?;
            return Ok(String::new());
        }
        let receives = [pair.receive(self.buffer(GRH + SECOND)?)?, pair.receive(self.buffer(GRH + SECOND)?)?];
        self.link.meet()?;
        let expected: &[usize] = if sender_is_rxe { &[SECOND] } else { &[FIRST, SECOND] };
        for (operation, &size) in receives.into_iter().zip(expected) {
            let len = self.finish(operation)?.result()?.len();
            if len != GRH + size {
                return Err(format!("a datagram of {len} bytes instead of {}", GRH + size).into());
            }
        }
        Ok(if sender_is_rxe { "lost, as its Q_Key went as posted" } else { "arrived" }.to_owned())
    }
}
