//! What the machine offers: kernel modules, device files, providers, limits.

use std::fs;
use std::io;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use crate::Finding;

/// What one large region needs, as a measure.
const ENOUGH_LOCKED: u64 = 1 << 30;
/// `CAP_IPC_LOCK` (`man 7 capabilities`): locked memory without limit.
const CAP_IPC_LOCK: u32 = 14;
const WITHOUT: &str = "nothing to do for the built-in soft device";

pub(crate) fn check() -> Vec<Finding> {
    let mut findings = vec![modules(), kernel_devices()];
    findings.extend(device_files());
    findings.push(providers(&["/etc", "/usr/etc", "/usr/local/etc"]));
    findings.push(locked_memory());
    findings.push(huge_pages(&fs::read_to_string("/proc/meminfo").unwrap_or_default()));
    findings.extend(receive_buffers(&fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap_or_default()));
    findings.push(cores());
    findings
}

/// The names in a folder, sorted; none if there is no such folder.
fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn modules() -> Finding {
    let loaded: Vec<_> = names("/sys/module")
        .into_iter()
        .filter(|name| {
            name.starts_with("ib_") || name.starts_with("rdma_") || name.ends_with("_ib") || name == "siw"
        })
        .collect();
    let has = |name: &str| Path::new("/sys/module").join(name).exists();
    if !has("ib_core") {
        return Finding::note(
            "kernel modules",
            "no RDMA in this kernel (no ib_core)",
            format!(
                "{WITHOUT}; for a NIC: `modprobe ib_uverbs` and the NIC's driver; for Soft-RoCE: `sudo ./rxe-setup.sh add`"
            ),
        );
    }
    if !has("ib_uverbs") {
        return Finding::problem(
            "kernel modules",
            format!("ib_uverbs is not loaded (there are {})", loaded.join(", ")),
            "`modprobe ib_uverbs`: programs reach devices through it",
        );
    }
    Finding::ok("kernel modules", loaded.join(", "))
}

fn kernel_devices() -> Finding {
    match names("/sys/class/infiniband") {
        devices if devices.is_empty() => Finding::note(
            "kernel devices",
            "none in /sys/class/infiniband",
            format!(
                "{WITHOUT}; a NIC's driver is missing or there is no NIC; Soft-RoCE: `sudo ./rxe-setup.sh add`"
            ),
        ),
        devices => Finding::ok("kernel devices", devices.join(", ")),
    }
}

/// The files that programs open, one per device.
fn device_files() -> Vec<Finding> {
    let known = names("/sys/class/infiniband_verbs").into_iter().filter(|name| name.starts_with("uverbs"));
    known
        .map(|name| {
            let path = Path::new("/dev/infiniband").join(&name);
            match fs::OpenOptions::new().read(true).write(true).open(&path) {
                Ok(_) => Finding::ok("device files", path.display().to_string()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::problem(
                    "device files",
                    format!("{} is missing", path.display()),
                    "in a container: start it with --device=/dev/infiniband; else udev should make it",
                ),
                Err(error) => Finding::problem(
                    "device files",
                    format!("{}: {error}", path.display()),
                    "the rules of rdma-core make it readable and writable by all (mode 0666): install it, or chmod",
                ),
            }
        })
        .collect()
}

/// Libraries that libibverbs reaches devices through; each leaves a file where it is configured.
fn providers(roots: &[&str]) -> Finding {
    let folders = roots.iter().map(|root| format!("{root}/libibverbs.d"));
    let mut known: Vec<_> = folders
        .flat_map(|folder| names(&folder))
        .filter_map(|name| name.strip_suffix(".driver").map(str::to_owned))
        .collect();
    known.sort();
    known.dedup();
    if !known.is_empty() {
        return Finding::ok("providers", known.join(", "));
    }
    let (found, remedy) = ("libibverbs has none", "`apt-get install ibverbs-providers` (Debian, Ubuntu)");
    if names("/sys/class/infiniband").is_empty() {
        Finding::note("providers", found, format!("{WITHOUT}; for a NIC or Soft-RoCE: {remedy}"))
    } else {
        Finding::problem(
            "providers",
            found,
            format!("{remedy}: without one no device of the kernel can be used"),
        )
    }
}

fn locked_memory() -> Finding {
    let limit = getrlimit(Resource::Memlock);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    verdict_on_locked_memory(limit.current, limit.maximum, has_capability(&status, CAP_IPC_LOCK))
}

fn has_capability(status: &str, capability: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set >> capability & 1 == 1)
}

fn verdict_on_locked_memory(soft: Option<u64>, hard: Option<u64>, unlimited: bool) -> Finding {
    let check = "locked memory";
    let Some(soft) = soft else { return Finding::ok(check, "unlimited") };
    let mib = soft >> 20;
    if unlimited {
        return Finding::ok(check, format!("{mib} MiB, and CAP_IPC_LOCK, which lifts the limit"));
    }
    if soft >= ENOUGH_LOCKED {
        return Finding::ok(check, format!("{mib} MiB"));
    }
    let remedy = match hard {
        Some(hard) if hard < ENOUGH_LOCKED => {
            "LimitMEMLOCK=infinity in a systemd unit, `* - memlock unlimited` in /etc/security/limits.d/rdma.conf, --ulimit memlock=-1 for a container"
        }
        _ => "`ulimit -l unlimited` before the program is started: the hard limit allows it",
    };
    let found = format!("RLIMIT_MEMLOCK is {mib} MiB: on hardware, registering more fails with ENOMEM");
    if names("/sys/class/infiniband").is_empty() {
        Finding::note(check, found, format!("{WITHOUT}, which locks nothing; else {remedy}"))
    } else {
        Finding::problem(check, found, remedy)
    }
}

fn huge_pages(meminfo: &str) -> Finding {
    let number = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    match number("HugePages_Free") {
        Some(free @ 1..) => {
            Finding::ok("huge pages", format!("{free} of {} kB free", number("Hugepagesize").unwrap_or(0)))
        }
        _ => Finding::note(
            "huge pages",
            "none free",
            "only for Memory::huge_pages: `sysctl vm.nr_hugepages=512` reserves 1 GiB; large regions register faster on them",
        ),
    }
}

/// The soft device receives through a UDP socket.
fn receive_buffers(rmem_max: &str) -> Option<Finding> {
    const WANTED: u64 = 1 << 20;
    let bytes: u64 = rmem_max.trim().parse().ok()?;
    Some(match bytes < WANTED {
        true => Finding::note(
            "UDP buffers",
            format!("net.core.rmem_max is {} KiB", bytes >> 10),
            "only for the soft device between hosts: `sysctl net.core.rmem_max=4194304` loses fewer packets in bursts",
        ),
        false => Finding::ok("UDP buffers", format!("net.core.rmem_max is {} KiB", bytes >> 10)),
    })
}

fn cores() -> Finding {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => Finding::note(
            "processors",
            "one",
            "wait by events (WaitMode::Event, --mode event): two processes that poll take turns on one core",
        ),
        n => Finding::ok("processors", n.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Verdict;

    #[test]
    fn limits_of_locked_memory_are_judged() {
        assert_eq!(verdict_on_locked_memory(None, None, false).verdict, Verdict::Ok);
        assert_eq!(verdict_on_locked_memory(Some(8 << 20), None, true).verdict, Verdict::Ok);
        assert_eq!(verdict_on_locked_memory(Some(4 << 30), None, false).verdict, Verdict::Ok);
        let small = verdict_on_locked_memory(Some(8 << 20), Some(8 << 20), false);
        assert_ne!(small.verdict, Verdict::Ok);
        assert!(small.remedy.is_some_and(|remedy| remedy.contains("limits.d")));
        let soft = verdict_on_locked_memory(Some(8 << 20), None, false);
        assert!(soft.remedy.is_some_and(|remedy| remedy.contains("ulimit -l unlimited")));
    }

    #[test]
    fn what_the_kernel_writes_is_understood() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_IPC_LOCK));
        assert!(!has_capability("CapEff:\t0000000000000000\n", CAP_IPC_LOCK));
        assert!(!has_capability("", CAP_IPC_LOCK));
        assert_eq!(
            huge_pages("HugePages_Free:      12\nHugepagesize:       2048 kB\n").found,
            "12 of 2048 kB free"
        );
        assert_eq!(huge_pages("").verdict, Verdict::Note);
        assert_eq!(receive_buffers("212992\n").map(|finding| finding.verdict), Some(Verdict::Note));
        assert!(receive_buffers("").is_none());
    }
}
