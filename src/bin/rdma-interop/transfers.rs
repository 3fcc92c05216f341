//! Messages that arrive: what is sent, written, read and swapped.

use std::time::{Duration, Instant};

use rdma_core::qp::transport::{Connected, Rc, RdmaWrite};
use rdma_core::{Buffer, ConnectOptions, RemoteAccess, RemoteSlice, SharedRegion, WorkRequest};

use crate::Fallible;
use crate::cases::Verb;
use crate::session::{Pair, Role, Session, check, pattern};

pub(crate) const IMM: u32 = 0xfeed_beef;
/// Bytes on both sides of the target of a write, which must stay as they are.
const GUARD: usize = 64;

impl Session {
    pub(crate) fn rc_transfer(&mut self, verb: Verb, mtu: u32, size: usize) -> Fallible<String> {
        let pair = self.rc(mtu, patient)?;
        for _ in 0..self.rounds {
            match verb {
                Verb::Read => self.read(&pair, size)?,
                _ => self.transfer(&pair, verb, size)?,
            }
        }
        // A pair that goes at once may take the last acknowledgement with it.
        self.link.meet()?;
        Ok(String::new())
    }

    pub(crate) fn uc_transfer(&mut self, verb: Verb, mtu: u32, size: usize) -> Fallible<String> {
        let pair = self.uc(mtu, |_| ())?;
        self.transfer(&pair, verb, size)?;
        self.link.meet()?;
        Ok(String::new())
    }

    fn transfer<T: Connected + RdmaWrite>(
        &mut self,
        pair: &Pair<T>,
        verb: Verb,
        size: usize,
    ) -> Fallible<()> {
        match (self.role, verb) {
            (Role::Requester, Verb::Send) => {
                self.link.meet()?;
                self.request(pair, WorkRequest::send(self.filled(size)?))
            }
            (Role::Requester, Verb::SendImm) => {
                self.link.meet()?;
                self.request(pair, WorkRequest::send_with_imm(self.filled(size)?, IMM))
            }
            (Role::Responder, Verb::Send) => self.receive(pair, size, None),
            (Role::Responder, Verb::SendImm) => self.receive(pair, size, Some(IMM)),
            (Role::Requester, _) => {
                let target: RemoteSlice = self.link.hear()?;
                let source = self.filled(size)?;
                let request = match verb {
                    Verb::WriteImm => WorkRequest::write_with_imm(source, target, IMM),
                    _ => WorkRequest::write(source, target),
                };
                self.request(pair, request)?;
                self.link.tell(&())
            }
            (Role::Responder, _) => self.be_written(pair, size, verb == Verb::WriteImm),
        }
    }

    /// A buffer with the pattern of its size.
    pub(crate) fn filled(&self, size: usize) -> Fallible<Buffer> {
        let mut buffer = self.buffer(size)?;
        buffer.copy_from_slice(&pattern(size));
        Ok(buffer)
    }

    /// Posts a request and waits until it succeeded.
    pub(crate) fn request<T: Connected>(&self, pair: &Pair<T>, request: WorkRequest<'_, T>) -> Fallible<()> {
        let operation = pair.qp.start_send(request).map_err(|error| error.to_string())?;
        self.finish(operation)?.result()?;
        Ok(())
    }

    fn receive<T: Connected>(&mut self, pair: &Pair<T>, size: usize, imm: Option<u32>) -> Fallible<()> {
        let operation = pair.qp.start_recv(self.buffer(size)?).map_err(|error| error.to_string())?;
        self.link.meet()?;
        let finished = self.finish(operation)?;
        let success = finished.result()?;
        if (success.imm(), success.len()) != (imm, size) {
            return Err(format!("immediate {:?}, length {}", success.imm(), success.len()).into());
        }
        let buffer = finished.into_buffer().ok_or("no buffer came back")?;
        check("the message", &buffer, &pattern(size))
    }

    /// Shares memory with guards around the target, and checks all of it once the write is done.
    fn be_written<T: Connected + RdmaWrite>(
        &mut self,
        pair: &Pair<T>,
        size: usize,
        imm: bool,
    ) -> Fallible<()> {
        let region = self.domain.share(vec![0xaa; size + 2 * GUARD], RemoteAccess::WRITE)?;
        let receive = match imm {
            true => Some(pair.qp.start_recv(self.buffer(0)?).map_err(|error| error.to_string())?),
            false => None,
        };
        let target = region.remote().slice(GUARD as u64, size as u64).ok_or("a slice of the region")?;
        self.link.tell(&target)?;
        if let Some(operation) = receive {
            let finished = self.finish(operation)?;
            let success = finished.result()?;
            if !success.is_write_with_imm() || success.imm() != Some(IMM) || success.len() != size {
                return Err(format!("completion {success:?}").into());
            }
        }
        self.link.hear::<()>()?;
        let mut expected = vec![0xaa; size + 2 * GUARD];
        expected[GUARD..GUARD + size].copy_from_slice(&pattern(size));
        // The requester of an unreliable service knows no more than that the write was sent.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let verdict = check("the written memory", &contents(&region)?, &expected);
            if verdict.is_ok() || Instant::now() > deadline {
                return verdict;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn read(&mut self, pair: &Pair<Rc>, size: usize) -> Fallible<()> {
        if self.role == Role::Responder {
            let mut memory = pattern(size);
            memory.push(0);
            let region = self.domain.share(memory, RemoteAccess::READ)?;
            self.link.tell(&region.remote().slice(0, size as u64))?;
            return self.link.hear();
        }
        let source: Option<RemoteSlice> = self.link.hear()?;
        let request = WorkRequest::read(self.buffer(size)?, source.ok_or("a slice of the region")?);
        let operation = pair.qp.start_send(request).map_err(|error| error.to_string())?;
        let finished = self.finish(operation)?;
        finished.result()?;
        let buffer = finished.into_buffer().ok_or("no buffer came back")?;
        check("what was read", &buffer, &pattern(size))?;
        self.link.tell(&())
    }

    pub(crate) fn atomics(&mut self) -> Fallible<String> {
        let pair = self.rc(1024, patient)?;
        if self.role == Role::Responder {
            let region = self.domain.share(vec![0; 16], RemoteAccess::ATOMIC | RemoteAccess::READ)?;
            region.store(0, 5)?;
            region.store(8, u64::MAX)?;
            self.link.tell(&region.remote())?;
            self.link.hear::<()>()?;
            let words = (region.load(0)?, region.load(8)?);
            let expected = (7, self.rounds as u64 - 1);
            return match words == expected {
                true => Ok(String::new()),
                false => Err(format!("the words are {words:?} instead of {expected:?}").into()),
            };
        }
        let remote: RemoteSlice = self.link.hear()?;
        let first = remote.slice(0, 8).ok_or("16 bytes")?;
        let second = remote.slice(8, 8).ok_or("16 bytes")?;
        let swap = |session: &Session, expected, new| -> Fallible<u64> {
            session.atomic(&pair, WorkRequest::compare_and_swap(session.buffer(8)?, first, expected, new))
        };
        let seen = [swap(self, 4, 6)?, swap(self, 5, 7)?, swap(self, 5, 9)?];
        if seen != [5, 5, 7] {
            return Err(format!("compare-and-swap gave {seen:?} instead of [5, 5, 7]").into());
        }
        for round in 0..self.rounds as u64 {
            let before = self.atomic(&pair, WorkRequest::fetch_and_add(self.buffer(8)?, second, 1))?;
            if before != u64::MAX.wrapping_add(round) {
                return Err(format!("fetch-and-add {round} gave {before:#x}").into());
            }
        }
        self.link.tell(&())?;
        Ok(String::new())
    }

    fn atomic(&self, pair: &Pair<Rc>, request: WorkRequest<'_, Rc>) -> Fallible<u64> {
        let operation = pair.qp.start_send(request).map_err(|error| error.to_string())?;
        let finished = self.finish(operation)?;
        finished.result()?;
        let buffer = finished.into_buffer().ok_or("no buffer came back")?;
        Ok(u64::from_ne_bytes(buffer[..].try_into()?))
    }

    pub(crate) fn slow_receiver(&mut self) -> Fallible<String> {
        let pair = self.rc(1024, patient)?;
        for _ in 0..self.rounds.min(3) {
            match self.role {
                Role::Requester => self.request(&pair, WorkRequest::send(self.filled(3000)?))?,
                Role::Responder => {
                    std::thread::sleep(Duration::from_millis(50));
                    let operation =
                        pair.qp.start_recv(self.buffer(3000)?).map_err(|error| error.to_string())?;
                    let finished = self.finish(operation)?;
                    finished.result()?;
                    let buffer = finished.into_buffer().ok_or("no buffer came back")?;
                    check("the message", &buffer, &pattern(3000))?;
                }
            }
        }
        self.link.meet()?;
        Ok(String::new())
    }
}

/// For what must arrive however slow the machine and lossy the network: 0.27 s, and 7 retries, which
/// are endless on rxe (docs/INTEROP.md).
pub(crate) fn patient(options: &mut ConnectOptions) {
    options.timeout = 16;
    options.retry_count = 7;
}

pub(crate) fn contents(region: &SharedRegion) -> Fallible<Vec<u8>> {
    let mut bytes = vec![0; region.len()];
    region.copy_out(0, &mut bytes)?;
    Ok(bytes)
}
