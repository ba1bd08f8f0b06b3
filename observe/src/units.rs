//! Durations, counts and sizes as people read them.

use bytesize::ByteSize;

/// Returns a duration in its two largest units: `2h 05m`, `3m 12s`, `4.5s`.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    if days > 0 {
        format!("{days}d {hours:02}h")
    } else if hours > 0 {
        format!("{hours}h {minutes:02}m")
    } else if minutes > 0 {
        format!("{minutes}m {:02}s", whole % 60)
    } else {
        format!("{whole}s")
    }
}

/// Returns a count with its thousands apart: `1,234,567`.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Returns a count with its noun: `1 retry`, `2,000 retries`.
pub fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// Returns a size in binary units: `12.3 MiB`.
pub fn bytes(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Returns a share between 0 and 1 in percent: `12%`.
pub fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

/// Returns hours with enough digits for small runs: `0.013`, `1.25`, `203`.
pub fn hours(hours: f64) -> String {
    if hours < 0.0995 {
        format!("{hours:.3}")
    } else if hours < 99.95 {
        format!("{hours:.2}")
    } else {
        count(hours.round() as u64)
    }
}

/// Returns what an hour of one worker on `device` is called.
pub fn worker_hours(device: &str) -> &'static str {
    if device == "cpu" {
        "worker-hours"
    } else {
        "GPU-hours"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_use_two_units() {
        let cases = [
            (4.46, "4.5s"),
            (9.97, "10s"),
            (59.4, "59s"),
            (59.6, "1m 00s"),
            (192.0, "3m 12s"),
            (7_500.0, "2h 05m"),
            (90_000.0, "1d 01h"),
            (f64::NAN, "unknown"),
        ];
        for (given, expected) in cases {
            assert_eq!(seconds(given), expected);
        }
    }

    #[test]
    fn counts_and_hours_are_readable() {
        assert_eq!(count(7), "7");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1,000");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(counted(1, "retry", "retries"), "1 retry");
        assert_eq!(counted(2000, "retry", "retries"), "2,000 retries");
        assert_eq!(hours(0.0134), "0.013");
        assert_eq!(hours(1.254), "1.25");
        assert_eq!(hours(1203.4), "1,203");
        assert_eq!(percent(0.126), "13%");
        assert_eq!(bytes(12 << 20), "12.0 MiB");
        assert_eq!(worker_hours("cuda"), "GPU-hours");
        assert_eq!(worker_hours("cpu"), "worker-hours");
    }
}
