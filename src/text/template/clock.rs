//! `strftime_now`: some templates put today's date into the system prompt.

use std::ffi::CString;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

/// The conversions that templates use.
const KNOWN: &str = "YymdBbAaHMS%";

/// Counts seconds since 1970, UTC; `SOURCE_DATE_EPOCH` sets it, for runs that must be repeatable on another day.
pub(crate) fn now() -> u64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    fixed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Writes a time, in UTC and in English, as `strftime` does. Fails at a conversion that is not [`KNOWN`].
pub(crate) fn format(now: u64, format: &str) -> Result<String, Error> {
    let failed = |what: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {what}"));
    let mut rest = format;
    while let Some((_, after)) = rest.split_once('%') {
        let conversion: String = after.chars().take(1).collect();
        if conversion.is_empty() || !KNOWN.contains(&conversion) {
            return Err(failed(format!("unknown conversion %{conversion}")));
        }
        rest = &after[1..];
    }
    let text = CString::new(format).map_err(|error| failed(error.to_string()))?;
    let mut out = vec![0u8; 16 * (format.len() + 1)];
    // SAFETY: the calls read a time and a text that ends in zero, and write one `tm`, for which zeros are valid, and at most
    // `out.len()` bytes. No conversion is longer than 32 of them; the locale is C's, since nobody sets another.
    let length = unsafe {
        let (now, mut parts) = (now as libc::time_t, std::mem::zeroed());
        libc::gmtime_r(&now, &mut parts);
        libc::strftime(out.as_mut_ptr().cast(), out.len(), text.as_ptr(), &parts)
    };
    out.truncate(length);
    String::from_utf8(out).map_err(|error| failed(error.to_string()))
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
