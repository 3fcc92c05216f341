//! Bandwidth of RDMA WRITE into the memory of a server that does nothing.
//!
//! ```sh
//! cargo run --release --example write_bw             # two processes on this machine
//! cargo run --release --example write_bw -- --all    # message sizes from 2 bytes to 8 MiB
//! ```

use rdma_workbench::bandwidth::{self, Verb};

fn main() -> std::process::ExitCode {
    bandwidth::main("write_bw", Verb::Write)
}
