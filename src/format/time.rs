//! PostgreSQL's text of dates and times -> numbers, by the proleptic Gregorian calendar that
//! PostgreSQL itself uses. The session has ISO dates, `IntervalStyle = postgres`, `TimeZone = UTC`.

/// Microseconds of a day.
pub(super) const DAY: i64 = 86_400_000_000;
/// Microseconds of an average month, 365.25 / 12 days: what Debezium takes for one.
const MONTH: i128 = 2_629_800_000_000;

/// A date and a time of day without its zone.
pub(super) struct Moment<'a> {
    pub(super) year: i64,
    /// `-04-06`, as it stands in the text.
    pub(super) month_day: &'a str,
    pub(super) days: i64,
    /// Microseconds since midnight.
    pub(super) clock: i64,
    /// `+00`, or nothing.
    pub(super) zone: &'a str,
}

/// Days since 1970-01-01 of `2026-04-06` or `0044-03-15 BC`.
pub(super) fn date(text: &str) -> Option<i64> {
    let (text, era) = split_era(text);
    Some(split_date(text, era)?.1)
}

/// `2026-04-06 09:14:22.000123+00`, with ` BC` at its end where it is so.
pub(super) fn moment(text: &str) -> Option<Moment<'_>> {
    let (text, era) = split_era(text);
    let (date, time) = text.split_once(' ')?;
    let (year, days) = split_date(date, era)?;
    let month_day = date.get(date.len().checked_sub(6)?..)?;
    let (clock, zone) = split_zone(time);
    Some(Moment { year, month_day, days, clock: self::clock(clock)?, zone })
}

impl Moment<'_> {
    /// Microseconds since 1970-01-01, as if it were UTC.
    pub(super) fn micros(&self) -> Option<i64> {
        self.days.checked_mul(DAY)?.checked_add(self.clock)
    }
}

fn split_era(text: &str) -> (&str, bool) {
    text.strip_suffix(" BC").map_or((text, false), |text| (text, true))
}

/// The year (0 is 1 BC) and the days since 1970-01-01.
fn split_date(text: &str, before_christ: bool) -> Option<(i64, i64)> {
    let mut parts = text.splitn(3, '-');
    let year = number(parts.next()?)?;
    let month = number(parts.next()?)?;
    let day = number(parts.next()?)?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let year = if before_christ { 1 - year } else { year };
    Some((year, days_of(year, month, day)))
}

/// The count of days by years that begin in March, so that the leap day is the last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = if month > 2 { month - 3 } else { month + 9 };
    let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + leaps + of_year - 719_468
}

/// Digits only; a sign or a blank is none.
fn number(text: &str) -> Option<i64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// Microseconds of `09:14:22.000123`; hours may be beyond a day in an interval.
pub(super) fn clock(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut parts = whole.splitn(3, ':');
    let hours = number(parts.next()?)?;
    let minutes = number(parts.next()?)?;
    let seconds = number(parts.next()?)?;
    let micros = match fraction {
        "" => 0,
        _ if fraction.len() > 6 => return None,
        _ => number(fraction)? * 10_i64.pow(6 - u32::try_from(fraction.len()).ok()?),
    };
    let seconds = hours.checked_mul(3600)?.checked_add(minutes * 60 + seconds)?;
    seconds.checked_mul(1_000_000)?.checked_add(micros)
}

/// `09:14:22+02` at its sign.
pub(super) fn split_zone(text: &str) -> (&str, &str) {
    text.split_at(text.find(['+', '-']).unwrap_or(text.len()))
}

/// Microseconds east of Greenwich of `+02`, `-05:30` or `+00:19:32`.
pub(super) fn offset(text: &str) -> Option<i64> {
    let (sign, text) = match text.split_at_checked(1)? {
        ("+", rest) => (1, rest),
        ("-", rest) => (-1, rest),
        _ => return None,
    };
    let mut seconds = 0;
    for (part, unit) in text.splitn(3, ':').zip([3600, 60, 1]) {
        seconds += number(part)? * unit;
    }
    Some(sign * seconds * 1_000_000)
}

/// Microseconds of `1 year 2 mons -3 days 04:05:06.789`.
pub(super) fn interval(text: &str) -> Option<i64> {
    let mut sum: i128 = 0;
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        if word.contains(':') {
            let negative = word.starts_with('-');
            let micros = i128::from(clock(word.trim_start_matches(['-', '+']))?);
            sum += if negative { -micros } else { micros };
            continue;
        }
        let count: i128 = word.trim_start_matches('+').parse::<i64>().ok()?.into();
        sum += count
            * match words.next()? {
                "year" | "years" => 12 * MONTH,
                "mon" | "mons" => MONTH,
                "day" | "days" => DAY.into(),
                _ => return None,
            };
    }
    i64::try_from(sum).ok()
}
