"""Checks the ICRC of every RoCEv2 packet in classic pcap files, by Python's own CRC-32 (IBTA annex A17.3.3).

usage: check-icrc.py FILE...      exit status 1 when a packet's ICRC is wrong, or when there is no packet
"""
import struct, sys, zlib

UDP_PORT = 4791
ETHERNET, RAW = 1, 101


def packets(path):
    data = open(path, "rb").read()
    order = "<" if data[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    link = struct.unpack(order + "I", data[20:24])[0]
    at = 24
    while at + 16 <= len(data):
        length = struct.unpack(order + "I", data[at + 8:at + 12])[0]
        frame = data[at + 16:at + 16 + length]
        at += 16 + length
        yield frame[14:] if link == ETHERNET else frame


def valid(ip):
    """The ICRC covers the packet with the fields that change on the way set to ones, and eight bytes of ones in front."""
    version = ip[0] >> 4
    if version == 4:
        ip = bytearray(ip[:struct.unpack(">H", ip[2:4])[0]])
        header = (ip[0] & 15) * 4
        ip[1] = ip[8] = 0xFF
        ip[10:12] = b"\xff\xff"
    else:
        header = 40
        ip = bytearray(ip[:40 + struct.unpack(">H", ip[4:6])[0]])
        ip[0] |= 0x0F
        ip[1:4] = b"\xff\xff\xff"
        ip[7] = 0xFF
    assert struct.unpack(">H", ip[header + 2:header + 4])[0] == UDP_PORT
    ip[header + 6:header + 8] = b"\xff\xff"
    ip[header + 8 + 4] = 0xFF
    icrc = struct.unpack("<I", ip[-4:])[0]
    return zlib.crc32(b"\xff" * 8 + bytes(ip[:-4])) == icrc


bad = 0
for path in sys.argv[1:]:
    results = [valid(packet) for packet in packets(path)]
    print(f"{path}: {len(results)} packets, {sum(results)} with a valid ICRC")
    bad += not results or not all(results)
sys.exit(bool(bad))
