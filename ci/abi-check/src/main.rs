//! Compares the sizes, offsets, constants and signatures of verbs-sys with what a C compiler reads
//! in the system's headers, and these with what the crate rdma-sys makes of them.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::{Command, ExitCode};
use std::{env, fs};

type Facts = BTreeMap<&'static str, i128>;

fn length<T, F>(_: fn(&T) -> &F) -> i128 {
    size_of::<F>() as i128
}

#[allow(clippy::all, unused_unsafe, reason = "generated questions")]
mod ours {
    use core::mem::offset_of;
    use verbs_sys::*;

    pub fn facts() -> crate::Facts {
        use crate::length;
        let mut facts = crate::Facts::new();
        include!(concat!(env!("OUT_DIR"), "/ours.rs"));
        facts
    }
}

#[allow(clippy::all, unused_unsafe, reason = "generated questions")]
mod theirs {
    use core::mem::offset_of;
    use rdma_sys::*;

    pub fn facts() -> crate::Facts {
        use crate::length;
        let mut facts = crate::Facts::new();
        include!(concat!(env!("OUT_DIR"), "/theirs.rs"));
        facts
    }
}

/// Compiles the C program and gives what it prints.
fn measured() -> Result<BTreeMap<String, i128>, Box<dyn Error>> {
    let source = concat!(env!("OUT_DIR"), "/facts.c");
    let program = env::temp_dir().join(format!("abi-check-{}", std::process::id()));
    let compiler = env::var("CC").unwrap_or("cc".into());
    let built = Command::new(&compiler).args(["-std=gnu11", "-w", source, "-o"]).arg(&program).status()?;
    if !built.success() {
        return Err(format!("{compiler} failed on {source}").into());
    }
    let output = Command::new(&program).output();
    fs::remove_file(&program)?;
    let text = String::from_utf8(output?.stdout)?;
    let fact = |line: &str| -> Option<(String, i128)> {
        let (key, value) = line.rsplit_once(' ')?;
        Some((key.into(), value.parse().ok()?))
    };
    text.lines().map(|line| fact(line).ok_or(format!("not understood: {line}").into())).collect()
}

/// Prints each fact that differs from the headers.
fn compare(name: &str, facts: &Facts, measured: &BTreeMap<String, i128>) -> (usize, usize) {
    let mut failed = 0;
    for (&key, value) in facts {
        if measured.get(key) != Some(value) {
            println!("FAILED {name}: {key} is {value}, in the headers {:?}", measured.get(key));
            failed += 1;
        }
    }
    println!("{name}: {} facts compared, {failed} differ", facts.len());
    (facts.len() - failed, failed)
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let measured = measured()?;
    let ours = ours::facts();
    let mut results =
        vec![compare("verbs-sys", &ours, &measured), compare("rdma-sys", &theirs::facts(), &measured)];

    let signatures: Vec<_> = measured.iter().filter(|(key, _)| key.starts_with("signature ")).collect();
    let wrong: Vec<_> = signatures.iter().filter(|&&(_, &compatible)| compatible != 1).collect();
    for (key, _) in &wrong {
        println!("FAILED verbs-sys: {key} is not the header's");
    }
    println!("verbs-sys: {} signatures compared, {} differ", signatures.len(), wrong.len());
    results.push((signatures.len() - wrong.len(), wrong.len()));

    let unasked = measured.len() - signatures.len() - ours.len();
    assert_eq!(unasked, 0, "the C program and the Rust one answer the same questions");
    let (passed, failed) = results.iter().fold((0, 0), |sum, r| (sum.0 + r.0, sum.1 + r.1));
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
