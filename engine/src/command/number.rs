//! Numbers as Redis reads and prints them.
//!
//! Integers are strict: what is read is exactly what would be printed, so `+1`, `01`, `-0` and ` 1` are none.
//!
//! Floating-point numbers ([`Float`]) are decimal fractions wherever they fit, [`PLACES`] digits behind the point, so that
//! `10.5 + 0.1` is `10.6` and `0.1 + 0.2` is `0.3`. Redis computes in 80-bit binary and prints 17 digits behind the
//! point, which gives the same for all but the last of very many digits. Beyond ±1.7e19 a number is an `f64`.

use std::fmt;

/// The integer that `text` is.
#[inline]
pub fn parse_i64(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {}
        _ => return None,
    }
    let mut value = 0u64;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        // Nineteen digits fit.
        value = value * 10 + u64::from(digit - b'0');
    }
    if negative { 0i64.checked_sub_unsigned(value) } else { i64::try_from(value).ok() }
}

/// Digits behind the point that are computed with.
pub const PLACES: u32 = 19;
/// Digits behind the point that are printed.
const PRINTED_PLACES: u32 = 17;
/// Longest text that is read as a floating-point number.
const MAX_LEN: usize = 5 * 1024;

/// A floating-point number of INCRBYFLOAT.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Float {
    /// In units of 10^-[`PLACES`].
    Decimal(i128),
    /// Too large for that; may be infinite.
    Binary(f64),
}

impl Float {
    /// Zero.
    pub const ZERO: Float = Float::Decimal(0);

    /// The number that `text` is: decimal, with a fraction or an exponent if need be, or infinite. Not a number is none.
    pub fn parse(text: &[u8]) -> Option<Float> {
        if text.len() >= MAX_LEN {
            return None;
        }
        let binary: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
        let has_digits = text.iter().any(u8::is_ascii_digit);
        if binary.is_nan() || (binary.is_infinite() && has_digits) {
            return None;
        }
        let decimal = if has_digits { decimal(text) } else { None };
        Some(decimal.map_or(Float::Binary(binary), Float::Decimal))
    }

    /// The sum; `None` when it is not finite.
    pub fn plus(self, other: Float) -> Option<Float> {
        if let (Float::Decimal(a), Float::Decimal(b)) = (self, other)
            && let Some(sum) = a.checked_add(b)
        {
            return Some(Float::Decimal(sum));
        }
        let sum = self.to_f64() + other.to_f64();
        sum.is_finite().then_some(Float::Binary(sum))
    }

    fn to_f64(self) -> f64 {
        match self {
            Float::Decimal(units) => units as f64 / 1e19,
            Float::Binary(value) => value,
        }
    }
}

/// Without exponent, without zeros at the end, at most 17 digits behind the point; never `-0`.
impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Float::Decimal(units) = *self else {
            // So large that there is nothing behind the point.
            return write!(f, "{}", self.to_f64());
        };
        let printed = round_div(units, 10i128.pow(PLACES - PRINTED_PLACES));
        let one = 10u128.pow(PRINTED_PLACES);
        let (whole, fraction) = (printed.unsigned_abs() / one, printed.unsigned_abs() % one);
        let sign = if printed < 0 { "-" } else { "" };
        if fraction == 0 {
            return write!(f, "{sign}{whole}");
        }
        let fraction = format!("{fraction:0width$}", width = PRINTED_PLACES as usize);
        write!(f, "{sign}{whole}.{}", fraction.trim_end_matches('0'))
    }
}

/// `text`, a valid decimal number, in units of 10^-[`PLACES`]; `None` when it does not fit.
fn decimal(text: &[u8]) -> Option<i128> {
    let (negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mantissa = text.iter().position(|byte| matches!(byte, b'e' | b'E')).unwrap_or(text.len());
    let mut shift = i64::from(PLACES);
    if let Some(exponent) = text.get(mantissa + 1..) {
        shift += std::str::from_utf8(exponent).ok()?.parse::<i32>().map(i64::from).ok()?;
    }
    let (mut value, mut behind_point) = (0i128, false);
    for &byte in &text[..mantissa] {
        if byte == b'.' {
            behind_point = true;
            continue;
        }
        value = value.checked_mul(10)?.checked_add(i128::from(byte - b'0'))?;
        shift -= i64::from(behind_point);
    }
    if value != 0 {
        let power = 10i128.checked_pow(u32::try_from(shift.unsigned_abs()).ok()?);
        value = match (shift >= 0, power) {
            (true, Some(power)) => value.checked_mul(power)?,
            (true, None) => return None,
            (false, Some(power)) => round_div(value, power),
            (false, None) => 0,
        };
    }
    Some(if negative { -value } else { value })
}

/// Quotient rounded to the nearest, halves to the even one: so a number and its printed form differ by what prints as 0.
fn round_div(value: i128, by: i128) -> i128 {
    let (quotient, rest) = (value / by, value % by);
    let half = (rest.unsigned_abs() * 2).cmp(&by.unsigned_abs());
    if half.is_gt() || (half.is_eq() && quotient % 2 != 0) { quotient + value.signum() } else { quotient }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn integers_are_strict() {
        for text in
            ["", "-", "+1", "-0", "00", "01", " 1", "1 ", "1.0", "0x1", "9223372036854775808", "-9223372036854775809"]
        {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_i64(b"99999999999999999999999"), None);
    }

    fn sum(a: &str, b: &str) -> Option<String> {
        Some(Float::parse(a.as_bytes())?.plus(Float::parse(b.as_bytes())?)?.to_string())
    }

    #[test]
    fn floats_add_up_as_people_expect() {
        for (a, b, c) in [
            ("10.5", "0.1", "10.6"),
            ("0.1", "0.2", "0.3"),
            ("5.0e3", "2.0e2", "5200"),
            ("1", "-1.1", "-0.1"),
            ("3", "0", "3"),
            ("-0.0", "-0", "0"),
            ("+1.", ".5", "1.5"),
            ("1e-30", "0", "0"),
            ("17179869184", "17179869184", "34359738368"),
            ("1e20", "1", "100000000000000000000"),
            ("0.00000000000000001", "0", "0.00000000000000001"),
            ("0.02439024390243902", "-0.024390243902439025", "0"),
            ("1.000000000000000000000000000000000000000000000000000001", "1", "2"),
        ] {
            assert_eq!(sum(a, b).as_deref(), Some(c), "{a} + {b}");
        }
    }

    #[test]
    fn what_is_no_finite_number_is_refused() {
        for text in ["", ".", "abc", " 1", "1 ", "nan", "1e", "1..2", "1e400", "\0"] {
            assert_eq!(Float::parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(sum("1", "inf"), None);
        assert_eq!(sum("1e308", "1e308"), None);
    }

    proptest! {
        #[test]
        fn integers_come_back(value in any::<i64>()) {
            prop_assert_eq!(parse_i64(value.to_string().as_bytes()), Some(value));
        }

        /// What was printed is read as what was printed, and taking the number away leaves nothing.
        #[test]
        fn floats_come_back(value in -1e6..1e6f64) {
            let once = sum(&value.to_string(), "0").unwrap();
            prop_assert_eq!(sum(&once, "0"), Some(once.clone()));
            prop_assert_eq!(sum(&once, &(-value).to_string()), Some("0".to_owned()));
        }
    }
}
