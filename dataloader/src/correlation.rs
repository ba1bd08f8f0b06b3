//! How two numbers go together, from sums alone.

/// Sums over pairs (x, y).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    n: f64,
    x: f64,
    y: f64,
    xx: f64,
    yy: f64,
    xy: f64,
    /// The first pair is taken off all, so that large offsets do not cost digits.
    origin: (f64, f64),
}

impl Moments {
    /// Adds a pair; one that is not finite is left out.
    pub(crate) fn push(&mut self, x: f64, y: f64) {
        if !(x.is_finite() && y.is_finite()) {
            return;
        }
        if self.n == 0.0 {
            self.origin = (x, y);
        }
        let (x, y) = (x - self.origin.0, y - self.origin.1);
        self.n += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.yy += y * y;
        self.xy += x * y;
    }

    fn variances(&self) -> Option<(f64, f64, f64)> {
        let of = |sum: f64, a: f64, b: f64| sum / self.n - a / self.n * (b / self.n);
        let (xx, yy) = (of(self.xx, self.x, self.x), of(self.yy, self.y, self.y));
        // Below this nothing moves but rounding.
        let moves = |variance: f64| variance > 1e-14;
        (self.n > 2.0 && moves(xx) && moves(yy)).then(|| (xx, yy, of(self.xy, self.x, self.y)))
    }

    /// Returns Pearson's r; nothing where one of the two does not move.
    pub(crate) fn correlation(&self) -> Option<f64> {
        let (xx, yy, xy) = self.variances()?;
        Some(xy / (xx * yy).sqrt())
    }

    /// Returns how many times as large x is as y: its least-squares slope over y.
    pub(crate) fn slope(&self) -> Option<f64> {
        let (_, yy, xy) = self.variances()?;
        Some(xy / yy)
    }

    /// Returns the root mean square of x - y in deviations of x.
    pub(crate) fn distance(&self) -> Option<f64> {
        let (xx, yy, xy) = self.variances()?;
        let offset = (self.x - self.y) / self.n + self.origin.0 - self.origin.1;
        let square = xx + yy - 2.0 * xy + offset * offset;
        Some((square.max(0.0) / xx).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_formulas() {
        let mut moments = Moments::default();
        for (x, y) in [(1001.0, 2.0), (1003.0, 3.0), (1002.0, 2.5), (1006.0, 4.5)] {
            moments.push(x, y);
        }
        moments.push(f64::NAN, 1.0);
        assert!((moments.correlation().expect("moves") - 1.0).abs() < 1e-12);
        assert!((moments.slope().expect("moves") - 2.0).abs() < 1e-12);
        // x - y is 999, 1000, 999.5, 1001.5: mean square 1,000,000.875 over a variance of 3.5.
        let distance = (1_000_000.875_f64 / 3.5).sqrt();
        assert!((moments.distance().expect("moves") - distance).abs() < 1e-9);
        let mut still = Moments::default();
        (0..9).for_each(|i| still.push(f64::from(i), 7.0));
        assert_eq!(still.correlation(), None);
    }
}
