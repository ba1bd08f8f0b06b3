//! The global gradient norm and the factor that clips by it.

/// Values per partial sum; part of the numerics, the same for every sharding.
pub const CHUNK: usize = 1 << 20;

/// Returns the L2 norm over all `parts` taken as one flat array.
///
/// Sums of squares are taken in f64 over fixed chunks of [`CHUNK`] elements of the flat array and
/// added in order, so that the result does not depend on how the array is cut into buckets or
/// shards.
pub fn norm<P: AsRef<[f32]>>(parts: impl IntoIterator<Item = P>) -> f64 {
    let (mut total, mut partial, mut filled) = (0.0_f64, 0.0_f64, 0);
    for part in parts {
        let mut rest = part.as_ref();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(CHUNK - filled));
            for &value in head {
                partial += f64::from(value) * f64::from(value);
            }
            filled += head.len();
            if filled == CHUNK {
                total += partial;
                (partial, filled) = (0.0, 0);
            }
            rest = tail;
        }
    }
    (total + partial).sqrt()
}

/// Returns the factor for the gradients: min(1, limit / (norm + 1e-6)), as PyTorch's
/// `clip_grad_norm_`; 1 without a limit.
pub fn factor(norm: f64, limit: Option<f64>) -> f64 {
    limit.map_or(1.0, |limit| (limit / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cut_into_parts_changes_no_bit() {
        let values: Vec<f32> = (0..3 * CHUNK + 17)
            .map(|i| (i as f32 * 0.37).sin())
            .collect();
        let whole = norm([&values]);
        for cut in [1, 1000, CHUNK - 1, CHUNK, 2 * CHUNK + 5] {
            assert_eq!(
                whole,
                norm([&values[..cut], &values[cut..]]),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn small_gradients_are_left_alone() {
        assert_eq!(factor(0.5, Some(1.0)), 1.0);
        assert_eq!(factor(1e9, None), 1.0);
        assert!((factor(4.0, Some(1.0)) - 0.25).abs() < 1e-6);
    }
}
