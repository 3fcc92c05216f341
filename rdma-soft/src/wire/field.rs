//! Reading and writing big-endian fields of a fixed-size header.
//!
//! Offsets are constants inside a header whose length the type carries, so the bounds are proven where the
//! call is inlined; a wrong constant shows in the first test that touches the field.

pub(super) fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u24_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([0, bytes[at], bytes[at + 1], bytes[at + 2]])
}

pub(super) fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

pub(super) fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

pub(super) fn array_at<const N: usize, const M: usize>(bytes: &[u8; N], at: usize) -> [u8; M] {
    let mut out = [0; M];
    out.copy_from_slice(&bytes[at..at + M]);
    out
}

pub(super) fn put<const N: usize, const M: usize>(bytes: &mut [u8; N], at: usize, value: [u8; M]) {
    bytes[at..at + M].copy_from_slice(&value);
}

/// A byte and the low 24 bits of `value`, as they stand in many headers.
pub(super) fn byte_and_u24(byte: u8, value: u32) -> [u8; 4] {
    (u32::from(byte) << 24 | value & 0xff_ffff).to_be_bytes()
}
