//! The two sides of a program: server, client, or both on this machine.

use std::error::Error;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use rdma_async::{Config, Connected, Connection, Domain, Listener};
use tokio::runtime::Runtime;

use crate::cli::number;
use crate::local::{READY, Server};

/// What a side of a program ends with.
pub type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Which side this process is.
#[derive(Debug, Clone, clap::Args)]
pub struct PeerOptions {
    /// Connect to a server started with --listen; without this and --listen, both sides run on this machine
    #[arg(value_name = "ADDR:PORT", conflicts_with = "listen", value_parser = address)]
    pub server: Option<String>,
    /// Be the server; port 0 takes a free one and says which
    #[arg(short, long, value_name = "ADDR:PORT", value_parser = address)]
    pub listen: Option<String>,
    /// As a server, give up when a client does not connect in so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = number(1..=86_400_u64))]
    pub accept_timeout: Option<u64>,
}

/// Which side this process is, with the address to listen on or to connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role<'a> {
    /// Listens.
    Server(&'a str),
    /// Connects.
    Client(&'a str),
    /// Starts a server process of this machine, and connects to it.
    Both,
}

/// A host name or address, and a port; IPv6 in brackets.
fn address(text: &str) -> Result<String, String> {
    let right = "give an address and a port, as in 192.0.2.1:7471, [2001:db8::1]:7471 or host:7471";
    let (host, port) = text.rsplit_once(':').ok_or(right)?;
    if host.is_empty() || (host.contains(':') && !host.starts_with('[')) {
        return Err(right.to_owned());
    }
    match port.parse::<u16>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("{port:?} is no port, a number up to 65535; {right}")),
    }
}

impl PeerOptions {
    /// Which side this process is.
    #[must_use]
    pub fn role(&self) -> Role<'_> {
        match (&self.listen, &self.server) {
            (Some(address), _) => Role::Server(address),
            (None, Some(address)) => Role::Client(address),
            (None, None) => Role::Both,
        }
    }

    /// The program's name in its error messages.
    #[must_use]
    pub fn name(&self, program: &str) -> String {
        match self.role() {
            Role::Server(_) => format!("{program} (server)"),
            Role::Client(_) | Role::Both => program.to_owned(),
        }
    }

    /// Runs `serve` or `work` with the address, or `work` against a server process.
    ///
    /// # Errors
    ///
    /// What the sides end with; the server process did not end well.
    pub fn run(
        &self,
        serve: impl AsyncFnOnce(&str) -> Outcome,
        work: impl AsyncFnOnce(&str) -> Outcome,
    ) -> Outcome {
        // One thread: the future that waits is the one that polls, with no hop in between.
        let runtime = runtime()?;
        match self.role() {
            Role::Server(address) => runtime.block_on(serve(address)),
            Role::Client(address) => runtime.block_on(work(address)),
            Role::Both => {
                let server = Server::start_same()?;
                runtime.block_on(work(&server.address().to_string()))?;
                server.ended_well()
            }
        }
    }

    /// The next connection, within the time that the options give.
    ///
    /// # Errors
    ///
    /// Nobody connected in time, or the connection failed.
    pub async fn accept<T: Connected>(&self, listener: &Listener<T>) -> Outcome<Connection<T>> {
        Ok(self.limit(listener.accept()).await??)
    }

    /// Awaits the next client, within the time that the options give.
    ///
    /// # Errors
    ///
    /// The time is over.
    pub async fn limit<F: Future>(&self, client: F) -> Outcome<F::Output> {
        match self.accept_timeout {
            Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), client)
                .await
                .map_err(|_| format!("no client connected within {seconds} s").into()),
            None => Ok(client.await),
        }
    }
}

/// Connects to a server of the same program.
///
/// # Errors
///
/// What [`rdma_async::connect`] says, with the address.
pub async fn connect<T: Connected>(
    address: &str,
    domain: &Domain,
    config: &Config<T>,
) -> Outcome<Connection<T>> {
    rdma_async::connect(address, domain, config).await.map_err(|error| refused(address, &error))
}

/// An error of connecting to `address`, with what is most likely.
pub fn refused(address: &str, error: &dyn Error) -> Box<dyn Error> {
    format!("{address}: {error}; does the same program run there with --listen?").into()
}

/// A runtime of one thread.
///
/// # Errors
///
/// What the system says.
pub fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Says, for people and for the process that started this one, where a server listens.
///
/// # Errors
///
/// Standard output is closed.
pub fn announce(address: SocketAddr) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{READY}{address}")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_is_done() {
        for good in ["192.0.2.1:7471", "[2001:db8::1]:7471", "host.example:0", "localhost:65535"] {
            assert_eq!(address(good).as_deref(), Ok(good));
        }
        for bad in ["192.0.2.1", ":7471", "2001:db8::1:7471", "host:port", "host:65536", ""] {
            assert!(address(bad).unwrap_err().contains("192.0.2.1:7471"), "{bad:?}");
        }
    }
}
