//! Message contents that a receiver can check: every byte depends on the message's number and
//! on its own place.

/// Fills `buffer` with the contents of message number `sequence`.
pub fn fill(buffer: &mut [u8], sequence: u64) {
    let mut word = seed(sequence);
    let mut chunks = buffer.chunks_exact_mut(8);
    for chunk in &mut chunks {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = next(word);
    }
    let rest = chunks.into_remainder();
    let bytes = word.to_le_bytes();
    for (to, from) in rest.iter_mut().zip(bytes) {
        *to = from;
    }
}

/// Checks that `buffer` holds the contents of message number `sequence`.
///
/// # Errors
///
/// The first byte that differs.
pub fn check(buffer: &[u8], sequence: u64) -> Result<(), Mismatch> {
    let mut word = seed(sequence);
    let (words, rest) = buffer.as_chunks::<8>();
    for (index, chunk) in words.iter().enumerate() {
        if u64::from_le_bytes(*chunk) != word {
            return Err(mismatch(sequence, index * 8, chunk, word));
        }
        word = next(word);
    }
    if *rest != word.to_le_bytes()[..rest.len()] {
        return Err(mismatch(sequence, words.len() * 8, rest, word));
    }
    Ok(())
}

#[cold]
fn mismatch(sequence: u64, offset: usize, found: &[u8], expected: u64) -> Mismatch {
    let expected = expected.to_le_bytes();
    let within = found.iter().zip(expected).position(|(a, b)| *a != b).unwrap_or(0);
    Mismatch { sequence, offset: offset + within, found: found[within], expected: expected[within] }
}

/// A received message that is not the one that was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("message {sequence}: byte {offset} is {found:#04x}, not {expected:#04x}: the data is wrong")]
pub struct Mismatch {
    /// The message's number.
    pub sequence: u64,
    /// Bytes before the first wrong one.
    pub offset: usize,
    /// What arrived there.
    pub found: u8,
    /// What was sent there.
    pub expected: u8,
}

// Weyl sequence with an odd constant: consecutive words and consecutive messages differ everywhere.
fn seed(sequence: u64) -> u64 {
    (sequence.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn next(word: u64) -> u64 {
    word.rotate_left(23).wrapping_add(0xd1b5_4a32_d192_ed03)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_checks_out_and_anything_else_does_not() {
        for size in [0, 1, 7, 8, 9, 64, 1001] {
            let mut message = vec![0; size];
            fill(&mut message, 7);
            assert_eq!(check(&message, 7), Ok(()));
            if size > 0 {
                assert!(check(&message, 8).is_err(), "another message of {size} bytes");
                let last = size - 1;
                message[last] ^= 0x40;
                assert_eq!(check(&message, 7).unwrap_err().offset, last);
            }
        }
    }
}
