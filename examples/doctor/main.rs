//! Says whether RDMA programs will work on this machine, and what to fix.
//!
//! ```sh
//! cargo run --example doctor                   # whatever device a program would take
//! cargo run --example doctor -- --hardware     # fails unless a NIC, or the kernel's Soft-RoCE, can be used
//! cargo run --example doctor -- --json
//! ```

mod device;
mod system;

use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

/// Checks this machine for RDMA: kernel, libibverbs, devices, ports, GIDs, MTU, locked memory, and a message to itself.
///
/// Each check is ok, a note (good to know), or a PROBLEM with what to do. Exit status: 0 without a problem, 1 with one, 2 for
/// wrong arguments.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Check this device; unless given, the one that programs take by default
    #[arg(short, long, value_name = "NAME")]
    device: Option<String>,
    /// Take it for a problem when only the built-in soft device can be used
    #[arg(long)]
    hardware: bool,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Note,
    Problem,
}

/// A check: what was looked at, what was found, and what to do about it.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn note(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn problem(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Problem, found: found.into(), remedy: Some(remedy.into()) }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut findings = system::check();
    findings.extend(device::check(options.device.as_deref(), options.hardware));
    let problems = findings.iter().filter(|finding| finding.verdict == Verdict::Problem).count();
    if options.json {
        println!("{}", serde_json::json!({ "problems": problems, "findings": findings }));
    } else {
        print(&findings);
        match problems {
            0 => println!("\nRDMA programs work on this machine"),
            1 => println!("\n1 problem"),
            n => println!("\n{n} problems"),
        }
    }
    if problems == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(findings: &[Finding]) {
    for Finding { check, verdict, found, remedy } in findings {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "PROBLEM",
        };
        println!("{verdict:<8} {check:<18} {found}");
        if let Some(remedy) = remedy {
            println!("{:<27} -> {remedy}", "");
        }
    }
}
