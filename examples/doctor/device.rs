//! What libibverbs and the built-in device offer, down to a message that arrives.

use std::time::{Duration, Instant};

use rdma_async::{Config, Domain, Listener, connect};
use rdma_core::{Choice, Context, Device, GidType, LinkLayer, PortAttributes, PortState, Provider};
use rdma_workbench::peer::{Outcome, runtime};

use crate::Finding;

/// How long a message of this machine to itself may take.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn check(name: Option<&str>, hardware: bool) -> Vec<Finding> {
    let (devices, notes) = Device::list_with_notes();
    let mut findings: Vec<_> = notes
        .iter()
        .map(|note| {
            let remedy = "nothing to do for the built-in soft device; for others see docs/DEPLOY.md";
            Finding::note("libibverbs", note.clone(), remedy)
        })
        .collect();
    for device in &devices {
        findings.extend(describe(device, name == Some(device.name())));
    }
    match Device::named_or_chosen(name) {
        Ok(choice) => findings.extend(chosen(&choice, hardware)),
        Err(error) => findings.push(Finding::problem("device", error.to_string(), "see the findings above")),
    }
    findings
}

/// A device with its ports. What is wrong with one that was asked for is a problem; with another, a note.
fn describe(device: &Device, wanted: bool) -> Vec<Finding> {
    let wrong: Wrong = if wanted { Finding::problem } else { Finding::note };
    let name = device.name();
    let context = match device.open() {
        Ok(context) => context,
        Err(error) => {
            let remedy = "see the findings on device files and providers above, and the kernel's log";
            return vec![wrong("device", format!("{name} cannot be opened: {error}"), remedy.to_owned())];
        }
    };
    let limits = match context.attributes() {
        Ok(limits) => limits,
        Err(error) => {
            let remedy = "the driver does not answer: see the kernel's log".to_owned();
            return vec![wrong("device", format!("{name}: {error}"), remedy)];
        }
    };
    let found =
        format!("{name}, {}, {} port(s), firmware {}", device.provider(), limits.ports, limits.firmware);
    let mut findings = vec![Finding::ok("device", found)];
    for number in 1..=limits.ports {
        match context.port(number) {
            Ok(port) => findings.extend(describe_port(&context, number, &port, wrong)),
            Err(error) => {
                findings.push(wrong(
                    "port",
                    format!("{name} port {number}: {error}"),
                    "see the kernel's log".to_owned(),
                ));
            }
        }
    }
    findings
}

type Wrong = fn(&'static str, String, String) -> Finding;

fn describe_port(context: &Context, number: u8, port: &PortAttributes, wrong: Wrong) -> Vec<Finding> {
    let at = format!("{} port {number}", context.name());
    if port.state != PortState::Active {
        let remedy = match (port.link_layer, port.state) {
            (LinkLayer::Ethernet, _) => {
                "bring its network interface up (`ip link set DEV up`) and check the cable"
            }
            (_, PortState::Init | PortState::Armed) => {
                "the fabric has no subnet manager: start opensm on one host"
            }
            _ => "check cable and switch (`ibstat`)",
        };
        let found = format!("{at} is {:?} ({:?})", port.state, port.physical_state);
        return vec![wrong("port", found, remedy.to_owned())];
    }
    let mut findings = vec![Finding::ok(
        "port",
        format!("{at} is ACTIVE, {:?}, {} Gb/s", port.link_layer, port.rate_mbps as f64 / 1000.0),
    )];
    if port.needs_gid() {
        findings.push(match context.choose_gid(number) {
            Err(error) => wrong(
                "GID",
                format!("{at}: {error}"),
                "give its network interface an IPv4 address (`ip addr add`), and bring it up".to_owned(),
            ),
            Ok(choice) if choice.entry.gid_type != GidType::RoceV2 => Finding::note(
                "GID",
                format!("{at}: {}", choice.reason),
                "only RoCE v2 passes routers: give the interface an IPv4 address, and look at the NIC's RoCE mode",
            ),
            Ok(choice) => Finding::ok("GID", format!("{at}: {}", choice.reason)),
        });
    }
    let (active, most) = (port.active_mtu.bytes(), port.max_mtu.bytes());
    findings.push(match active < most && port.link_layer == LinkLayer::Ethernet {
        true => Finding::note(
            "MTU",
            format!("{at}: path MTU {active} of {most} bytes"),
            "large messages go faster with `ip link set DEV mtu 4200` (or 9000) on both hosts and the switches between",
        ),
        false => Finding::ok("MTU", format!("{at}: path MTU {active} of {most} bytes")),
    });
    findings
}

/// The device that a program takes, and a message through it.
fn chosen(choice: &Choice, hardware: bool) -> Vec<Finding> {
    let name = choice.device.name();
    let taken = format!("{name}: {}", choice.reason);
    let mut findings = vec![if hardware && choice.device.provider() == Provider::Soft {
        Finding::problem("taken by default", taken, "--hardware asks for another: see the notes above")
    } else {
        Finding::ok("taken by default", taken)
    }];
    findings.push(
        match runtime().map_err(Into::into).and_then(|runtime| runtime.block_on(loopback(&choice.device))) {
            Ok(time) => Finding::ok(
                "message to itself",
                format!("arrived over {name}, {:.0} us there and back", time.as_secs_f64() * 1e6),
            ),
            Err(error) => Finding::problem(
                "message to itself",
                format!("over {name}: {error}"),
                "see docs/TROUBLESHOOTING.md",
            ),
        },
    );
    findings
}

/// Two connected queue pairs of this process, and a message there and back.
async fn loopback(device: &Device) -> Outcome<Duration> {
    let context = device.open()?;
    let ports = 1..=context.attributes()?.ports;
    let is_active = |&port: &u8| context.port(port).is_ok_and(|port| port.state == PortState::Active);
    let port = ports.into_iter().find(is_active).ok_or("no port is ACTIVE")?;
    let domain = Domain::new(&context)?;
    let config = Config::rc().port(port);
    let listener = Listener::bind("127.0.0.1:0", &domain, &config).await?;
    let both = async {
        let (server, client) =
            tokio::join!(listener.accept(), connect(listener.local_addr(), &domain, &config));
        let (server, client) = (server?, client?);
        let mut buffer = client.pool().acquire().await;
        buffer.set_len(64);
        let begin = Instant::now();
        client.send(buffer).await.0?;
        server.send(server.recv().await?).await.0?;
        client.recv().await?;
        Outcome::Ok(begin.elapsed())
    };
    tokio::time::timeout(PATIENCE, both).await.map_err(|_| format!("nothing arrived within {PATIENCE:?}"))?
}
