//! Statistics of a dataset by one pass over its low-dimensional columns.

use pollen_processing::{ActionStats, StatsBuilder};
use pollen_storage::Storage;
use serde::{Deserialize, Serialize};

use crate::columns::{ColumnNames, Columns, Rows, read_columns};
use crate::error::{Error, Result};
use crate::filter::RowRun;
use crate::parquet_file::{FileName, read_footer};
use crate::sidecar::{Sidecar, left_out_fault};
use crate::transform::ColumnTransform;

/// Version of the file of [`Statistics`].
const VERSION: u32 = 1;

/// What a transform makes of a dataset: `meta/pollen-<hash>.json`, beside the index that was made
/// with another transform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Version of the file.
    pub version: u32,
    /// Hash of the data that they were taken of.
    pub dataset_hash: String,
    /// What was done to actions and states before.
    pub transform: ColumnTransform,
    /// Of the transformed actions over all steps of all episodes.
    pub action: ActionStats,
    /// Of the proprioception; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proprio: Option<ActionStats>,
    /// Rows that the filter leaves out: (first global row, number of rows).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<(u64, u64)>,
}

impl Statistics {
    /// Returns what an index holds of them.
    pub(crate) fn of_sidecar(sidecar: Sidecar) -> Self {
        Self {
            version: VERSION,
            dataset_hash: sidecar.dataset_hash,
            transform: sidecar.transform,
            action: sidecar.action,
            proprio: sidecar.proprio,
            left_out: sidecar.left_out,
        }
    }

    /// Returns the path of the file inside a dataset.
    pub(crate) fn path(transform: &ColumnTransform) -> String {
        format!("meta/pollen-{}.json", &transform.hash[..16])
    }

    /// Reads the text of the file; the error says what is wrong with it.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        let read: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let mut faults = read.action.faults("its statistics of actions");
        if let Some(proprio) = &read.proprio {
            faults.extend(proprio.faults("its statistics of proprioception"));
        }
        faults.extend(left_out_fault(&read.left_out));
        if read.version != VERSION {
            faults.push(format!("version {} is not known", read.version));
        }
        if faults.is_empty() {
            Ok(read)
        } else {
            Err(faults.join("; "))
        }
    }

    /// Returns the text of the file.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("its map keys are strings");
        text.push(b'\n');
        text
    }

    /// Returns why they cannot be used for this data and transform, if they cannot.
    pub(crate) fn mismatch(
        &self,
        dataset_hash: &str,
        transform: &ColumnTransform,
    ) -> Option<String> {
        if self.dataset_hash != dataset_hash {
            return Some("it was made of other data".into());
        }
        if self.transform != *transform || transform.hash_of_contents() != self.transform.hash {
            return Some("it was made with another transform".into());
        }
        None
    }
}

/// Reads the action and state columns of all files, and nothing else, and takes statistics.
pub(crate) async fn take_statistics(
    storage: &Storage,
    dataset: &str,
    dataset_hash: String,
    files: impl Iterator<Item = (String, u64)>,
    tasks: &[String],
    transform: &ColumnTransform,
) -> Result<Statistics> {
    let mut pass = StatisticsPass::new(dataset, transform, tasks);
    let names = ColumnNames::of(transform);
    for (path, bytes) in files {
        let name = FileName {
            dataset: dataset.into(),
            path,
        };
        let footer = read_footer(storage, &name, bytes).await?;
        let all = 0..footer.metadata().num_row_groups();
        let columns = read_columns(storage, &name, &footer, bytes, &names, all).await?;
        pass.push(&name, columns)?;
    }
    pass.finish(dataset_hash)
}

/// Collects the files of a dataset in their order.
pub(crate) struct StatisticsPass<'a> {
    dataset: &'a str,
    transform: &'a ColumnTransform,
    tasks: &'a [String],
    action: Column,
    state: Column,
    left_out: Vec<RowRun>,
    rows: u64,
}

#[derive(Default)]
struct Column {
    stats: Option<StatsBuilder>,
    width: Option<usize>,
    not_finite: u64,
}

impl<'a> StatisticsPass<'a> {
    pub(crate) fn new(
        dataset: &'a str,
        transform: &'a ColumnTransform,
        tasks: &'a [String],
    ) -> Self {
        Self {
            dataset,
            transform,
            tasks,
            action: Column::default(),
            state: Column::default(),
            left_out: Vec::new(),
            rows: 0,
        }
    }

    /// Adds the stored columns of the next file.
    pub(crate) fn push(&mut self, name: &FileName, columns: Columns) -> Result<()> {
        let columns = self.transform.apply(name, columns)?;
        for (column, rows, of) in [
            (&self.transform.action, &columns.action, &self.action),
            (&self.transform.state, &columns.state, &self.state),
        ] {
            if of.width.is_some_and(|width| width != rows.width) {
                return Err(name.bad(format!(
                    "its column `{column}` has {} dimensions, other than in the files before",
                    rows.width
                )));
            }
        }
        let filter = &self.transform.filter;
        self.left_out
            .extend(filter.left_out(&columns, self.tasks, self.rows));
        let mut start = 0;
        for run in columns.episode.chunk_by(|a, b| a == b) {
            for frame in 0..run.len() {
                if self.transform.steps.is_step(frame as u64, run.len() as u64) {
                    self.action.push(&columns.action, start + frame);
                    self.state.push(&columns.state, start + frame);
                }
            }
            start += run.len();
        }
        self.rows += start as u64;
        Ok(())
    }

    pub(crate) fn finish(self, dataset_hash: String) -> Result<Statistics> {
        let Self {
            dataset, transform, ..
        } = self;
        let action = self.action.finish(dataset, &transform.action)?;
        let action = action.ok_or_else(|| Error::File {
            dataset: dataset.into(),
            path: "data".into(),
            reason: "has no step of an action: all episodes are shorter than the transform needs"
                .into(),
        })?;
        Ok(Statistics {
            version: VERSION,
            dataset_hash,
            transform: transform.clone(),
            action,
            proprio: self.state.finish(dataset, &transform.state)?,
            left_out: self.left_out,
        })
    }
}

impl Column {
    fn push(&mut self, rows: &Rows, row: usize) {
        if rows.width == 0 {
            return;
        }
        self.width = Some(rows.width);
        let stats = self
            .stats
            .get_or_insert_with(|| StatsBuilder::new(rows.width));
        if stats.push(rows.row(row)).is_err() {
            self.not_finite += 1;
        }
    }

    fn finish(self, dataset: &str, column: &str) -> Result<Option<ActionStats>> {
        if self.not_finite > 0 {
            tracing::warn!(
                dataset,
                column,
                frames = self.not_finite,
                "not finite: left out of statistics"
            );
        }
        let stats = self.stats.map(StatsBuilder::finish).transpose();
        stats.map_err(|error| Error::File {
            dataset: dataset.into(),
            path: format!("column `{column}`"),
            reason: error.to_string(),
        })
    }
}
