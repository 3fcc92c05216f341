//! The second process of a run on one machine: this program again, as the server.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::peer::Outcome;

/// What the server prints, followed by its address, once it accepts connections.
pub const READY: &str = "listening on ";

/// The soft device's capture file. Two processes must not write to one.
const CAPTURE: &str = "RDMA_SOFT_PCAP";

/// This program, with a capture file of its own: `name.pcap` becomes `name.server.pcap`, unless the process id keeps them apart.
fn this_program(who: &str) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(file) = std::env::var_os(CAPTURE) {
        command.env(CAPTURE, own_capture(Path::new(&file), who));
    }
    command.stdin(Stdio::null());
    Ok(command)
}

fn own_capture(file: &Path, who: &str) -> PathBuf {
    if file.as_os_str().to_string_lossy().contains("%p") {
        return file.to_owned();
    }
    let mut extension = OsString::from(who);
    if let Some(own) = file.extension() {
        extension.push(".");
        extension.push(own);
    }
    file.with_extension(extension)
}

/// This program, running as a server; ended when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Starts this program with `arguments` and waits for its line `listening on ADDRESS`.
    ///
    /// # Errors
    ///
    /// The program could not be started, or it ended before it listened: then it has said why
    /// on standard error, which it shares with this process.
    pub fn start<I>(arguments: I) -> io::Result<Server>
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        let mut command = this_program("server")?;
        command.args(arguments.into_iter().map(Into::into));
        Server::start_command(command)
    }

    /// Starts `command` and waits for its line `listening on ADDRESS`.
    ///
    /// # Errors
    ///
    /// As [`start`](Server::start).
    pub fn start_command(mut command: Command) -> io::Result<Server> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let lines =
            BufReader::new(child.stdout.take().ok_or_else(|| io::Error::other("no pipe to the server"))?);
        for line in lines.lines() {
            if let Some(address) = line?.strip_prefix(READY) {
                let address =
                    address.parse().map_err(|_| io::Error::other(format!("not an address: {address}")))?;
                return Ok(Server { child, address });
            }
        }
        let status = child.wait()?;
        Err(io::Error::other(format!("the server process ended before it listened ({status})")))
    }

    /// Starts this program with its own arguments as a server on a free port of the loopback interface.
    ///
    /// # Errors
    ///
    /// As [`start`](Server::start).
    pub fn start_same() -> io::Result<Server> {
        let server = ["--listen", "127.0.0.1:0", "--accept-timeout", "30"].map(Into::into);
        Server::start(std::env::args_os().skip(1).chain(server))
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Asks the server to end, as ctrl-c at its terminal does.
    ///
    /// # Errors
    ///
    /// It has ended already.
    pub fn interrupt(&self) -> io::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), Signal::INT)?)
    }

    /// Waits for the server to end by itself, and well.
    ///
    /// # Errors
    ///
    /// It did not within ten seconds, or it failed: then it has said why on standard error.
    pub fn ended_well(self) -> Outcome {
        let status = self.finish(Duration::from_secs(10))?;
        match status.success() {
            true => Ok(()),
            false => Err(format!("the server process failed ({status})").into()),
        }
    }

    /// Waits for the server to end by itself.
    ///
    /// # Errors
    ///
    /// It did not within `limit`; it is ended then.
    pub fn finish(mut self, limit: Duration) -> io::Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= end {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server process did not end"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Starts this program `count` times with its own arguments and `address`, as clients, and waits for all of them.
///
/// # Errors
///
/// A process could not be started, or some failed: then they have said why on standard error.
pub fn run_clients(count: u32, address: SocketAddr) -> Outcome {
    let client = |number| {
        let mut command = this_program(&format!("client{number}"))?;
        command.args(std::env::args_os().skip(1)).arg(address.to_string()).spawn()
    };
    let clients = (0..count).map(client).collect::<io::Result<Vec<_>>>()?;
    let mut failed = 0;
    for mut client in clients {
        failed += u32::from(!client.wait()?.success());
    }
    match failed {
        0 => Ok(()),
        failed => Err(format!("{failed} of {count} clients failed").into()),
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
