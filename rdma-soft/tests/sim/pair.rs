//! Two queue pairs, two links, one clock.

use rdma_soft::proto::{
    Acks, Attributes, CompletionKind, Config, CongestionConfig, Data, Destination, MAX_PACKET_LEN,
    PacketMeta, PathMtu, PostError, QpAccess, QueuePair, SendFlags, SendOperation, SendRequest, Sge, State,
    Status, Time, Transmit,
};
use rdma_soft::wire::{Packet, Psn, RnrTimer, Syndrome, Transport};

use super::{Link, LinkConfig, TestHost};

/// One end.
#[derive(Debug)]
pub struct Side {
    pub qp: QueuePair,
    pub host: TestHost,
}

impl Side {
    /// Posts a signalled request, which must be accepted.
    pub fn post(&mut self, wr_id: u64, operation: SendOperation, sges: &[Sge]) {
        self.post_with(wr_id, operation, sges, SendFlags::SIGNALED);
    }

    /// Posts a request, which must be accepted.
    pub fn post_with(&mut self, wr_id: u64, operation: SendOperation, sges: &[Sge], flags: SendFlags) {
        self.try_post(wr_id, operation, Data::Gather(sges), flags).expect("the request is accepted");
    }

    pub fn try_post(
        &mut self,
        wr_id: u64,
        operation: SendOperation,
        data: Data<'_>,
        flags: SendFlags,
    ) -> Result<(), PostError> {
        let destination = (self.qp.transport() == Transport::Ud).then(|| Destination {
            qp_num: self.qp.attributes().dest_qp,
            qkey: 1 << 31,
            ..Destination::default()
        });
        let destination = destination.as_ref();
        let request = SendRequest { wr_id, operation, flags, data, destination };
        self.qp.post_send(Time::ZERO, &mut self.host, &request)
    }

    /// Send completions so far, as (`wr_id`, status).
    pub fn sent(&mut self) -> Vec<(u64, Status)> {
        self.host.take(CompletionKind::Send).iter().map(|c| (c.wr_id, c.status)).collect()
    }

    /// Receive completions so far, as (`wr_id`, status).
    pub fn received(&mut self) -> Vec<(u64, Status)> {
        self.host.take(CompletionKind::Receive).iter().map(|c| (c.wr_id, c.status)).collect()
    }
}

/// How a pair is set up.
#[derive(Debug, Clone, Copy)]
pub struct PairConfig {
    pub transport: Transport,
    pub mtu: PathMtu,
    pub depth: u32,
    pub max_sge: u32,
    pub max_inline: u32,
    pub attributes: Attributes,
    pub congestion: CongestionConfig,
    pub link: LinkConfig,
    pub seed: u64,
}

impl PairConfig {
    pub fn new(transport: Transport) -> Self {
        let attributes = Attributes {
            access: QpAccess::all(),
            path_mtu: PathMtu::Mtu1024,
            max_dest_rd_atomic: 4,
            max_rd_atomic: 4,
            min_rnr_timer: RnrTimer::new(12),
            timeout: 9,
            retry_count: 7,
            rnr_retry: 7,
            qkey: 0x1111_1111,
            send_psn: Psn::new(0xff_fff0),
            receive_psn: Psn::new(0xff_fff0),
            ..Attributes::default()
        };
        Self {
            transport,
            mtu: PathMtu::Mtu1024,
            depth: 16,
            max_sge: 4,
            max_inline: 256,
            attributes,
            congestion: CongestionConfig::default(),
            link: LinkConfig::default(),
            seed: 0,
        }
    }

    pub fn rc() -> Self {
        Self::new(Transport::Rc)
    }
}

/// A connected pair. `links[0]` leads from the client to the server.
#[derive(Debug)]
pub struct Pair {
    pub client: Side,
    pub server: Side,
    pub links: [Link; 2],
    pub now: Time,
    /// When set, acknowledgements are flushed only by [`Pair::flush_acks`].
    pub hold_acks: bool,
    /// Called with each packet that is sent, by the client (true) or the server.
    pub sniff: Option<fn(bool, &Packet<'_>)>,
    /// Opcodes sent by the client and by the server, with their PSNs, while `Some`.
    pub trace: Option<Vec<(bool, u8, Psn)>>,
    buffer: Vec<u8>,
}

/// Brings a new queue pair to RTS.
pub fn connect(config: &PairConfig, qp_num: u32, dest_qp: u32, host: &mut TestHost) -> QueuePair {
    let mut qp = QueuePair::new(&Config {
        max_send_wr: config.depth,
        max_send_sge: config.max_sge,
        max_inline_data: config.max_inline,
        congestion: config.congestion,
        ..Config::new(config.transport, qp_num)
    });
    bring_up(&mut qp, Time::ZERO, host, &Attributes { dest_qp, path_mtu: config.mtu, ..config.attributes });
    qp
}

/// Brings a queue pair from RESET to RTS.
pub fn bring_up(qp: &mut QueuePair, now: Time, host: &mut TestHost, attributes: &Attributes) {
    for state in [State::Init, State::Rtr, State::Rts] {
        qp.modify(now, host, state, attributes).expect("a transition of the specification");
    }
}

impl Pair {
    pub fn new(config: &PairConfig) -> Self {
        let side = |qp_num, dest_qp| {
            let mut host = TestHost::new();
            Side { qp: connect(config, qp_num, dest_qp, &mut host), host }
        };
        let mut seeds = super::Rng::new(config.seed);
        Self {
            client: side(17, 18),
            server: side(18, 17),
            links: [Link::new(config.link, seeds.next()), Link::new(config.link, seeds.next())],
            now: Time::ZERO,
            hold_acks: false,
            sniff: None,
            trace: None,
            buffer: vec![0; MAX_PACKET_LEN],
        }
    }

    pub fn rc() -> Self {
        Self::new(&PairConfig::rc())
    }

    /// Sends what both sides have to send now.
    pub fn transmit(&mut self) {
        self.transmit_side(true);
        self.transmit_side(false);
    }

    fn transmit_side(&mut self, is_client: bool) {
        let acks = if self.hold_acks { Acks::Hold } else { Acks::Flush };
        while let Some(sent) = self.poll(is_client, acks) {
            let bytes = &self.buffer[..sent.len];
            let link = &mut self.links[usize::from(!is_client)];
            link.send(self.now.nanoseconds(), bytes);
        }
    }

    fn poll(&mut self, is_client: bool, acks: Acks) -> Option<Transmit> {
        let side = if is_client { &mut self.client } else { &mut self.server };
        let sent = side.qp.poll_transmit(self.now, &mut side.host, acks, &mut self.buffer)?;
        if self.sniff.is_some() || self.trace.is_some() {
            let mut bytes = self.buffer[..sent.len].to_vec();
            bytes.extend_from_slice(&[0; 4]);
            let packet = Packet::parse(&bytes).expect("own packets parse");
            if let Some(sniff) = self.sniff {
                sniff(is_client, &packet);
            }
            if let Some(trace) = &mut self.trace {
                trace.push((is_client, packet.bth.opcode().value(), packet.bth.psn()));
            }
        }
        Some(sent)
    }

    /// Opcodes that the server sent since `trace` was set.
    pub fn server_trace(&mut self) -> Vec<u8> {
        let trace = self.trace.take().expect("a trace was asked for");
        trace.iter().filter(|(client, ..)| !client).map(|(_, opcode, _)| *opcode).collect()
    }

    /// The NAK or RNR NAK that the server has to send now; all else that it has to send is lost.
    pub fn server_nak(&mut self) -> Option<Syndrome> {
        let mut nak = None;
        while let Some(sent) = self.poll(false, Acks::Flush) {
            let mut bytes = self.buffer[..sent.len].to_vec();
            bytes.extend_from_slice(&[0; 4]);
            let packet = Packet::parse(&bytes).expect("own packets parse");
            let syndrome = packet.aeth().map(|aeth| aeth.syndrome).filter(|syndrome| !syndrome.is_ack());
            nak = nak.or(syndrome);
        }
        nak
    }

    /// Sends the acknowledgements that were held, once.
    pub fn flush_acks(&mut self) {
        let held = std::mem::replace(&mut self.hold_acks, false);
        self.transmit();
        self.hold_acks = held;
    }

    /// Hands a packet with ICRC to one side, whatever the links do.
    pub fn inject(&mut self, to_server: bool, bytes: &[u8]) {
        if let Ok(packet) = Packet::parse(bytes) {
            self.inject_packet(to_server, &packet);
        }
    }

    pub fn inject_packet(&mut self, to_server: bool, packet: &Packet<'_>) {
        let side = if to_server { &mut self.server } else { &mut self.client };
        side.qp.handle_packet(self.now, &mut side.host, packet, &PacketMeta::default());
    }

    /// Sends, moves the clock to the next thing that happens, and lets it happen. False if nothing will.
    pub fn step(&mut self) -> bool {
        self.transmit();
        let arrivals = self.links.iter().filter_map(Link::next_look);
        let timeouts = [&self.client, &self.server].into_iter().filter_map(|side| side.qp.poll_timeout());
        let Some(next) = arrivals.chain(timeouts.map(Time::nanoseconds)).min() else { return false };
        self.now = self.now.max(Time::from_nanoseconds(next));
        for to_server in [true, false] {
            while let Some(bytes) = self.links[usize::from(!to_server)].receive(next) {
                self.inject(to_server, &bytes);
            }
        }
        for side in [&mut self.client, &mut self.server] {
            side.qp.handle_timeout(self.now, &mut side.host);
        }
        true
    }

    /// Steps until nothing happens any more. Panics if that takes absurdly long: a hang.
    pub fn drive(&mut self) {
        for _ in 0..50_000_000u64 {
            if !self.step() {
                return;
            }
        }
        panic!("still busy after 50 million steps");
    }

    /// Steps until `nanoseconds` have passed or nothing happens any more.
    pub fn drive_for(&mut self, nanoseconds: u64) {
        let end = self.now.nanoseconds() + nanoseconds;
        while self.now.nanoseconds() < end && self.step() {}
    }
}
