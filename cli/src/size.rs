//! Sizes: `512M` and `512MiB` are the same number of bytes, as everywhere with virtual machines.

use parse_size::{ByteSuffix, Config};

/// Parses a size: a number with an optional suffix K, M, G or T, all powers of 1024.
///
/// # Errors
/// It is not one.
pub(crate) fn parse(text: &str) -> Result<u64, &'static str> {
    let config = Config::new().with_binary().with_byte_suffix(ByteSuffix::Allow);
    config.parse_size(text).map_err(|_| "it is not a size such as 4096, 512M or 1G")
}

/// A size for people: at most one digit after the point, and no zero.
// indicatif writes 64.00 MiB, bytesize and humansize 64.0 MiB (humansize for 64 MiB and a little), here it is 64 MiB.
pub(crate) fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 99.95 && value.fract() >= 0.05);
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary() {
        for (text, bytes) in
            [("4096", 4096), ("64M", 64 << 20), ("64MiB", 64 << 20), ("2g", 2 << 30)]
        {
            assert_eq!(parse(text).unwrap(), bytes);
        }
        for bad in ["", "M", "-1", "1X", "99999999999T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1000, "1000 B"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            (16 << 30, "16 GiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
