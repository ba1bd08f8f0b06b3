//! Reads a dataset's files: footers, columns and row groups.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use pollen_processing::ActionStats;

use super::{Dataset, Group};
use crate::byte_cache::Held;
use crate::columns::{ColumnNames, Columns, read_columns};
use crate::disk_cache::{DiskCache, DiskKey};
use crate::error::{Error, Result};
use crate::parquet_file::read_footer;
use crate::row_group::{OpenRowGroup, Place};
use crate::sidecar::RowGroup;

/// Expected of a footer for each of its row groups, until it is read.
const FOOTER_BYTES: u64 = 8 << 10;

impl Held for ArrowReaderMetadata {
    fn held_bytes(&self) -> u64 {
        self.metadata().memory_size() as u64
    }
}

impl Dataset {
    /// Returns what an open row group is expected to take in memory: its images as they are stored,
    /// its columns as numbers.
    pub(crate) fn row_group_bytes(&self, row_group: u32) -> u64 {
        let group = self.groups[row_group as usize];
        let groups = &self.sidecar.files[group.file].row_groups;
        let kept = group.number..self.around(row_group).end;
        let rows: u64 = groups[kept].iter().map(|group| group.rows).sum();
        let state = self.sidecar.proprio.as_ref().map_or(0, ActionStats::dim);
        groups[group.number].bytes + rows * (4 * (self.space.dim() + state) + 24) as u64
    }

    fn entry(&self, row_group: u32) -> &RowGroup {
        let group = self.groups[row_group as usize];
        &self.sidecar.files[group.file].row_groups[group.number]
    }

    /// Returns the row groups of the same file whose columns samples of this one need: up to the end
    /// of its last episode, because action chunks reach there, and from the start of its first one
    /// where columns are transformed, which is done for whole episodes.
    fn around(&self, row_group: u32) -> Range<usize> {
        let group = self.groups[row_group as usize];
        let groups = &self.sidecar.files[group.file].row_groups;
        let goes_on = |group: &RowGroup| group.episodes.first().is_some_and(|e| e.1 > 0);
        let (mut start, mut end) = (group.number, group.number + 1);
        while groups.get(end).is_some_and(goes_on) {
            end += 1;
        }
        while start > 0 && !self.sidecar.transform.steps.is_identity() && goes_on(&groups[start]) {
            start -= 1;
        }
        start..end
    }

    /// Returns the low-dimensional columns of a row group, without its images: from its first row to
    /// the end of its last episode.
    pub(crate) async fn columns(&self, row_group: u32) -> Result<Columns> {
        let file = self.groups[row_group as usize].file;
        let stored = self.read_columns(file, self.around(row_group)).await?;
        self.transformed(row_group, stored)
    }

    /// Checks and transforms the stored columns of the row groups around one.
    fn transformed(&self, row_group: u32, stored: Columns) -> Result<Columns> {
        let group = self.groups[row_group as usize];
        let around = self.around(row_group);
        let groups = &self.sidecar.files[group.file].row_groups;
        let rows = |numbers: Range<usize>| groups[numbers].iter().map(|g| g.rows).sum::<u64>();
        let mut columns = self
            .sidecar
            .transform
            .apply(&self.files[group.file], stored)?;
        self.check_columns(group.file, rows(around.clone()), &columns)?;
        columns.skip(rows(around.start..group.number) as usize);
        Ok(columns)
    }

    async fn read_columns(&self, file: usize, numbers: Range<usize>) -> Result<Columns> {
        if numbers.is_empty() {
            return Ok(Columns::default());
        }
        let names = ColumnNames::of(&self.sidecar.transform);
        let footer = self.footer(file).await?;
        let bytes = self.sidecar.files[file].bytes;
        let name = &self.files[file];
        read_columns(&self.storage, name, &footer, bytes, &names, numbers).await
    }

    fn check_columns(&self, file: usize, rows: u64, columns: &Columns) -> Result<()> {
        let bad = |reason| Err(self.files[file].bad(reason));
        if columns.action.len() as u64 != rows || columns.episode.len() as u64 != rows {
            return bad(format!(
                "has {} rows of actions, the index says {rows}",
                columns.action.len()
            ));
        }
        if columns.action.width != self.space.dim() {
            return bad(format!(
                "its actions have {} dimensions, the action space `{}` has {}",
                columns.action.width,
                self.space.name,
                self.space.dim()
            ));
        }
        let dim = self.space.proprio_dim;
        if dim > 0 && (columns.state.width != dim || columns.state.len() as u64 != rows) {
            return bad(format!(
                "its states have {} dimensions in {} rows, the action space `{}` has {dim} and the \
                 index {rows}",
                columns.state.width,
                columns.state.len(),
                self.space.name
            ));
        }
        let tasks = self.metadata.tasks.len() as u64;
        match columns.task.iter().find(|&&task| task >= tasks) {
            Some(task) => bad(format!("names task {task}, meta/tasks.parquet has {tasks}")),
            None => Ok(()),
        }
    }

    async fn footer(&self, file: usize) -> Result<Arc<ArrowReaderMetadata>> {
        let key = (self.number, file);
        let expected = self.sidecar.files[file].row_groups.len() as u64 * FOOTER_BYTES;
        let footers = &self.shared.footers;
        let pinned = footers.pin(&[(key, expected)], &self.shared.reading).await;
        let (name, bytes) = (&self.files[file], self.sidecar.files[file].bytes);
        pinned
            .get(key, || read_footer(&self.storage, name, bytes))
            .await
    }

    /// Fetches a row group by one request, unless it is on this node's disk, and opens it.
    pub(crate) async fn open_row_group(&self, row_group: u32) -> Result<OpenRowGroup> {
        let Group { file, number, .. } = self.groups[row_group as usize];
        let footer = self.footer(file).await?;
        let around = self.around(row_group);
        let (found, before, behind) = tokio::try_join!(
            self.fetch(row_group),
            Box::pin(self.read_columns(file, around.start..number)),
            Box::pin(self.read_columns(file, number + 1..around.end))
        )?;
        let (bytes, to_disk) = found;
        let name = self.files[file].clone();
        let file_bytes = self.sidecar.files[file].bytes;
        let expected = self.entry(row_group).clone();
        let features = self.features.clone();
        let names = ColumnNames::of(&self.sidecar.transform);
        // The checksum and the views of some MiB take a millisecond or two.
        let read = blocking(move || {
            let place = Place {
                file: &name,
                footer: &footer,
                file_bytes,
                number,
                expected: &expected,
            };
            let open = OpenRowGroup::read(place, bytes.clone(), &features, &names)?;
            if let Some((cache, key)) = to_disk {
                cache.put(&key, &bytes);
            }
            Ok(open)
        });
        let open: OpenRowGroup = read.await??;
        open.with_columns(|own| {
            let stored = before.and(own).and_then(|rows| rows.and(behind));
            let stored = stored.ok_or_else(|| {
                self.files[file].bad("its columns have other widths in other row groups")
            })?;
            self.transformed(row_group, stored)
        })
    }

    /// Returns the bytes of a row group, and where to keep them on disk if they are not there.
    async fn fetch(&self, row_group: u32) -> Result<(Bytes, Option<(Arc<DiskCache>, DiskKey)>)> {
        let file = self.groups[row_group as usize].file;
        let expected = self.entry(row_group);
        let on_disk = self.shared.disk_cache.as_ref().map(|cache| {
            let key = DiskKey::new(&self.sidecar.files[file], expected);
            (Arc::clone(cache), key)
        });
        if let Some((cache, key)) = on_disk.clone()
            && let Some(bytes) = blocking(move || cache.get(&key)).await?
        {
            return Ok((bytes, None));
        }
        let range = expected.offset..expected.offset + expected.bytes;
        let name = &self.files[file];
        let fetched = self.storage.get_range(&name.path, range).await;
        let bytes = fetched.map_err(|e| name.failed(e))?;
        Ok((bytes, on_disk))
    }
}

/// Runs work on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|_| Error::Ended {
        part: "row-group reader",
    })
}
