//! Command-line options that the examples share.

use std::error::Error;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use rdma_async::WaitMode;
use rdma_core::{Context, Device, GidEntry, LinkLayer, Mtu, PortState};

/// Which device, port and GID to use.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceOptions {
    /// RDMA device; unless given, the first with an ACTIVE port that libibverbs lists, else the built-in soft0
    #[arg(short, long, value_name = "NAME")]
    pub device: Option<String>,
    /// Port, counted from 1; unless given, the first ACTIVE one
    #[arg(long, value_name = "PORT", value_parser = number(1..=254_u8))]
    pub port: Option<u8>,
    /// Index of the local GID; unless given, RoCE v2 over IPv4 comes first
    #[arg(long, value_name = "INDEX", value_parser = number(0..=255_u8))]
    pub gid_index: Option<u8>,
}

/// An open device with everything that a report says of it.
#[derive(Debug, Clone)]
pub struct OpenDevice {
    /// The device.
    pub context: Context,
    /// Why this one, in words.
    pub reason: String,
    /// Its port.
    pub port: u8,
    /// The GID to use; an InfiniBand port may have none worth naming.
    pub gid: Option<GidEntry>,
    /// Why this GID, in words.
    pub gid_reason: String,
    /// The port's active MTU.
    pub mtu: Mtu,
}

impl DeviceOptions {
    /// Opens the device and looks at the port and the GID.
    ///
    /// # Errors
    ///
    /// There is no such device, port or GID (with those that exist), or a verb failed.
    pub fn open(&self) -> Result<OpenDevice, Box<dyn Error>> {
        let choice = Device::named_or_chosen(self.device.as_deref())?;
        let context = choice.device.open()?;
        let ports = context.attributes()?.ports;
        let port = match self.port {
            Some(port) if port == 0 || port > ports => {
                return Err(
                    format!("{} has no port {port}: its ports are 1 to {ports}", context.name()).into()
                );
            }
            Some(port) => port,
            None => (1..=ports)
                .find(|&port| context.port(port).is_ok_and(|port| port.state == PortState::Active))
                .ok_or_else(|| {
                    format!("{} has no ACTIVE port: see `ibv_devinfo` for their states", context.name())
                })?,
        };
        let attributes = context.port(port)?;
        let (gid, gid_reason) = match self.gid_index {
            Some(index) => {
                let gids = context.gids(port)?;
                let known: Vec<_> =
                    gids.iter().map(|gid| format!("{} ({}, {})", gid.index, gid.gid, gid.gid_type)).collect();
                let gid = gids.into_iter().find(|gid| gid.index == u32::from(index));
                let gid =
                    gid.ok_or_else(|| format!("no GID at index {index}; there are {}", known.join(", ")))?;
                (Some(gid), "asked for".to_owned())
            }
            None if attributes.link_layer == LinkLayer::InfiniBand => {
                (None, "InfiniBand addresses by LID".to_owned())
            }
            None => {
                let choice = context.choose_gid(port)?;
                (Some(choice.entry), choice.reason)
            }
        };
        Ok(OpenDevice { context, reason: choice.reason, port, gid, gid_reason, mtu: attributes.active_mtu })
    }
}

impl OpenDevice {
    /// The GID as text, or the word that says why there is none.
    #[must_use]
    pub fn gid_text(&self) -> String {
        self.gid.as_ref().map_or_else(|| "none".to_owned(), |entry| entry.gid.to_string())
    }

    /// Settings of a connection that follow from the device's.
    pub fn configure<T>(&self, config: rdma_async::Config<T>) -> rdma_async::Config<T> {
        let config = config.port(self.port);
        match &self.gid {
            // The wire's address vector has eight bits for it.
            Some(gid) => config.gid_index(gid.index),
            None => config,
        }
    }
}

impl std::fmt::Display for OpenDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "device  {} port {}: {}", self.context.name(), self.port, self.reason)?;
        writeln!(f, "GID     {}: {}", self.gid_text(), self.gid_reason)?;
        write!(f, "MTU     {} bytes", self.mtu)
    }
}

/// How to wait for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Poll the completion queue without end: lowest latency, a core each
    Busy,
    /// Sleep until the device raises an event
    Event,
    /// Poll for a while, then sleep
    Adaptive,
}

impl From<Mode> for WaitMode {
    fn from(mode: Mode) -> WaitMode {
        match mode {
            Mode::Busy => WaitMode::Busy,
            Mode::Event => WaitMode::Event,
            Mode::Adaptive => WaitMode::Adaptive,
        }
    }
}

/// Reads a number of `range`; what is wrong comes with what is right.
pub fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync,
{
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("give a number between {} and {}", range.start(), range.end()))
    }
}

/// The name that the option has on the command line.
pub fn name_of(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Ends the process as a command-line program should: 0, or 1 with the error and its causes on standard error.
pub fn exit(program: &str, result: Result<(), Box<dyn Error>>) -> std::process::ExitCode {
    let Err(error) = result else { return std::process::ExitCode::SUCCESS };
    eprintln!("{program}: {error}");
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some errors say their cause themselves.
        if !said.contains(&cause.to_string()) {
            said = cause.to_string();
            eprintln!("  because: {said}");
        }
        source = cause.source();
    }
    std::process::ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_number_is_answered_by_what_is_right() {
        let parse = number(1..=64_u32);
        assert_eq!(parse("64"), Ok(64));
        for wrong in ["0", "65", "4x", "", "-1", "1.5"] {
            assert_eq!(parse(wrong).unwrap_err(), "give a number between 1 and 64");
        }
    }
}
