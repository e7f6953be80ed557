//! Quantities as people write and read them: sizes with a suffix, large numbers in groups of three.
//!
//! It stands at the two ends of a run: the command line and the reports.

/// Reads a size in bytes: digits and one of the suffixes K, M, G, T (powers of 1024), or none. Refuses 0.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let (digits, shift) = match trimmed.char_indices().next_back() {
        Some((at, suffix)) if !suffix.is_ascii_digit() => {
            let shift = match suffix.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(format!("'{text}' is not a size; write bytes or 64K, 512M, 2G")),
            };
            (&trimmed[..at], shift)
        }
        Some(_) => (trimmed, 0),
        None => return Err("a size is missing; write bytes or 64K, 512M, 2G".into()),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !plain {
        return Err(format!("'{text}' is not a size; write bytes or 64K, 512M, 2G"));
    }
    let number: u64 = digits.parse().map_err(|_| format!("'{text}' is larger than any machine"))?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err(format!("'{text}' is no memory at all")),
        Some(bytes) => Ok(bytes),
        None => Err(format!("'{text}' is larger than any machine")),
    }
}

/// A size with the largest suffix that divides it.
pub fn size(bytes: u64) -> String {
    for (shift, suffix) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// A number with its digits in groups of three.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Nanoseconds with a unit that leaves up to four digits before the point.
pub fn nanos(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} µs", ns as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in
            [("512M", 512 << 20), ("2G", 2 << 30), ("64k", 65536), ("4096", 4096), ("1T", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        assert_eq!(size(512 << 20), "512M");
        assert_eq!(size(2 << 30), "2G");
        assert_eq!(size(4097), "4097");
        assert_eq!(size(0), "0");
    }

    #[test]
    fn bad_sizes_are_refused_with_a_reason() {
        for (text, word) in [
            ("", "missing"),
            ("0", "no memory"),
            ("0G", "no memory"),
            ("M", "not a size"),
            ("-5M", "not a size"),
            ("1.5G", "not a size"),
            ("5X", "not a size"),
            ("12é", "not a size"),
            ("99999999999999999999", "larger"),
            ("99999999999T", "larger"),
        ] {
            let message = parse_size(text).unwrap_err();
            assert!(message.contains(word), "{text}: {message}");
        }
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1234567), "1,234,567");
        assert_eq!(nanos(999), "999 ns");
        assert_eq!(nanos(25_000_000), "25.0 ms");
    }
}
