//! Reads the bindings and the table of functions of verbs-sys, and writes the same questions about
//! them in C and in Rust: `facts.c`, `ours.rs` and `theirs.rs` in `OUT_DIR`.
//!
//! An answer is a line `KEY VALUE`, where the key is `size T`, `align T`, `offset T.field`,
//! `length T.field`, `constant NAME` or `signature FUNCTION`.

use std::{env, fs};

#[path = "build/bindings.rs"]
mod bindings;
#[path = "build/signatures.rs"]
mod signatures;

const C_HEAD: &str = "#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
";

fn main() {
    let source = |name: &str| {
        let path = format!("../../verbs-sys/src/{name}");
        println!("cargo:rerun-if-changed={path}");
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let bindings = bindings::Bindings::read(&source("bindings.rs"));
    let signatures = signatures::in_c(&source("table.rs"));
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let write =
        |name: &str, text: String| fs::write(format!("{out}/{name}"), text).expect("a writable OUT_DIR");
    write("facts.c", format!("{C_HEAD}{}{signatures}}}\n", bindings.in_c()));
    write("ours.rs", bindings.in_rust(&bindings::Ours));
    write("theirs.rs", bindings.in_rust(&bindings::RdmaSys));
}
