//! Bandwidth of RDMA READ of the memory of a server that does nothing.
//!
//! ```sh
//! cargo run --release --example read_bw             # two processes on this machine
//! cargo run --release --example read_bw -- --all    # message sizes from 2 bytes to 8 MiB
//! ```

use rdma_workbench::bandwidth::{self, Verb};

fn main() -> std::process::ExitCode {
    bandwidth::main("read_bw", Verb::Read)
}
