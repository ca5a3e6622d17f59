//! `strftime_now`: some templates put today's date into the system prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: &str = "January February March April May June July August September October November December";
/// 1 January 1970 was a Thursday.
const DAYS: &str = "Thursday Friday Saturday Sunday Monday Tuesday Wednesday";

/// Counts seconds since 1970, UTC; `SOURCE_DATE_EPOCH` sets it, for runs that must be repeatable on another day.
pub(crate) fn now() -> u64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    fixed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Writes a time as `strftime` does, with the conversions that templates use. Fails at any other.
pub(crate) fn format(now: u64, format: &str) -> Result<String, Error> {
    let (days, second) = (now / 86_400, now % 86_400);
    let (year, month, day) = civil(days);
    let month_name = MONTHS.split(' ').nth(month as usize - 1).unwrap_or_default();
    let day_name = DAYS.split(' ').nth(days as usize % 7).unwrap_or_default();
    let two = |number: u64| format!("{number:02}");
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let text = match (c, if c == '%' { chars.next() } else { None }) {
            ('%', Some('Y')) => year.to_string(),
            ('%', Some('y')) => two(year % 100),
            ('%', Some('m')) => two(month),
            ('%', Some('d')) => two(day),
            ('%', Some('B')) => month_name.to_string(),
            ('%', Some('b')) => month_name[..3].to_string(),
            ('%', Some('A')) => day_name.to_string(),
            ('%', Some('a')) => day_name[..3].to_string(),
            ('%', Some('H')) => two(second / 3600),
            ('%', Some('M')) => two(second / 60 % 60),
            ('%', Some('S')) => two(second % 60),
            ('%', Some('%')) => "%".to_string(),
            ('%', other) => {
                let found =
                    format!("strftime_now: unknown conversion %{}", other.map(String::from).unwrap_or_default());
                return Err(Error::new(ErrorKind::InvalidOperation, found));
            }
            (other, _) => other.to_string(),
        };
        out += &text;
    }
    Ok(out)
}

/// Finds (year, month, day) of a day counted from 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468; // days since 1 March of year 0
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // 2024-02-29 23:59:58, a Thursday; 2026-11-21 00:00:00, a Saturday.
        assert_eq!(
            format(1_709_251_198, "%a %A %d %b %B %Y-%m-%y %H:%M:%S%%").unwrap(),
            "Thu Thursday 29 Feb February 2024-02-24 23:59:58%"
        );
        assert_eq!(format(1_795_219_200, "%A %d/%m/%Y").unwrap(), "Saturday 21/11/2026");
        assert_eq!(format(0, "%d %b %Y").unwrap(), "01 Jan 1970");
        assert!(format(0, "%Q").is_err() && format(0, "%").is_err());
    }
}
