//! Writes a fitted source under canonical names, as f32.

use pollen_model::PROMPT;
use pollen_storage::Storage;
use safetensors::Dtype;

use crate::error::Result;
use crate::files::WeightFiles;
use crate::fit::{Fit, FitOptions, Part, PromptSource};
use crate::shards::{self, Planned, Values, Written};

/// Bytes of a shard, unless one tensor has more.
pub(crate) const SHARD_BYTES: u64 = 4_000_000_000;

/// Writes the parameters that `fit` found into a folder that holds no model. One tensor is in
/// memory at a time; when this fails, the folder still holds no model.
pub async fn import(
    files: &WeightFiles,
    fit: &Fit,
    options: &FitOptions,
    destination: &Storage,
) -> Result<Written> {
    fit.check(files.url())?;
    let planned = fit
        .table
        .iter()
        .filter(|spec| fit.parts.contains_key(&spec.name))
        .map(|spec| Planned {
            name: spec.name.clone(),
            shape: spec.shape.clone(),
            dtype: Dtype::F32,
        })
        .collect();
    let notes = serde_json::json!({ "source": files.url(), "choices": fit.choices });
    let fitted = Fitted {
        files,
        fit,
        options,
    };
    shards::write(destination, planned, SHARD_BYTES, &notes, &fitted).await
}

/// Reads parameters as a fit says.
struct Fitted<'a> {
    files: &'a WeightFiles,
    fit: &'a Fit,
    options: &'a FitOptions,
}

impl Fitted<'_> {
    fn shape(&self, name: &str) -> &[usize] {
        let spec = self.fit.table.get(name);
        &spec
            .expect("only parameters of the table are planned")
            .shape
    }
}

impl Values for Fitted<'_> {
    async fn values(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name);
        let words = || {
            let table = self.fit.table.token_table();
            let table = &table.expect("every model has a token table").shape;
            (table[0] - 1, table[1])
        };
        match &self.fit.parts[name] {
            Part::Copy(key) => self.files.read(key).await,
            Part::Transpose(key, rows) => Ok(transpose(&self.files.read(key).await?, *rows)),
            Part::Rows(key) => {
                let mut values = self.files.read(key).await?;
                values.resize(shape.iter().product(), 0.0);
                Ok(values)
            }
            Part::Tokens(key) => {
                let (rows, width) = words();
                let mut values = self.files.read(key).await?;
                values.truncate(rows * width);
                let mean = mean_row(&values, rows, width);
                values.extend(mean);
                Ok(values)
            }
            Part::Mean(key) => {
                let (rows, width) = words();
                Ok(mean_row(&self.files.read(key).await?, rows, width))
            }
            Part::MeanOfOther(key) => {
                debug_assert_eq!(name, PROMPT);
                let Some(PromptSource::Of(other)) = &self.options.prompt else {
                    unreachable!("the fit was made with these options")
                };
                let (rows, width) = words();
                Ok(mean_row(&other.read(key).await?, rows, width))
            }
        }
    }
}

/// Returns the transpose of a matrix of `rows` rows.
pub(crate) fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}

/// Returns the mean of the first `rows` rows.
fn mean_row(table: &[f32], rows: usize, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; width];
    for row in table.chunks_exact(width).take(rows) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value);
        }
    }
    sums.into_iter()
        .map(|sum| (sum / rows as f64) as f32)
        .collect()
}
