//! Two devices talk to each other: every operation, at several path MTUs and sizes, and the errors.
//!
//! One side listens, the other connects and, unless told otherwise, is the requester; both check what they see. The
//! requester prints a line for each case: verdict, name and detail, separated by tabs.
//!
//! ```text
//! rdma-interop --device rxe0 --listen 10.98.0.1:7471
//! rdma-interop --device soft0 10.98.0.1:7471
//! ```

mod cases;
mod counters;
mod datagrams;
mod faults;
mod link;
mod session;
mod transfers;
mod windows;

use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Parser;

use cases::{Case, Plan};
use link::Link;
use session::{Role, Session};

/// Any error: it becomes the detail of a case, or ends the program.
type Fallible<T> = Result<T, Box<dyn Error>>;

/// Runs every operation between two RDMA devices and reports what each side saw.
#[derive(Parser, Debug)]
struct Arguments {
    /// The listening side, to connect to.
    #[arg(required_unless_present = "listen")]
    peer: Option<SocketAddr>,
    /// Listen here for the other side.
    #[arg(long, conflicts_with = "peer")]
    listen: Option<SocketAddr>,
    /// Answer, while the listening side is the requester.
    #[arg(long, requires = "peer")]
    respond: bool,
    /// The device to use; chosen when left out.
    #[arg(long)]
    device: Option<String>,
    /// GID index; chosen when left out.
    #[arg(long)]
    gid_index: Option<u8>,
    /// Path MTUs.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024, 4096])]
    mtus: Vec<u32>,
    /// Message sizes.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 3, 4095, 4096, 4097, 65536, 1 << 20])]
    sizes: Vec<usize>,
    /// The network loses packets: only what must arrive all the same, and each case many times.
    #[arg(long)]
    lossy: bool,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every case passed.
fn run(arguments: &Arguments) -> Fallible<bool> {
    let choice = rdma_core::Device::named_or_chosen(arguments.device.as_deref())?;
    let context = choice.device.open()?;
    let (mut link, role) = match (arguments.listen, arguments.peer) {
        (Some(address), _) => {
            let mut link = Link::listen(address)?;
            let role = if link.hear()? { Role::Requester } else { Role::Responder };
            (link, role)
        }
        (None, Some(address)) => {
            let mut link = Link::connect(address)?;
            link.tell(&arguments.respond)?;
            (link, if arguments.respond { Role::Responder } else { Role::Requester })
        }
        (None, None) => return Err("an address to connect to, or --listen".into()),
    };
    // The requester decides what runs.
    let plan = match role {
        Role::Requester => {
            let plan = Plan {
                mtus: arguments.mtus.clone(),
                sizes: arguments.sizes.clone(),
                lossy: arguments.lossy,
                only: arguments.only.clone(),
            };
            link.tell(&plan)?;
            plan
        }
        Role::Responder => link.hear()?,
    };
    let is_rxe = session::is_rxe(&context, choice.device.provider())?;
    let mut session = Session::new(&context, is_rxe, arguments.gid_index, link, role, plan.lossy)?;
    let mut all = true;
    for case in plan.cases() {
        all &= report(&mut session, &case)?;
    }
    for (name, value) in counters::counters(context.name()) {
        eprintln!("counter {name} {value}");
    }
    Ok(all)
}

/// Runs a case on both sides; the requester prints what came of it. Whether it passed.
fn report(session: &mut Session, case: &Case) -> Fallible<bool> {
    let own = session.run(case).map_err(|error| error.to_string());
    let peer = session.link.settle(&own)?;
    let passed = own.is_ok() && peer.is_ok();
    if session.role == Role::Requester {
        let detail = match (own, peer) {
            (Ok(own), Ok(peer)) => [own, peer].join(" ").trim().to_owned(),
            (Err(own), Err(peer)) => format!("requester: {own}; responder: {peer}"),
            (Err(own), _) => format!("requester: {own}"),
            (_, Err(peer)) => format!("responder: {peer}"),
        };
        println!("{}\t{case}\t{}", if passed { "ok" } else { "FAILED" }, detail.replace(['\t', '\n'], " "));
    }
    Ok(passed)
}
