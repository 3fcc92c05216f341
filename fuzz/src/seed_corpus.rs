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
        let captured = fs::read(&path)?;
        let program: Vec<u8> =
            packets(&captured).iter().take(60).flat_map(|packet| requests_of(packet)).collect();
        write(&corpus, "verbs", &name, 0, &[&program_begin(&captured)[..], &program].concat())?;
        // A few of each kind per capture; more would only be more of the same.
        let mut seen = [0; 256];
        for (number, packet) in packets(&captured).into_iter().enumerate() {
            let Some(opcode) = packet.first() else { continue };
            let times = &mut seen[usize::from(*opcode)];
            *times += 1;
            if *times > 2 {
                continue;
            }
            write(&corpus, "packet", &name, number, &[&[0x81, 0], packet].concat())?;
            write(&corpus, "sequence", &name, number, &sequence_of(packet))?;
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

/// A packet as a command of `sequence`, behind what lets it be taken.
fn sequence_of(packet: &[u8]) -> Vec<u8> {
    // Long payloads are cut.
    let mut head = packet[..packet.len().min(96)].to_vec();
    let len = u8::try_from(head.len()).unwrap_or(u8::MAX);
    let setup = match packet[0] >> 5 {
        1 => 2,
        3 => 3,
        // Two READs or atomics.
        _ => 2 << 2,
    };
    // The operation to post whose response it is; then the PSN is the last that was sent, otherwise the next.
    let begin: &[u8] = match packet[0] & 0x1f {
        13..=16 => &[0, 7, 8, 0, 15, 8, 31],
        17 => &[0, 4, 8, 0, 15, 8, 31],
        18 => &[0, 10, 1, 0, 15, 8, 31],
        opcode => {
            // Address and key are those of the target's region.
            if let (6 | 10 | 11 | 12 | 19 | 20, Some(header)) = (opcode, head.get_mut(12..24)) {
                header.copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x10, 0]);
            }
            &[0x86, 255, 8, 32]
        }
    };
    [&[setup], begin, &[len], &head, &[10, 8, 11, 8]].concat()
}

/// The type of the queue pairs of a captured program, as `rdma-soft/tests/program` reads it, an address handle for
/// datagrams, and room for a few messages.
fn program_begin(captured: &[u8]) -> Vec<u8> {
    let opcode = packets(captured).first().and_then(|packet| packet.first()).copied().unwrap_or(0);
    // Reliable connection, unreliable connection, datagram; path MTU 1024, and READs allowed.
    let qp_type = match opcode >> 5 {
        1 => 1,
        3 => 2,
        _ => 0,
    };
    let mut program = vec![qp_type | 0x28, 25, 0, 1, 0x0d];
    for _ in 0..4 {
        program.extend(RECEIVE);
    }
    program
}

/// A receive of 7000 bytes on the second pair: command, pair, elements, region, place, length.
const RECEIVE: [u8; 6] = [7, 1, 0, 1, 0, 14];

/// The commands that make a packet like this one leave the first pair, and take what comes of it.
fn requests_of(packet: &[u8]) -> Vec<u8> {
    /// Places of the lengths in the table that the commands choose from.
    const LENGTHS: [usize; 16] =
        [8, 0, 1, 7, 8, 64, 255, 256, 1000, 1024, 1025, 2048, 4096, 4097, 7000, 8193];
    // SEND, WRITE and READ requests that begin a message, and atomics: place of the operation, bytes of its headers.
    let (operation, headers) = match packet.first().map(|opcode| opcode & 0x1f) {
        Some(0 | 4) => (0, 12),
        Some(5) => (3, 16),
        Some(6 | 10) => (1, 28),
        Some(11) => (4, 32),
        Some(12) => (2, 28),
        Some(19) => (5, 40),
        Some(20) => (6, 40),
        _ => return Vec::new(),
    };
    // What RETH says, where there is one.
    let told = packet
        .get(24..28)
        .filter(|_| headers == 28)
        .map_or(packet.len().saturating_sub(headers + 4), |len| {
            u32::from_be_bytes([len[0], len[1], len[2], len[3]]) as usize
        });
    let length = LENGTHS.iter().rposition(|len| *len <= told.max(8)).unwrap_or(0) as u8;
    // Post: pair, one request, operation, flags, elements, then region, place and length, and the same of the peer.
    let post = [0, 0, 0, operation, 0, 0, 0, 0, length, 1, 0, 0];
    // The operand of an atomic; address handle and peer of a datagram.
    let more: &[u8] = match packet[0] >> 5 {
        3 => &[0, 1],
        _ if operation > 4 => &[5, 0, 0, 0],
        _ => &[],
    };
    let polls = [11, 0, 16, 3];
    [&post[..], more, &RECEIVE, &polls].concat()
}

fn write(corpus: impl AsRef<Path>, target: &str, name: &str, number: usize, bytes: &[u8]) -> io::Result<()> {
    let folder = corpus.as_ref().join(target);
    fs::create_dir_all(&folder)?;
    fs::write(folder.join(format!("{name}-{number}")), bytes)
}
