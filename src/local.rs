//! The second process of a run on one machine: this program again, as the server.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What the server prints, followed by its address, once it accepts connections.
pub const READY: &str = "listening on ";

/// The soft device's capture file. Two processes must not write to one.
const CAPTURE: &str = "RDMA_SOFT_PCAP";

/// `name.pcap` becomes `name.server.pcap`, unless the process id keeps the two apart.
fn server_capture(file: &Path) -> PathBuf {
    if file.as_os_str().to_string_lossy().contains("%p") {
        return file.to_owned();
    }
    let mut extension = OsString::from("server");
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
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments.into_iter().map(Into::into)).stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(file) = std::env::var_os(CAPTURE) {
            command.env(CAPTURE, server_capture(Path::new(&file)));
        }
        let mut child = command.spawn()?;
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
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

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
