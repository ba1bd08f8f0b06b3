//! The global gradient norm and the factor that clips by it.

/// Values per partial sum; part of the numerics. Parts of a bucket are cut at multiples of it.
pub const CHUNK: usize = 4096;

/// Returns the sum of squares of each chunk of [`CHUNK`] values, in f64 and in order.
///
/// A bucket's chunks count from its start, and ranks hold whole chunks: whoever sums a chunk gets
/// the same bits.
pub fn square_sums(values: &[f32]) -> Vec<f64> {
    let chunks = values.chunks(CHUNK);
    chunks
        .map(|chunk| {
            chunk.iter().fold(0.0, |sum, &value| {
                let value = f64::from(value);
                sum + value * value
            })
        })
        .collect()
}

/// Returns the L2 norm from the sums of all chunks, added in the order of the flat array.
pub fn norm(square_sums: &[f64]) -> f64 {
    square_sums.iter().sum::<f64>().sqrt()
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
    fn a_cut_at_chunks_changes_no_bit() {
        let values: Vec<f32> = (0..3 * CHUNK + 17)
            .map(|i| (i as f32 * 0.37).sin())
            .collect();
        let whole = square_sums(&values);
        assert_eq!(whole.len(), 4);
        for cut in [0, CHUNK, 3 * CHUNK] {
            let (a, b) = values.split_at(cut);
            let joined = [square_sums(a), square_sums(b)].concat();
            assert_eq!(norm(&joined), norm(&whole), "cut at {cut}");
        }
        let plain: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((norm(&whole) - plain.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn small_gradients_are_left_alone() {
        assert_eq!(factor(0.5, Some(1.0)), 1.0);
        assert_eq!(factor(1e9, None), 1.0);
        assert!((factor(4.0, Some(1.0)) - 0.25).abs() < 1e-6);
    }
}
