//! What the device counted: retransmissions, and packets that it dropped.

use std::fs;
use std::path::Path;

/// Names and values of the counters of a device that are not 0: the soft device's own, else the kernel's.
pub(crate) fn counters(device: &str) -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = match rdma_soft::counters() {
        Some(counters) => counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        None => kernel(&Path::new("/sys/class/infiniband").join(device).join("ports/1/hw_counters")),
    };
    all.retain(|(_, value)| *value != 0);
    all.sort();
    all
}

fn kernel(folder: &Path) -> Vec<(String, u64)> {
    let Ok(files) = fs::read_dir(folder) else { return Vec::new() };
    let counter = |file: fs::DirEntry| {
        let value = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
        Some((file.file_name().into_string().ok()?, value))
    };
    files.flatten().filter_map(counter).collect()
}
