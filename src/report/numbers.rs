//! Numbers as people read them.

use crate::detect::measure::Interval;

/// What stands for a value that is not known.
pub(crate) const UNKNOWN: &str = "–";

/// Writes `0.1389` as `13.9`.
pub(crate) fn percent(value: Option<f64>) -> String {
    number(value.map(|v| 100.0 * v), 1)
}

/// Writes a rate with its interval: `13.9 [11.8, 16.1]`.
pub(crate) fn percent_ci(value: Option<f64>, ci95: Option<Interval>) -> String {
    match ci95 {
        Some([low, high]) if value.is_some() => {
            format!("{} [{}, {}]", percent(value), percent(Some(low)), percent(Some(high)))
        }
        _ => percent(value),
    }
}

/// Writes `digits` after the point; large and tiny numbers in scientific notation.
pub(crate) fn number(value: Option<f64>, digits: usize) -> String {
    let text = match value {
        None => return UNKNOWN.to_string(),
        Some(v) if v != 0.0 && !(1e-4..1e6).contains(&v.abs()) => format!("{v:.2e}"),
        Some(v) => format!("{v:.digits$}"),
    };
    match text.strip_prefix('-') {
        // What rounds to nothing has no sign.
        Some(zero) if zero.chars().all(|c| c == '0' || c == '.') => zero.to_string(),
        Some(size) => format!("−{size}"),
        None => text,
    }
}

/// Writes `1234567` as `1.23 M`, three digits.
pub(crate) fn count(value: Option<f64>) -> String {
    let Some(value) = value else { return UNKNOWN.to_string() };
    let units = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let Some((unit, name)) = units.iter().find(|(unit, _)| value.abs() >= *unit) else { return format!("{value:.0}") };
    let scaled = value / unit;
    let digits = if scaled.abs() < 9.995 { 2 } else { usize::from(scaled.abs() < 99.95) };
    format!("{scaled:.digits$} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_a_dash_and_never_zero() {
        assert_eq!(percent(None), "–");
        assert_eq!(percent(Some(0.0)), "0.0");
        assert_eq!(percent_ci(None, Some([0.0, 0.1])), "–");
        assert_eq!(percent_ci(Some(0.13889), Some([0.118, 0.161])), "13.9 [11.8, 16.1]");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(number(Some(-0.00001), 3), "−1.00e-5");
        assert_eq!(number(Some(-1.25), 1), "−1.2");
        assert_eq!(number(Some(-0.0004), 3), "0.000");
        assert_eq!(number(Some(f64::NAN), 3), "NaN");
        let shown: Vec<String> = [0.0, 999.0, 1234.0, 99_960.0, 1.5e12].map(|v| count(Some(v))).into();
        assert_eq!(shown, ["0", "999", "1.23 k", "100 k", "1.50 T"]);
    }
}
