//! What the built-in device cannot do is said in words: which address, which variable, which limit.

#![cfg(feature = "soft")]
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

use std::net::UdpSocket;
use std::process::Command;

use rdma_core::{Context, Device, Error, Provider};

/// Set in processes that are to open the device and say how that went.
const OPENS: &str = "RDMA_CORE_TEST_OPENS";

fn open() -> Result<Context, Error> {
    Device::list().unwrap().into_iter().find(|device| device.provider() == Provider::Soft).unwrap().open()
}

#[test]
fn opens() {
    if std::env::var_os(OPENS).is_some() {
        println!("<{}>", open().map_or_else(|error| error.to_string(), |_| "opened".to_owned()));
    }
}

/// How opening ends in a process of its own, as the device reads its variables once.
fn opened_with(variable: &str, value: &str) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "opens", "--nocapture"]).env(OPENS, "1").env(variable, value);
    let out = String::from_utf8(child.output().unwrap().stdout).unwrap();
    let (_, from) = out.split_once('<').unwrap();
    from.split_once('>').unwrap().0.to_owned()
}

#[test]
fn an_address_in_use_is_named() {
    let _holder = UdpSocket::bind("127.0.91.1:4791").unwrap();
    let text = opened_with("RDMA_SOFT_ADDR", "127.0.91.1");
    assert!(text.contains("127.0.91.1: UDP port 4791") && text.contains("set RDMA_SOFT_ADDR"), "{text}");
    assert_eq!(opened_with("RDMA_SOFT_ADDR", "127.0.91.2"), "opened");
}

#[test]
fn a_setting_that_makes_no_sense_is_named() {
    for (variable, value) in [("RDMA_SOFT_ADDR", "nosuch0"), ("RDMA_SOFT_FAULT", "loss=2")] {
        let text = opened_with(variable, value);
        assert!(text.contains(&format!("{variable}={value}: ")), "{text}");
    }
}

#[test]
fn arguments_out_of_range_are_explained() {
    let context = open().unwrap();
    let pd = context.protection_domain().unwrap();
    let srq = pd.shared_receive_queue(4, 1).unwrap();
    for (error, words) in [
        (pd.shared_receive_queue(0, 1).map(drop), "the depth is 0"),
        (pd.shared_receive_queue(4, u32::MAX).map(drop), "max_srq_sge"),
        (srq.arm_limit(5), "the limit is above the queue's depth"),
        (context.port(9).map(drop), "no such port"),
        (context.gid(1, 999).map(drop), "its table is shorter than the index"),
        (context.pkey(1, 999).map(drop), "its table is shorter than the index"),
    ] {
        let text = error.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
}
