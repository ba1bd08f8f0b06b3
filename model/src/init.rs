//! Random initial values, drawn on the host from a seed that belongs to the parameter's name.

use pollen_core::Seed;

use crate::parameters::{Init, ParameterSpec, ParameterTable};

/// Draws the values of one parameter.
pub(crate) fn draw(spec: &ParameterSpec, table: &ParameterTable, seed: Seed) -> Vec<f32> {
    let mut values = vec![0.0; spec.len()];
    let mut draws = seed.child(&spec.name).draws();
    match spec.init {
        Init::Zeros => {}
        Init::Ones => values.fill(1.0),
        Init::Uniform(bound) => {
            for value in &mut values {
                *value = (2.0 * draws.uniform_f32() - 1.0) * bound;
            }
        }
        Init::Normal(std) => {
            draws.fill_normal(&mut values);
            for value in &mut values {
                *value *= std;
            }
        }
        Init::MeanToken => {
            let tokens = table
                .token_table()
                .expect("a model with a prompt vector has a token table");
            mean_rows(&draw(tokens, table, seed), &mut values);
        }
    }
    values
}

/// Sets `mean` to the mean of all rows of `table` but the last, which is the prompt token's own.
fn mean_rows(table: &[f32], mean: &mut [f32]) {
    let width = mean.len();
    let rows = table.len() / width - 1;
    let mut sums = vec![0.0_f64; width];
    for row in table.chunks_exact(width).take(rows) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value);
        }
    }
    for (mean, sum) in mean.iter_mut().zip(sums) {
        *mean = (sum / rows as f64) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_leaves_out_the_last_row() {
        let mut mean = [0.0; 2];
        mean_rows(&[1.0, 2.0, 3.0, 6.0, 100.0, 100.0], &mut mean);
        assert_eq!(mean, [2.0, 4.0]);
    }
}
