//! Figures with their units, for people, and the words for lengths of time on the command line.

use std::time::Duration;

/// `1.23 M/s`.
pub(crate) fn rate(per_second: f64) -> String {
    format!("{}/s", count(per_second))
}

/// `1.23 M`: three significant digits.
pub(crate) fn count(number: f64) -> String {
    for (unit, size) in [("G", 1e9), ("M", 1e6), ("k", 1e3)] {
        if number >= size * 0.9995 {
            return format!("{} {unit}", digits(number / size));
        }
    }
    if number.fract() == 0.0 { format!("{number:.0}") } else { digits(number) }
}

/// Microseconds as `850 ns`, `41.2 µs`, `3.10 ms` or `1.20 s`.
pub(crate) fn latency(us: f64) -> String {
    match us {
        us if us >= 999_500.0 => format!("{} s", digits(us / 1e6)),
        us if us >= 999.5 => format!("{} ms", digits(us / 1e3)),
        us if us >= 0.9995 => format!("{} µs", digits(us)),
        us => format!("{:.0} ns", us * 1e3),
    }
}

/// `1.50 MiB`.
pub(crate) fn bytes(bytes: f64) -> String {
    for (unit, size) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= size as f64 * 0.9995 {
            return format!("{} {unit}", digits(bytes / size as f64));
        }
    }
    format!("{bytes:.0} B")
}

/// `1.27x`.
pub(crate) fn ratio(ratio: f64) -> String {
    format!("{ratio:.2}x")
}

fn digits(number: f64) -> String {
    match number {
        n if n >= 99.95 => format!("{n:.0}"),
        n if n >= 9.995 => format!("{n:.1}"),
        n => format!("{n:.2}"),
    }
}

/// Reads `10`, `10s`, `500ms`, `2m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().map_err(|_| format!("'{text}' is no length of time"))?;
    let seconds = match unit.trim() {
        "" | "s" => number,
        "ms" => number / 1e3,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(format!("'{unit}' is none of ms, s, m, h")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("'{text}' is too long"))
}

/// Reads `100000`, `100k`, `10M`, `1e6`, `1_000`.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    let clean = text.replace('_', "");
    let (digits, scale) = match clean.char_indices().last() {
        Some((at, 'k' | 'K')) => (&clean[..at], 1e3),
        Some((at, 'm' | 'M')) => (&clean[..at], 1e6),
        Some((at, 'g' | 'G')) => (&clean[..at], 1e9),
        _ => (&clean[..], 1.0),
    };
    let number: f64 = digits.parse().map_err(|_| format!("'{text}' is no number"))?;
    let number = number * scale;
    if !(0.0..1e18).contains(&number) {
        return Err(format!("'{text}' is out of range"));
    }
    Ok(number as u64)
}

/// Reads a number of bytes: `64`, `4k`, `1mb`, `4gb`, `16mib`. Every unit is a power of 1024.
pub(crate) fn bytes_of(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let at = lower.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '_')).unwrap_or(lower.len());
    let (digits, unit) = lower.split_at(at);
    let number: f64 = digits.replace('_', "").parse().map_err(|_| format!("'{text}' is no number of bytes"))?;
    let scale = match unit {
        "" | "b" => 1u64,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        _ => return Err(format!("'{unit}' is none of k, m, g, kb, mb, gb")),
    };
    let bytes = number * scale as f64;
    if bytes < 1e18 { Ok(bytes as u64) } else { Err(format!("'{text}' is out of range")) }
}

/// Reads `0`, `0,2`, `0-3,6`.
pub(crate) fn core_list(text: &str) -> Result<Vec<usize>, String> {
    let number = |t: &str| t.trim().parse::<usize>().map_err(|_| format!("'{t}' is no core number"));
    let mut cores = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from > to || to - from > 4096 {
                    return Err(format!("'{part}' is no range of cores"));
                }
                cores.extend(from..=to);
            }
            None => cores.push(number(part)?),
        }
    }
    Ok(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(rate(1_234_567.0), "1.23 M/s");
        assert_eq!(rate(999_900.0), "1.00 M/s");
        assert_eq!(count(512.0), "512");
        assert_eq!(count(65_432.0), "65.4 k");
        assert_eq!(latency(0.25), "250 ns");
        assert_eq!(latency(41.23), "41.2 µs");
        assert_eq!(latency(3_100.0), "3.10 ms");
        assert_eq!(latency(1.2e6), "1.20 s");
        assert_eq!(bytes(1536.0 * 1024.0), "1.50 MiB");
        assert_eq!(bytes(40.0), "40 B");
        assert_eq!(ratio(1.266), "1.27x");
    }

    #[test]
    fn words_become_figures() {
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("x").is_err() && duration("3d").is_err());
        assert_eq!(number("100k"), Ok(100_000));
        assert_eq!(number("1e6"), Ok(1_000_000));
        assert_eq!(number("10M"), Ok(10_000_000));
        assert_eq!(number("1_000"), Ok(1000));
        assert!(number("-1").is_err() && number("abc").is_err());
        assert_eq!(bytes_of("64"), Ok(64));
        assert_eq!(bytes_of("4gb"), Ok(4 << 30));
        assert_eq!(bytes_of("1.5KiB"), Ok(1536));
        assert!(bytes_of("x").is_err() && bytes_of("1t").is_err() && bytes_of("-1").is_err());
        assert_eq!(core_list("0-2,5"), Ok(vec![0, 1, 2, 5]));
        assert!(core_list("2-1").is_err() && core_list("").is_err());
    }
}
