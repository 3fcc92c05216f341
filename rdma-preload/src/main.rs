//! `rdma-soft run -- PROGRAM ARGS`: runs a program that uses libibverbs on the soft device.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, Parser, Subcommand};

/// Run programs that use libibverbs on an RDMA device in user space: no RDMA hardware, kernel module or root.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Run a program with the device `soft0` in its device list
    #[command(
        after_help = "Examples:\n  rdma-soft run -- ibv_devices\n  rdma-soft run -- ib_send_lat -d soft0 -x 1"
    )]
    Run(Run),
}

#[derive(Debug, Args)]
struct Run {
    /// Address or interface to bind (RDMA_SOFT_ADDR); the first free one of 127.0.0.1, 127.0.0.2, ... if not given
    #[arg(long, value_name = "ADDRESS|INTERFACE")]
    addr: Option<OsString>,
    /// Faults to inject, such as loss=0.05,dup=0.01,reorder=0.02,corrupt=0.001,seed=7 (RDMA_SOFT_FAULT)
    #[arg(long, value_name = "FAULTS")]
    fault: Option<OsString>,
    /// Write every packet to this file, for Wireshark (RDMA_SOFT_PCAP)
    #[arg(long, value_name = "FILE")]
    pcap: Option<OsString>,
    /// A folder that holds the drop-in libibverbs.so.1, for programs that open the library by name
    #[arg(long, value_name = "FOLDER")]
    drop_in: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn main() -> ExitCode {
    let Action::Run(run) = Cli::parse().command;
    let message = match execute(&run) {
        Ok(never) => match never {},
        Err(message) => message,
    };
    eprintln!("rdma-soft: {message}");
    ExitCode::from(127)
}

/// Replaces this process by the program; returns only when that fails.
fn execute(run: &Run) -> Result<std::convert::Infallible, String> {
    let (program, arguments) = run.program.split_first().ok_or("no program given")?;
    let mut command = Command::new(program);
    command.args(arguments);
    for (variable, value) in
        [("RDMA_SOFT_ADDR", &run.addr), ("RDMA_SOFT_FAULT", &run.fault), ("RDMA_SOFT_PCAP", &run.pcap)]
    {
        if let Some(value) = value {
            command.env(variable, value);
        }
    }
    match &run.drop_in {
        Some(folder) => {
            if !folder.join("libibverbs.so.1").exists() {
                return Err(format!(
                    "{} has no libibverbs.so.1; ci/build-libibverbs.sh builds one",
                    folder.display()
                ));
            }
            command.env("LD_LIBRARY_PATH", prepend("LD_LIBRARY_PATH", folder.as_os_str()));
        }
        None => {
            command.env("LD_PRELOAD", prepend("LD_PRELOAD", library()?.as_os_str()));
        }
    }
    Err(format!("{}: {}", Path::new(program).display(), command.exec()))
}

/// `value` in front of what the variable holds already.
fn prepend(variable: &str, value: &std::ffi::OsStr) -> OsString {
    let mut list = value.to_owned();
    if let Some(old) = std::env::var_os(variable).filter(|old| !old.is_empty()) {
        list.push(":");
        list.push(old);
    }
    list
}

/// The preload library, which stands beside this program where cargo builds it and in `../lib` where it is installed.
fn library() -> Result<PathBuf, String> {
    const NAME: &str = "librdma_preload.so";
    let program = std::env::current_exe().map_err(|e| format!("the program's own path is unknown: {e}"))?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let candidates = [folder.join(NAME), folder.join("deps").join(NAME), folder.join("../lib").join(NAME)];
    candidates.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let tried: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        format!(
            "{NAME} is in none of {}; build it with `cargo build --release -p rdma-preload`",
            tried.join(", ")
        )
    })
}
