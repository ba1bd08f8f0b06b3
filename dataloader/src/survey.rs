//! A look at a dataset by its low-dimensional columns alone: no image is read, no index is made.

use std::path::{Path, PathBuf};

use futures::{StreamExt, TryStreamExt};
use pollen_core::ActionSpace;
use pollen_storage::Storage;

use crate::columns::{ColumnNames, Columns, read_columns};
use crate::dataset_config::DatasetConfig;
use crate::error::{Error, Result};
use crate::features::feature_faults;
use crate::index::{StatisticsPlace, data_files, load_statistics, local_path, stored_sidecar};
use crate::lerobot::{Metadata, StoredFile, read_metadata};
use crate::parquet_file::{FileName, read_footer, read_footer_bytes};
use crate::recording::{Recording, Wanted, record};
use crate::sidecar::{hash_lines, hex};
use crate::statistics::Statistics;
use crate::transform::ColumnTransform;

/// Footers that are read at once.
const REQUESTS: usize = 8;

/// A dataset whose metadata has been read, and the list of its data files.
#[derive(Debug)]
pub struct Survey {
    storage: Storage,
    name: String,
    metadata: Metadata,
    files: Vec<StoredFile>,
    /// The index on this machine, if the dataset's folder cannot be written to.
    kept: PathBuf,
}

impl Survey {
    /// Reads `meta/info.json` and the tasks, and lists the data files.
    ///
    /// `name` names the dataset in errors; `index_dir` is `data.index_dir` of a recipe.
    pub async fn open(storage: Storage, name: &str, index_dir: &Path) -> Result<Self> {
        let metadata = read_metadata(&storage, name).await?;
        let files = data_files(&storage, name).await?;
        Ok(Self {
            kept: local_path(index_dir, &storage.url(), name, &files),
            name: name.into(),
            storage,
            metadata,
            files,
        })
    }

    /// Returns `info.json` and the tasks.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns the name it was opened under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the bytes of the data files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Returns the transform of its section of a recipe, checked against the stored features.
    pub fn transform(
        &self,
        config: &DatasetConfig,
        space: &ActionSpace,
    ) -> Result<ColumnTransform> {
        let mut faults = Vec::new();
        let roles: Vec<String> = config.cameras.keys().cloned().collect();
        feature_faults(
            &self.name,
            config,
            &self.metadata,
            space,
            &roles,
            &mut faults,
        );
        if faults.is_empty() {
            Ok(ColumnTransform::of(config, space))
        } else {
            Err(Error::Config { faults })
        }
    }

    /// Returns the statistics after a transform: those of the index where there is one, kept ones,
    /// or taken now and kept beside the dataset.
    ///
    /// Without an index, kept ones are known by the names, sizes and footers of the data files, the
    /// tasks and the transform. Those of other data, or with other contents, are refused.
    pub async fn statistics(&self, transform: &ColumnTransform) -> Result<Statistics> {
        let Self {
            storage,
            name,
            metadata,
            files,
            kept,
        } = self;
        if let Some(sidecar) = stored_sidecar(storage, name, metadata, files, kept).await? {
            if sidecar.transform == *transform {
                return Ok(Statistics::of_sidecar(sidecar));
            }
            return load_statistics(storage, name, metadata, &sidecar, transform, kept).await;
        }
        let hash = self.columns_hash().await?;
        let short = &hash_lines([&*hash, &*transform.hash])[..16];
        let place = StatisticsPlace {
            path: format!("meta/pollen-columns-{short}.json"),
            local: kept.with_extension(format!("columns-{short}.json")),
        };
        let named = files.iter().map(|file| (file.path.clone(), file.size));
        let how = (&*metadata.tasks, transform);
        place.find_or_take(storage, name, hash, named, how).await
    }

    /// Reads the columns file by file and hands them over as they are stored; episodes are whole.
    pub async fn visit(
        &self,
        transform: &ColumnTransform,
        mut visitor: impl FnMut(Columns),
    ) -> Result<()> {
        let names = ColumnNames::of(transform);
        for file in &self.files {
            let name = self.file(file);
            let footer = read_footer(&self.storage, &name, file.size).await?;
            let all = 0..footer.metadata().num_row_groups();
            visitor(read_columns(&self.storage, &name, &footer, file.size, &names, all).await?);
        }
        Ok(())
    }

    /// Reads single episodes, in the order of their numbers: all rows as stored, and `frames` evenly
    /// spaced pictures of the image features.
    pub async fn record(
        &self,
        episodes: &[u64],
        transform: &ColumnTransform,
        features: &[String],
        frames: usize,
    ) -> Result<Vec<Recording>> {
        let wanted = Wanted {
            episodes,
            transform,
            features,
            frames,
        };
        record(&self.storage, &self.name, &self.files, wanted).await
    }

    /// Transforms columns that [`Self::visit`] handed over.
    pub fn transformed(&self, transform: &ColumnTransform, columns: Columns) -> Result<Columns> {
        let name = FileName {
            dataset: self.name.clone(),
            path: "data".into(),
        };
        transform.apply(&name, columns)
    }

    fn file(&self, file: &StoredFile) -> FileName {
        FileName {
            dataset: self.name.clone(),
            path: file.path.clone(),
        }
    }

    /// Hashes what tells one state of the data from another without reading them: footers hold the
    /// place, the length and the range of every column.
    async fn columns_hash(&self) -> Result<String> {
        use sha2::{Digest, Sha256};
        let footers = self.files.iter().map(|file| async move {
            let name = self.file(file);
            let footer = read_footer_bytes(&self.storage, &name, file.size).await?;
            let hash = hex(&Sha256::digest(&footer));
            Ok::<_, Error>(format!("file {:?} {} {hash}", file.path, file.size))
        });
        let footers: Vec<String> = futures::stream::iter(footers)
            .buffered(REQUESTS)
            .try_collect()
            .await?;
        let fps = self.metadata.info.fps;
        let mut lines = vec![format!("pollen columns 1, {fps} frames a second")];
        lines.extend(self.metadata.tasks.iter().map(|t| format!("task {t:?}")));
        lines.extend(footers);
        Ok(hash_lines(lines.iter().map(String::as_str)))
    }
}
