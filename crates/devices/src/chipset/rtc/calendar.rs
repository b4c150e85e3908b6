//! Seconds since 1970 and the chip's time registers (proleptic Gregorian calendar, years 0 to 9999).

use super::bits::{self, b};

pub const SECONDS_PER_DAY: i64 = 86_400;
/// 0000-01-01 00:00:00.
pub const FIRST_SECOND: i64 = -62_167_219_200;
/// 9999-12-31 23:59:59.
pub const LAST_SECOND: i64 = 253_402_300_799;

/// A date and time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    pub year: i64,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 1 for Sunday.
    pub weekday: u8,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: u8) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to January 1st of `year`.
fn days_to_year(year: i64) -> i64 {
    // Leap days in the years before `year`, counted from year 0, which is one itself.
    let leap_days = |year: i64| (year + 3) / 4 - (year + 99) / 100 + (year + 399) / 400;
    (year - 1970) * 365 + leap_days(year) - leap_days(1970)
}

impl DateTime {
    /// From seconds since 1970; outside the years 0 to 9999 the nearest end.
    pub fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST_SECOND, LAST_SECOND);
        let (days, second_of_day) =
            (seconds.div_euclid(SECONDS_PER_DAY), seconds.rem_euclid(SECONDS_PER_DAY));
        // A first guess that is too early, since no year is longer than 366 days; then walk to the right one.
        let mut year = (days - days_to_year(0)) / 366;
        while days_to_year(year + 1) <= days {
            year += 1 + (days - days_to_year(year + 1)) / 366;
        }
        let mut day = days - days_to_year(year);
        let mut month = 1;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        DateTime {
            year,
            month,
            day: day as u8 + 1,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
            // 1970-01-01 was a Thursday.
            weekday: (days + 4).rem_euclid(7) as u8 + 1,
        }
    }

    /// Seconds since 1970, if there is such a time. The day of the week does not matter.
    pub fn to_seconds(self) -> Option<i64> {
        let valid = (0..10_000).contains(&self.year)
            && (1..=12).contains(&self.month)
            && self.day >= 1
            && i64::from(self.day) <= days_in_month(self.year, self.month)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60;
        let months: i64 = (1..self.month).map(|month| days_in_month(self.year, month)).sum();
        let days = days_to_year(self.year) + months + i64::from(self.day) - 1;
        let second_of_day =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        valid.then_some(days * SECONDS_PER_DAY + second_of_day)
    }
}

/// A number as register B has it encoded.
pub fn encode(mode: u8, value: u8) -> u8 {
    if mode & b::BINARY != 0 { value } else { (value / 10 % 10) << 4 | (value % 10) }
}

/// Reverse of [`encode`]; `None` if a BCD digit is not one.
pub fn decode(mode: u8, value: u8) -> Option<u8> {
    if mode & b::BINARY != 0 {
        return Some(value);
    }
    let (high, low) = (value >> 4, value & 0xf);
    (high < 10 && low < 10).then_some(high * 10 + low)
}

/// Hours as register B has them encoded.
pub fn encode_hour(mode: u8, hour: u8) -> u8 {
    if mode & b::HOURS_24 != 0 {
        return encode(mode, hour);
    }
    let twelve = match hour % 12 {
        0 => 12,
        other => other,
    };
    encode(mode, twelve) | if hour >= 12 { bits::PM } else { 0 }
}

/// Reverse of [`encode_hour`].
pub fn decode_hour(mode: u8, value: u8) -> Option<u8> {
    if mode & b::HOURS_24 != 0 {
        return decode(mode, value).filter(|hour| *hour < 24);
    }
    let twelve = decode(mode, value & !bits::PM).filter(|hour| (1..=12).contains(hour))?;
    Some(twelve % 12 + if value & bits::PM != 0 { 12 } else { 0 })
}

/// An alarm: each part a number or anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlarmTime {
    pub hour: Option<u8>,
    pub minute: Option<u8>,
    pub second: Option<u8>,
}

impl AlarmTime {
    /// Seconds from second `second_of_day` to the next match, 1 to 86 400; `None` if it never comes.
    pub fn seconds_until(self, second_of_day: i64) -> Option<i64> {
        let matching = |part: Option<u8>, limit: i64| match part {
            Some(value) => i64::from(value)..(i64::from(value) + 1).min(limit),
            None => 0..limit,
        };
        let first_hour = second_of_day / 3600;
        for hours in 0..=24 {
            let hour = first_hour + hours;
            if self.hour.is_some_and(|wanted| i64::from(wanted) != hour % 24) {
                continue;
            }
            for minute in matching(self.minute, 60) {
                // The first second of this minute that is both later and wanted.
                let start = hour * 3600 + minute * 60;
                let found =
                    matching(self.second, 60).map(|second| start + second).find(|at| *at > second_of_day);
                if let Some(at) = found {
                    return Some(at - second_of_day).filter(|wait| *wait <= SECONDS_PER_DAY);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_dates() {
        let date = |seconds| {
            let d = DateTime::from_seconds(seconds);
            (d.year, d.month, d.day, d.hour, d.minute, d.second, d.weekday)
        };
        assert_eq!(date(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, 0, 0, 0, 3));
        assert_eq!(date(1_785_456_000), (2026, 7, 31, 0, 0, 0, 6));
        assert_eq!(date(FIRST_SECOND), (0, 1, 1, 0, 0, 0, 7));
        assert_eq!(date(LAST_SECOND), (9999, 12, 31, 23, 59, 59, 6));
        assert_eq!(date(i64::MAX), date(LAST_SECOND));
        assert_eq!(DateTime { day: 29, month: 2, ..DateTime::from_seconds(0) }.to_seconds(), None);
    }

    #[test]
    fn twelve_hour_clock() {
        for (hour, bcd) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            assert_eq!(encode_hour(0, hour), bcd);
            assert_eq!(decode_hour(0, bcd), Some(hour));
        }
        assert_eq!(decode_hour(0, 0x13), None);
        assert_eq!(decode(0, 0x1a), None);
    }

    proptest! {
        #[test]
        fn dates_round_trip(seconds in FIRST_SECOND..=LAST_SECOND) {
            prop_assert_eq!(DateTime::from_seconds(seconds).to_seconds(), Some(seconds));
        }

        #[test]
        fn alarms_match_when_they_say(
            hour in proptest::option::of(0u8..30), minute in proptest::option::of(0u8..70),
            second in proptest::option::of(0u8..70), now in 0i64..SECONDS_PER_DAY,
        ) {
            let alarm = AlarmTime { hour, minute, second };
            let matches = |at: i64| {
                let part = |wanted: Option<u8>, value: i64| wanted.is_none_or(|w| i64::from(w) == value);
                part(hour, at / 3600 % 24) && part(minute, at / 60 % 60) && part(second, at % 60)
            };
            let slow = (1..=SECONDS_PER_DAY).find(|wait| matches(now + wait));
            prop_assert_eq!(alarm.seconds_until(now), slow);
        }
    }
}
