//! RDMA devices, their ports and GIDs, and which of them a program takes by default.
//!
//! ```sh
//! cargo run --example device_info
//! cargo run --example device_info -- --json
//! ```

use std::process::ExitCode;

use clap::Parser;
use rdma_core::Device;
use rdma_workbench::cli;
use rdma_workbench::peer::Outcome;
use serde_json::{Value, json};

/// Lists RDMA devices with their ports, GIDs and limits.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Only this device
    #[arg(short, long, value_name = "NAME")]
    device: Option<String>,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    cli::exit("device_info", run(&options))
}

fn run(options: &Options) -> Outcome {
    let (devices, notes) = match &options.device {
        Some(name) => (vec![Device::named(name)?], Vec::new()),
        None => Device::list_with_notes(),
    };
    // A device that cannot be opened is one to be told of, too.
    let described: Vec<_> = devices
        .iter()
        .map(|device| {
            describe(device).unwrap_or_else(|error| {
                json!({
                    "device": device.name(),
                    "provider": device.provider().to_string(),
                    "guid": format!("{:016x}", device.guid()),
                    "error": error.to_string(),
                })
            })
        })
        .collect();
    let choice = Device::named_or_chosen(options.device.as_deref());
    if options.json {
        let (default, reason) = match &choice {
            Ok(choice) => (Some(choice.device.name()), choice.reason.clone()),
            Err(error) => (None, error.to_string()),
        };
        println!("{}", json!({ "devices": described, "notes": notes, "default": default, "reason": reason }));
    } else {
        described.iter().for_each(print);
        notes.iter().for_each(|note| println!("note: {note}"));
        if let Ok(choice) = &choice {
            println!("by default a program takes {}: {}", choice.device.name(), choice.reason);
        }
    }
    match (choice, options.device.as_deref().and(described.first().and_then(|d| d["error"].as_str()))) {
        (Err(error), _) => Err(error.into()),
        (Ok(_), Some(error)) => Err(error.into()),
        (Ok(_), None) => Ok(()),
    }
}

fn describe(device: &Device) -> Outcome<Value> {
    let context = device.open()?;
    let limits = context.attributes()?;
    let mut ports = Vec::new();
    for number in 1..=limits.ports {
        let port = context.port(number)?;
        let gids: Vec<_> = context
            .gids(number)?
            .iter()
            .map(|entry| {
                json!({
                    "index": entry.index,
                    "gid": entry.gid.to_string(),
                    "type": entry.gid_type.to_string(),
                    "interface": entry.interface,
                })
            })
            .collect();
        ports.push(json!({
            "port": number,
            "state": format!("{:?}", port.state),
            "physical_state": format!("{:?}", port.physical_state),
            "link_layer": format!("{:?}", port.link_layer),
            "mtu": port.active_mtu.bytes(),
            "max_mtu": port.max_mtu.bytes(),
            "lid": port.lid,
            "sm_lid": port.sm_lid,
            "rate_mbps": port.rate_mbps,
            "gids": gids,
            "gid_by_default": context.choose_gid(number).ok().map(|choice| choice.reason),
        }));
    }
    Ok(json!({
        "device": device.name(),
        "provider": device.provider().to_string(),
        "guid": format!("{:016x}", device.guid()),
        "firmware": limits.firmware,
        "limits": {
            "queue_pairs": limits.max_qp,
            "work_requests_per_queue": limits.max_qp_wr,
            "completion_queues": limits.max_cq,
            "completions_per_queue": limits.max_cqe,
            "memory_regions": limits.max_mr,
            "region_bytes": limits.max_mr_size,
            "reads_in_flight_to_a_queue_pair": limits.max_qp_rd_atom,
            "atomics": format!("{:?}", limits.atomic_capability),
        },
        "ports": ports,
    }))
}

fn print(device: &Value) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    print!("{}  {}, GUID {}", text(&device["device"]), text(&device["provider"]), text(&device["guid"]));
    if let Some(error) = device["error"].as_str() {
        println!("\n  cannot be used: {error}\n");
        return;
    }
    println!(", firmware {}", text(&device["firmware"]));
    for port in device["ports"].as_array().into_iter().flatten() {
        println!(
            "  port {}  {}, {}, {}, MTU {} of {}, {} Gb/s, LID {}, SM LID {}",
            port["port"],
            text(&port["state"]),
            text(&port["physical_state"]),
            text(&port["link_layer"]),
            port["mtu"],
            port["max_mtu"],
            port["rate_mbps"].as_f64().unwrap_or(0.0) / 1000.0,
            port["lid"],
            port["sm_lid"],
        );
        for gid in port["gids"].as_array().into_iter().flatten() {
            let interface = gid["interface"].as_str().map(|name| format!(" on {name}")).unwrap_or_default();
            println!(
                "    GID {:>3}  {:<40} {}{interface}",
                gid["index"],
                text(&gid["gid"]),
                text(&gid["type"])
            );
        }
        if let Some(reason) = port["gid_by_default"].as_str() {
            println!("    by default {reason}");
        }
    }
    println!("  limits");
    for (name, value) in device["limits"].as_object().into_iter().flatten() {
        println!("    {:<34} {}", name.replace('_', " "), text(value));
    }
    println!();
}
