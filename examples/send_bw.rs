//! Bandwidth of SEND into receives that a server keeps posted.
//!
//! ```sh
//! cargo run --release --example send_bw             # two processes on this machine
//! cargo run --release --example send_bw -- --all    # message sizes from 2 bytes to 8 MiB
//! ```

use rdma_workbench::bandwidth::{self, Verb};

fn main() -> std::process::ExitCode {
    bandwidth::main("send_bw", Verb::Send)
}
