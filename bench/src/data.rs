//! The keys and values of a load: a number names a pair, and everything about it follows from the number.
//!
//! ```text
//!   key of 42, 16 bytes    k e y : 0 0 0 0 0 0 0 0 0 0 4 2
//!   value of 42            pool[scatter(42) % 64 Ki ..][.. its length]
//! ```
//!
//! Values are slices of one random pool, so that writing one is a copy and checking one a comparison: a reply that belongs
//! to another key is found out (but for 1 in 65536), at no cost to the load.
//!
//! Invariant: a key's text has at least as many digits as the highest number needs; the command line refuses less.

use crate::distribution::Sizes;
use crate::random::{Random, reduce, scatter};

const PREFIX: &[u8] = b"key:";
/// The longest number that a key holds.
const MAX_DIGITS: u32 = 16;
/// Where values may start in the pool.
const STARTS: u64 = 1 << 16;

/// Texts of keys.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    sizes: Sizes,
}

impl Keys {
    /// Refuses sizes too short to tell `count` keys apart.
    pub(crate) fn new(sizes: Sizes, count: u64) -> Result<Keys, String> {
        let digits = count.max(2).ilog10() + 1;
        if digits > MAX_DIGITS {
            return Err(format!("{count} keys are more than a load can name"));
        }
        if sizes.smallest() < digits {
            return Err(format!("keys of {} bytes cannot tell {count} keys apart", sizes.smallest()));
        }
        if sizes.largest() > 65_535 {
            return Err("keys are at most 65535 bytes long".into());
        }
        Ok(Keys { sizes })
    }

    #[inline]
    pub(crate) fn len(&self, key: u64) -> usize {
        self.sizes.of(key) as usize
    }

    /// The length of all keys, if they share one.
    pub(crate) fn fixed_len(&self) -> Option<usize> {
        match self.sizes {
            Sizes::Fixed(size) => Some(size as usize),
            _ => None,
        }
    }

    /// Writes the key into `text`, whose length is the key's.
    #[inline]
    pub(crate) fn write(&self, key: u64, text: &mut [u8]) {
        if text.len() == 16 {
            // The common length: no loop, no division by a variable.
            text[..4].copy_from_slice(PREFIX);
            let low = eight_digits((key % 100_000_000) as u32).to_le_bytes();
            let high = eight_digits((key / 100_000_000 % 10_000) as u32).to_le_bytes();
            text[4..8].copy_from_slice(&high[4..]);
            text[8..].copy_from_slice(&low);
            return;
        }
        text.fill(b'0');
        if text.len() >= PREFIX.len() + MAX_DIGITS as usize {
            text[..PREFIX.len()].copy_from_slice(PREFIX);
        }
        let low = eight_digits((key % 100_000_000) as u32).to_le_bytes();
        let high = eight_digits((key / 100_000_000) as u32).to_le_bytes();
        let mut digits = [0; 16];
        digits[..8].copy_from_slice(&high);
        digits[8..].copy_from_slice(&low);
        let shown = text.len().min(16);
        let at = text.len() - shown;
        text[at..].copy_from_slice(&digits[16 - shown..]);
    }
}

/// Eight decimal digits of a number below 10^8 as bytes of text, the first in the lowest byte; all eight at once, by
/// splitting into halves, pairs and digits with multiplications.
#[inline]
fn eight_digits(number: u32) -> u64 {
    debug_assert!(number < 100_000_000);
    let halves = u64::from(number / 10_000) | u64::from(number % 10_000) << 32;
    let hundreds = ((halves * 10_486) >> 20) & 0x0000_007f_0000_007f;
    let pairs = hundreds | (halves - 100 * hundreds) << 16;
    let tens = ((pairs * 103) >> 10) & 0x000f_000f_000f_000f;
    let digits = tens | (pairs - 10 * tens) << 8;
    digits | 0x3030_3030_3030_3030
}

/// Bytes of values.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    sizes: Sizes,
    pool: Box<[u8]>,
}

impl Values {
    pub(crate) fn new(sizes: Sizes) -> Values {
        let mut random = Random::new(0x0067_7269_646b_7600, 0);
        let pool = (0..STARTS + u64::from(sizes.largest())).map(|_| b'!' + random.below(94) as u8).collect();
        Values { sizes, pool }
    }

    /// The value that belongs to a key.
    #[inline]
    pub(crate) fn of(&self, key: u64) -> &[u8] {
        let start = reduce(scatter(key), STARTS) as usize;
        &self.pool[start..start + self.sizes.of(key) as usize]
    }

    /// The length of all values, if they share one.
    pub(crate) fn fixed_len(&self) -> Option<usize> {
        match self.sizes {
            Sizes::Fixed(size) => Some(size as usize),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(sizes: &str, key: u64) -> String {
        let keys = Keys::new(sizes.parse().unwrap(), key + 1).unwrap();
        let mut text = vec![0; keys.len(key)];
        keys.write(key, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn keys_are_their_number_in_digits() {
        assert_eq!(text("16", 42), "key:000000000042");
        assert_eq!(text("16", 123_456_789_012), "key:123456789012");
        assert_eq!(text("8", 1234), "00001234");
        assert_eq!(text("20", 987_654_321), "key:0000000987654321");
        assert_eq!(text("17", 9_876_543_210), "00000009876543210");
        assert_eq!(text("24", 1), "key:00000000000000000001");
        for key in [0, 9, 10, 99, 100, 9_999, 10_000, 99_999_999, 100_000_000] {
            assert_eq!(text("16", key), format!("key:{key:012}"));
        }
        let mut random = Random::new(9, 9);
        for _ in 0..100_000 {
            let number = random.below(100_000_000) as u32;
            assert_eq!(eight_digits(number).to_le_bytes()[..], *format!("{number:08}").as_bytes());
        }
    }

    #[test]
    fn keys_too_short_to_differ_are_refused() {
        assert!(Keys::new(Sizes::Fixed(5), 100_000).is_err());
        assert!(Keys::new(Sizes::Fixed(5), 99_999).is_ok());
        assert!(Keys::new(Sizes::Fixed(70_000), 1).is_err());
    }

    #[test]
    fn values_belong_to_their_key() {
        let values = Values::new("10-200".parse().unwrap());
        assert_eq!(values.of(7), values.of(7));
        let alike = (1..1000).filter(|&key| values.of(key)[..10] == values.of(key + 1)[..10]).count();
        assert_eq!(alike, 0);
    }
}
