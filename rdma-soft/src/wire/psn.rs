//! Packet sequence numbers.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// A packet sequence number: 24 bits that wrap around.
///
/// Two numbers are compared on the circle: `a` is before `b` when `b` is reached from `a` in fewer than
/// 2^23 steps (clause 9.7.2). That is no total order, so the type has no `Ord`; use
/// [`is_before`](Self::is_before) and [`offset_from`](Self::offset_from).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Psn(u32);

impl Psn {
    /// Number of distinct sequence numbers.
    pub const MODULUS: u32 = 1 << 24;
    /// The longest span in which order is defined, and so the most packets that may be in flight.
    pub const WINDOW: u32 = 1 << 23;
    const MASK: u32 = Self::MODULUS - 1;

    /// The low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & Self::MASK)
    }

    /// The number itself, below 2^24.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// Steps from `base` to `self`, negative when `self` is before `base`: -2^23 to 2^23 - 1.
    #[must_use]
    pub const fn offset_from(self, base: Self) -> i32 {
        // The difference stands in the top 24 bits, so the arithmetic shift extends its sign.
        (self.0.wrapping_sub(base.0) << 8).cast_signed() >> 8
    }

    /// Whether `self` comes before `other` on the circle.
    #[must_use]
    pub const fn is_before(self, other: Self) -> bool {
        self.offset_from(other) < 0
    }

    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::new(self.0 + 1)
    }
}

impl Add<u32> for Psn {
    type Output = Self;

    fn add(self, steps: u32) -> Self {
        Self::new(self.0.wrapping_add(steps))
    }
}

impl AddAssign<u32> for Psn {
    fn add_assign(&mut self, steps: u32) {
        *self = *self + steps;
    }
}

/// Steps forward from `base` to `self`, 0 to 2^24 - 1.
impl Sub for Psn {
    type Output = u32;

    fn sub(self, base: Self) -> u32 {
        Self::new(self.0.wrapping_sub(base.0)).0
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

impl fmt::Display for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_holds_across_the_wrap() {
        let last = Psn::new(0xff_ffff);
        assert_eq!(last.next(), Psn::new(0));
        assert!(last.is_before(Psn::new(0)));
        assert!(!Psn::new(0).is_before(last));
        assert_eq!((last + 3).offset_from(last), 3);
        assert_eq!(last.offset_from(last + 3), -3);
        assert_eq!(Psn::new(2) - last, 3);
    }

    /// RDMA/rxe: Compute PSN windows correctly
    #[test]
    fn window_is_half_of_the_circle() {
        for base in [0, 1, 0x7f_ffff, 0x80_0000, 0xff_ffff].map(Psn::new) {
            assert!(base.is_before(base + (Psn::WINDOW - 1)));
            assert!((base + Psn::WINDOW).is_before(base));
            assert!(!base.is_before(base));
        }
    }
}
