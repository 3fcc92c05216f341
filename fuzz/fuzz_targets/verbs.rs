//! Programs through the functions of libibverbs: objects made, changed, used and destroyed in any order, with any
//! work requests that C allows.

#![no_main]

#[path = "../../rdma-soft/tests/program/mod.rs"]
mod program;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| program::run(data));
