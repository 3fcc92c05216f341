//! The examples as a new user runs them: both sides on this machine, and wrong arguments.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock};

/// One at a time: each starts processes that poll.
static ONE: Mutex<()> = Mutex::new(());

/// The program of an example. `cargo test` leaves those out that have tests of their own, and `--test` leaves out all: they are
/// built here, which costs nothing where they are.
fn example(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let examples = BUILT.get_or_init(|| {
        // This program is TARGET/PROFILE/deps/NAME, the examples are TARGET/PROFILE/examples/NAME.
        let me = std::env::current_exe().unwrap();
        let profile = me.parent().and_then(|deps| deps.parent()).unwrap();
        let name = profile.file_name().and_then(|name| name.to_str()).unwrap();
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--examples", "--package", env!("CARGO_PKG_NAME")])
            .args(["--profile", if name == "debug" { "dev" } else { name }])
            .arg("--target-dir")
            .arg(profile.parent().unwrap())
            .status()
            .unwrap();
        assert!(status.success(), "the examples do not build");
        profile.join("examples")
    });
    examples.join(name)
}

fn run(name: &str, arguments: &[&str]) -> Output {
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Of coreutils: a program that hangs is a failure, not a test that never ends.
    Command::new("timeout").arg("60").arg(example(name)).args(arguments).output().unwrap()
}

/// Runs an example that must succeed, and looks for words of its output.
fn succeeds(name: &str, arguments: &[&str], words: &[&str]) -> String {
    let output = run(name, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {arguments:?}: {}\n{out}\n{err}", output.status);
    for word in words {
        assert!(
            out.contains(word) || err.contains(word),
            "{name} {arguments:?} does not say {word:?}:\n{out}\n{err}"
        );
    }
    out.into_owned()
}

#[test]
fn ping_pong_reports_latency_and_draws_it() {
    let folder = std::env::temp_dir().join(format!("examples-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("latency.svg");
    let draw = ["--iters", "200", "--histogram", "--plot", file.to_str().unwrap()];
    succeeds(
        "rc_pingpong",
        &draw,
        &["device", "p50", "p99.9", "round trips per second", "#####", "is drawn in"],
    );
    assert!(std::fs::read_to_string(&file).unwrap().contains("microseconds"));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn ping_pong_reports_json() {
    let out = succeeds("rc_pingpong", &["--iters", "200", "--json", "--verb", "write-imm"], &[]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(report["half_rtt_us"]["p50"].as_f64().unwrap() > 0.0, "{out}");
}

#[test]
fn datagrams_of_several_clients_are_answered() {
    let words = ["one queue pair", "client 0: 300 answers", "client 1: 300 answers", "client 2: 300 answers"];
    succeeds("ud_pingpong", &["--iters", "300"], &words);
}

#[test]
fn bandwidth_is_reported_for_every_verb() {
    for name in ["send_bw", "write_bw", "read_bw"] {
        succeeds(name, &["--seconds", "0.05"], &["MB/s", "65536"]);
    }
}

#[test]
fn a_sweep_of_sizes_is_drawn() {
    let file = std::env::temp_dir().join(format!("bandwidth-{}.png", std::process::id()));
    succeeds("read_bw", &["--all", "--seconds", "0.01", "--plot", file.to_str().unwrap()], &["8388608"]);
    assert!(std::fs::read(&file).unwrap().starts_with(b"\x89PNG"));
    std::fs::remove_file(file).unwrap();
}

#[test]
fn no_addition_is_lost() {
    succeeds("atomic_counter", &["-n", "200"], &["counter 800 after 4 clients, expected 800"]);
}

#[test]
fn the_store_is_right_under_concurrent_reads_and_writes() {
    let few_keys = ["-n", "1500", "--keys", "3", "--writes", "40"];
    succeeds("remote_kv", &few_keys, &["every value right", "server: 3 keys", "4 clients"]);
}

#[test]
fn the_server_closes_every_connection() {
    let words = ["the server closed all 64", "0 connections failed; at the end 64 were open, 0 of them cut"];
    succeeds("event_server", &["-n", "5"], &words);
}

#[test]
fn devices_are_listed_and_checked() {
    succeeds("device_info", &[], &["soft0", "by default a program takes"]);
    let out = succeeds("doctor", &["--json", "--device", "soft0"], &[]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["problems"], 0, "{out}");
    succeeds("soft_loopback", &[], &["hello through RoCEv2"]);
}

#[test]
fn a_device_that_cannot_be_opened_is_listed_with_its_error() {
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // An address of nobody's (RFC 5737).
    let output = Command::new(example("device_info")).env("RDMA_SOFT_ADDR", "192.0.2.1").output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("soft0") && out.contains("cannot be used"), "{out}");
    let doctor = Command::new(example("doctor")).env("RDMA_SOFT_ADDR", "192.0.2.1").output().unwrap();
    assert_eq!(doctor.status.code(), Some(1), "{}", String::from_utf8_lossy(&doctor.stdout));
}

#[test]
fn wrong_arguments_are_answered_by_what_is_right() {
    for (name, arguments, right) in [
        ("rc_pingpong", &["--mode", "fast"][..], "[possible values: busy, event, adaptive]"),
        ("rc_pingpong", &["--size", "many"], "give a number between 0 and 8388608"),
        ("rc_pingpong", &["--plot", "latency.pdf"], "must end in .svg or .png"),
        ("rc_pingpong", &["192.0.2.1"], "192.0.2.1:7471"),
        ("write_bw", &["--seconds", "0"], "between 0.01 and 3600"),
        ("write_bw", &["--plot", "b.png"], "--all"),
        ("ud_pingpong", &["--size", "4"], "between 8 and 4096"),
        ("atomic_counter", &["--clients", "0"], "between 1 and 64"),
        ("remote_kv", &["192.0.2.1:1", "--put", "colour"], "colour=blue"),
        ("event_server", &["--connections", "x"], "between 1 and 1024"),
        ("device_info", &["--devices"], "--device"),
        ("doctor", &["--fix"], "--help"),
    ] {
        let output = run(name, arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name} {arguments:?}: {err}");
        assert!(err.contains(right), "{name} {arguments:?} does not say {right:?}: {err}");
    }
    // What only shows when it is tried.
    for (name, arguments, right) in [
        ("rc_pingpong", &["--device", "mlx5_9"][..], "there are: "),
        ("rc_pingpong", &["--device", "soft0", "--gid-index", "200"], "no GID at index 200; there are 0 ("),
        ("rc_pingpong", &["--device", "soft0", "--port", "2"], "its ports are 1 to 1"),
        ("event_server", &["127.0.0.1:1"], "does the same program run there with --listen?"),
    ] {
        let output = run(name, arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name} {arguments:?}: {err}");
        assert!(err.contains(right), "{name} {arguments:?} does not say {right:?}: {err}");
    }
}
