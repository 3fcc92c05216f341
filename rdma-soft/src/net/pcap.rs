//! A capture of everything sent and received: `RDMA_SOFT_PCAP=FILE`.
//!
//! A UDP socket shows neither IP nor UDP header, so they are made up again around each packet as the kernel makes
//! them, and an Ethernet header in front, because that is what every reader of captures understands.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use super::envelope::{Envelope, Ip};
use crate::wire::{ICRC_LEN, Ipv4Repr, Ipv6Repr, UdpRepr};

/// The name of the variable.
pub(crate) const PCAP_VARIABLE: &str = "RDMA_SOFT_PCAP";

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;
const ETHERNET_LEN: usize = 14;
const SNAPLEN: u32 = 65536;

/// An open capture file.
#[derive(Debug)]
pub(crate) struct Capture {
    // A lock on the path of an operation: only in processes that ask for a capture.
    file: Mutex<BufWriter<File>>,
}

impl Capture {
    /// Creates `path`, in which `%p` stands for the process id.
    pub(crate) fn create(path: &str) -> io::Result<Capture> {
        let path = path.replace("%p", &std::process::id().to_string());
        let mut file = BufWriter::new(File::create(path)?);
        let mut header = Vec::with_capacity(24);
        header.extend(MAGIC_NANOSECONDS.to_le_bytes());
        header.extend(2_u16.to_le_bytes());
        header.extend(4_u16.to_le_bytes());
        header.extend([0; 8]);
        header.extend(SNAPLEN.to_le_bytes());
        header.extend(LINKTYPE_ETHERNET.to_le_bytes());
        file.write_all(&header)?;
        file.flush()?;
        Ok(Capture { file: Mutex::new(file) })
    }

    /// Adds a packet: `transport` is BTH to padding, `icrc` as it was on the wire, or `None` to compute it (a packet
    /// that stayed in this process never had one).
    ///
    /// A packet that cannot be written is an error to report once; the traffic goes on without it.
    pub(crate) fn record(
        &self,
        envelope: &Envelope,
        transport: &[u8],
        icrc: Option<[u8; ICRC_LEN]>,
    ) -> io::Result<()> {
        let mut head = [0_u8; ETHERNET_LEN + Ipv6Repr::LEN + UdpRepr::LEN];
        let head_len = write_headers(&mut head, envelope, transport.len() + ICRC_LEN);
        let icrc = icrc.unwrap_or_else(|| envelope.icrc(transport).to_bytes());
        let length = u32::try_from(head_len + transport.len() + ICRC_LEN).map_err(io::Error::other)?;
        // A clock before 1970 is no reason to lose a packet.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut record = [0_u8; 16];
        // The format's seconds are 32 bits wide, until 2106.
        record[0..4].copy_from_slice(&u32::try_from(now.as_secs()).unwrap_or(u32::MAX).to_le_bytes());
        record[4..8].copy_from_slice(&now.subsec_nanos().to_le_bytes());
        record[8..12].copy_from_slice(&length.to_le_bytes());
        record[12..16].copy_from_slice(&length.to_le_bytes());
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(&record)?;
        file.write_all(&head[..head_len])?;
        file.write_all(transport)?;
        file.write_all(&icrc)?;
        // So that the file is whole whenever the process ends, also by a signal.
        file.flush()
    }
}

/// Writes Ethernet, IP and UDP headers around `len` bytes from BTH to ICRC; their length.
fn write_headers(
    head: &mut [u8; ETHERNET_LEN + Ipv6Repr::LEN + UdpRepr::LEN],
    envelope: &Envelope,
    len: usize,
) -> usize {
    let (ip, udp) = envelope.headers(len);
    let after = &mut head[ETHERNET_LEN..];
    let (ethertype, ip_len): (u16, usize) = match ip {
        Ip::V4(ip) => {
            if let Some(out) = after.first_chunk_mut() {
                ip.emit(out);
            }
            (0x0800, Ipv4Repr::LEN)
        }
        Ip::V6(ip) => {
            if let Some(out) = after.first_chunk_mut() {
                ip.emit(out);
            }
            (0x86dd, Ipv6Repr::LEN)
        }
    };
    if let Some(out) = after[ip_len..].first_chunk_mut() {
        udp.emit(out);
    }
    head[12..ETHERNET_LEN].copy_from_slice(&ethertype.to_be_bytes());
    ETHERNET_LEN + ip_len + UdpRepr::LEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Icrc, Ipv4, Ipv6};

    fn recorded(from: &str, to: &str, transport: &[u8]) -> Vec<u8> {
        let path = std::env::temp_dir().join(format!(
            "rdma-soft-capture-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let capture = Capture::create(path.to_str().unwrap()).unwrap();
        let envelope = Envelope {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            traffic_class: 2,
            identification: 5,
        };
        capture.record(&envelope, transport, None).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        bytes
    }

    #[test]
    fn an_ipv4_packet_has_all_its_headers_and_a_valid_icrc() {
        let transport = [0x11; 32];
        let file = recorded("127.0.0.1:4791", "127.0.0.2:4791", &transport);
        let frame = &file[24 + 16..];
        assert_eq!(frame.len(), 14 + 20 + 8 + 32 + 4);
        assert_eq!(file[24 + 8..24 + 12], u32::try_from(frame.len()).unwrap().to_le_bytes());
        let ip = Ipv4Repr::parse(Ipv4::new(&frame[14..]).unwrap()).unwrap();
        assert_eq!((ip.identification, ip.total_len), (5, 64));
        let udp = UdpRepr { src_port: 4791, dst_port: 4791, len: 44, checksum: 0 };
        assert_eq!(frame[frame.len() - 4..], Icrc::ipv4(&ip, &udp, &transport).to_bytes());
    }

    #[test]
    fn an_ipv6_packet_too() {
        let transport = [0x22; 16];
        let file = recorded("[::1]:4791", "[::1]:4791", &transport);
        let frame = &file[24 + 16..];
        assert_eq!(frame.len(), 14 + 40 + 8 + 16 + 4);
        assert_eq!(Ipv6::new(&frame[14..]).unwrap().payload_len(), 28);
        assert_eq!(&frame[14 + 40 + 8..14 + 40 + 8 + 16], transport);
    }
}
