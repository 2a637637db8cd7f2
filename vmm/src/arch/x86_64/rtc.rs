//! The real-time clock of a PC (MC146818): the host's time of day, UTC, for guests that read it.
//!
//! Only the time can be read. There are no alarms and no periodic interrupts, and setting the time has no effect.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The port that selects a register; the top bit masks NMIs.
pub(super) const INDEX_PORT: u16 = 0x70;
/// The port that reads and writes it.
pub(super) const DATA_PORT: u16 = 0x71;

/// 24 hours, BCD. Linux expects this form without regard to this register.
const STATUS_B_24_HOURS: u8 = 1 << 1;
/// The battery is good.
const STATUS_D_VALID: u8 = 1 << 7;

/// The real-time clock: what software can change of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RtcState {
    /// The selected register.
    pub index: u8,
}

/// The real-time clock.
#[derive(Default)]
pub(super) struct Rtc(RtcState);

impl Rtc {
    pub(super) fn restore(state: &RtcState) -> Rtc {
        Rtc(state.clone())
    }

    pub(super) fn state(&self) -> RtcState {
        self.0.clone()
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        if port == INDEX_PORT {
            self.0.index = value & 0x7f;
        }
    }

    pub(super) fn read(&self, port: u16) -> u8 {
        if port == INDEX_PORT {
            return self.0.index;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        register(self.0.index, now)
    }
}

/// Value of a register at a time in seconds since 1970.
fn register(index: u8, unix_seconds: u64) -> u8 {
    let seconds = unix_seconds % 86_400;
    let date = civil(unix_seconds / 86_400);
    let value = match index {
        0x00 => seconds % 60,
        0x02 => seconds / 60 % 60,
        0x04 => seconds / 3600,
        // 1 is Sunday; 1970 began on a Thursday.
        0x06 => (unix_seconds / 86_400 + 4) % 7 + 1,
        0x07 => date.day,
        0x08 => date.month,
        0x09 => date.year % 100,
        0x32 => date.year / 100,
        0x0b => return STATUS_B_24_HOURS,
        0x0d => return STATUS_D_VALID,
        _ => return 0,
    };
    // Each value is below 100, until the year 10000.
    ((value / 10 % 10) << 4 | (value % 10)) as u8
}

#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

/// The date of a day counted from 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms", civil_from_days): years begin in March there, so that the leap day is the last.
fn civil(days: u64) -> Date {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    Date { year, month, day }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_around_leap_days() {
        let date = |year, month, day| Date { year, month, day };
        assert_eq!(civil(0), date(1970, 1, 1));
        assert_eq!(civil(11_016), date(2000, 2, 29));
        assert_eq!(civil(11_017), date(2000, 3, 1));
        assert_eq!(civil(20_819), date(2027, 1, 1));
    }

    #[test]
    fn registers_are_bcd() {
        // 2026-11-24 01:23:45 UTC, a Tuesday.
        let now = 1_795_483_425;
        let read = |index| register(index, now);
        assert_eq!([read(0x32), read(9), read(8), read(7)], [0x20, 0x26, 0x11, 0x24]);
        assert_eq!([read(4), read(2), read(0), read(6)], [0x01, 0x23, 0x45, 3]);
        // An update is never in progress.
        assert_eq!(read(0x0a), 0);
    }
}
