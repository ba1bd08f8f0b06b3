//! The largest of n standard normal numbers, in one draw.

use pollen_core::Draws;

/// Quantiles that are kept.
const QUANTILES: usize = 4096;

/// The distribution of the largest of n standard normal numbers, as its quantiles: F(x)^n = u has
/// the solution x = F^-1(u^(1/n)).
#[derive(Clone, Debug)]
pub(super) struct Slowest {
    quantiles: Vec<f64>,
}

impl Slowest {
    /// Prepares for `count` numbers.
    pub(super) fn of(count: u32) -> Self {
        let power = 1.0 / f64::from(count.max(1));
        let middle = |index: usize| (index as f64 + 0.5) / QUANTILES as f64;
        Self {
            quantiles: (0..QUANTILES)
                .map(|index| normal(middle(index).powf(power)))
                .collect(),
        }
    }

    /// Draws one.
    pub(super) fn draw(&self, draws: &mut Draws) -> f64 {
        self.quantiles[draws.next_u32() as usize % QUANTILES]
    }

    /// Returns the mean.
    pub(super) fn mean(&self) -> f64 {
        self.quantiles.iter().sum::<f64>() / QUANTILES as f64
    }

    /// Returns the standard deviation.
    pub(super) fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares = self.quantiles.iter().map(|x| (x - mean).powi(2));
        (squares.sum::<f64>() / QUANTILES as f64).sqrt()
    }
}

/// Returns the quantile of the standard normal distribution for a probability in (0, 1), to a
/// relative error of 1.15e-9 (P. J. Acklam, "An algorithm for computing the inverse normal
/// cumulative distribution function", 2003). Probabilities of 0 and 1 are taken for the nearest
/// ones that have a quantile.
#[allow(clippy::many_single_char_names, reason = "the names of the source")]
pub(super) fn normal(probability: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] = [
        7.784_695_709_041_462e-3,
        3.224_671_290_700_398e-1,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
        1.0,
    ];
    const LOW: f64 = 0.024_25;
    let horner = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    let p = probability.clamp(f64::MIN_POSITIVE, 1.0 - f64::EPSILON);
    if p < LOW {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / horner(&D, q)
    } else if p <= 1.0 - LOW {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / horner(&B, r)
    } else {
        let q = (-2.0 * (1.0 - p).ln()).sqrt();
        -horner(&C, q) / horner(&D, q)
    }
}

#[cfg(test)]
mod tests {
    use pollen_core::Seed;

    use super::*;

    #[test]
    fn quantiles_are_those_of_tables() {
        for (probability, expected) in [
            (0.5, 0.0),
            (0.841_344_746_068_543, 1.0),
            (0.975, 1.959_963_984_540_054),
            (0.001, -3.090_232_306_167_813),
            (0.999, 3.090_232_306_167_813),
        ] {
            assert!((normal(probability) - expected).abs() < 1e-8);
        }
        assert!(normal(0.0).is_finite() && normal(1.0).is_finite());
    }

    /// Expected largest values (Harter 1961, table 1).
    #[test]
    fn the_mean_of_the_slowest_is_that_of_order_statistics() {
        for (count, expected) in [(1, 0.0), (2, 0.564_19), (8, 1.423_60), (100, 2.507_59)] {
            let mean = Slowest::of(count).mean();
            assert!((mean - expected).abs() < 2e-3, "{count}: {mean}");
        }
        assert!((Slowest::of(1).deviation() - 1.0).abs() < 2e-3);
        assert!((Slowest::of(2).deviation() - 0.825_65).abs() < 2e-3);
    }

    #[test]
    fn draws_have_the_distribution_of_real_maxima() {
        let (count, rounds) = (64, 20_000);
        let slowest = Slowest::of(count);
        let mut draws = Seed::new(4).draws();
        let mut numbers = vec![0.0; count as usize];
        let (mut quick, mut real) = (0.0, 0.0);
        for _ in 0..rounds {
            quick += slowest.draw(&mut draws);
            draws.fill_normal(&mut numbers);
            real += f64::from(numbers.iter().copied().fold(f32::MIN, f32::max));
        }
        // The deviation of either mean is 0.4 / sqrt(20,000) = 0.003.
        let difference = (quick - real) / f64::from(rounds);
        assert!(difference.abs() < 0.03, "{difference}");
    }
}
