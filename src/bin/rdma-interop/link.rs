//! The connection beside the devices: lines of JSON over TCP, with limits on time and length.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Fallible;

const LONGEST_LINE: u64 = 64 * 1024;
/// Longer than any case takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a side made of a case: a detail, or what went wrong.
pub(crate) type Outcome = Result<String, String>;

#[derive(Serialize, Deserialize)]
enum Message {
    /// Something within a case.
    Step(Value),
    /// The end of a case.
    Outcome(Outcome),
}

/// The connection to the other side.
pub(crate) struct Link {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
    /// The other side's outcome, when it came while a step was expected.
    early: Option<Outcome>,
}

impl Link {
    pub(crate) fn listen(address: SocketAddr) -> Fallible<Link> {
        let listener =
            TcpListener::bind(address).map_err(|error| format!("listening on {address}: {error}"))?;
        eprintln!("listening on {}", listener.local_addr()?);
        Link::new(listener.accept()?.0)
    }

    /// Tries for some seconds: the other side may just be starting.
    pub(crate) fn connect(address: SocketAddr) -> Fallible<Link> {
        let start = Instant::now();
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(stream) => return Link::new(stream),
                Err(error) if start.elapsed() > Duration::from_secs(10) => {
                    return Err(format!("connecting to {address}: {error}").into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn new(stream: TcpStream) -> Fallible<Link> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Link { reader: BufReader::new(stream.try_clone()?), writer: stream, early: None })
    }

    fn write(&mut self, message: &Message) -> Fallible<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.writer.write_all(&line)?)
    }

    fn read(&mut self) -> Fallible<Message> {
        let mut line = String::new();
        (&mut self.reader).take(LONGEST_LINE).read_line(&mut line)?;
        if !line.ends_with('\n') {
            return Err("the other side is gone, or sent more than a line may have".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a step to the other side.
    pub(crate) fn tell(&mut self, step: &impl Serialize) -> Fallible<()> {
        self.write(&Message::Step(serde_json::to_value(step)?))
    }

    /// Waits for a step of the other side.
    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> Fallible<T> {
        match self.read()? {
            Message::Step(step) => Ok(serde_json::from_value(step)?),
            Message::Outcome(outcome) => {
                self.early = Some(outcome);
                Err("the other side gave the case up".into())
            }
        }
    }

    /// Both sides tell and hear.
    pub(crate) fn exchange<T: Serialize + DeserializeOwned>(&mut self, own: &T) -> Fallible<T> {
        self.tell(own)?;
        self.hear()
    }

    /// Both sides have come to this point.
    pub(crate) fn meet(&mut self) -> Fallible<()> {
        self.exchange(&())
    }

    /// Ends a case: the other side's outcome. Steps that nobody waits for any more are skipped.
    pub(crate) fn settle(&mut self, own: &Outcome) -> Fallible<Outcome> {
        self.write(&Message::Outcome(own.clone()))?;
        if let Some(outcome) = self.early.take() {
            return Ok(outcome);
        }
        loop {
            if let Message::Outcome(outcome) = self.read()? {
                return Ok(outcome);
            }
        }
    }
}
