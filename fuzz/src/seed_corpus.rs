//! Writes the first inputs of the fuzz targets: the captured packets of `rdma-soft/tests/vectors`.
//!
//! usage: `seed_corpus VECTORS CORPUS`

use std::path::Path;
use std::{env, fs, io};

/// Ethernet, IPv4 and UDP headers in front of the transport packet.
const BEFORE: usize = 14 + 20 + 8;

fn main() -> io::Result<()> {
    let mut arguments = env::args_os().skip(1);
    let (Some(vectors), Some(corpus)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other("usage: seed_corpus VECTORS CORPUS"));
    };
    let mut count = 0;
    for entry in fs::read_dir(vectors)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "pcap") {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // A few of each kind per capture; more would only be more of the same.
        let mut seen = [0; 256];
        for (number, packet) in packets(&fs::read(&path)?).into_iter().enumerate() {
            let Some(opcode) = packet.first() else { continue };
            let times = &mut seen[usize::from(*opcode)];
            *times += 1;
            if *times > 2 {
                continue;
            }
            write(&corpus, "packet", &name, number, &[&[0x81, 0], packet].concat())?;
            // As a command of a sequence: post, inject, step; long payloads are cut.
            let head = &packet[..packet.len().min(96)];
            let len = u8::try_from(head.len()).unwrap_or(u8::MAX);
            let commands = [&[0, 1, 3, 8, 2, 7, 0, 12, len], head, &[10, 4, 11, 0]].concat();
            write(&corpus, "sequence", &name, number, &commands)?;
            count += 1;
        }
    }
    println!("{count} packets of the captures in the corpus of each target");
    Ok(())
}

fn packets(pcap: &[u8]) -> Vec<&[u8]> {
    let mut packets = Vec::new();
    let mut rest = pcap.get(24..).unwrap_or_default();
    while let Some((header, after)) = rest.split_first_chunk::<16>() {
        let len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let Some((frame, next)) = after.split_at_checked(len) else { break };
        // The IP header says how long the packet is; short Ethernet frames are padded.
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        packets.extend(frame.get(BEFORE..14 + total));
        rest = next;
    }
    packets
}

fn write(corpus: impl AsRef<Path>, target: &str, name: &str, number: usize, bytes: &[u8]) -> io::Result<()> {
    let folder = corpus.as_ref().join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(format!("{name}-{number}")), bytes)
}
