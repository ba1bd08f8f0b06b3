//! RLDS datasets: TFDS folders whose TFRecord files hold one `tf.train.Example` an episode.
//!
//! All steps of an episode lie in one message, field by field; the number of steps is that of a
//! scalar field. Images are taken as they are stored, whatever `features.json` says of them.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use flate2::read::ZlibDecoder;
use pollen_storage::Storage;

use crate::episode::{Matrix, Recording};
use crate::error::{Error, Result};
use crate::example::{Example, Values};
use crate::reader::get_if_present;
use crate::rlds_layout::{Shard, find_shards, infer, parse, profile};
use crate::selection::Selection;
use crate::source::{Profile, Source, Work};
use crate::tfds::{self, DatasetInfo, Leaf, LeafKind};
use crate::tfrecord::RecordFile;

/// Steps an episode can have; more is taken for a broken record.
const MAX_STEPS: usize = 1 << 24;

/// A split of an RLDS dataset.
#[derive(Debug)]
pub(crate) struct Rlds {
    storage: Storage,
    profile: Profile,
    leaves: Arc<BTreeMap<String, Leaf>>,
    shards: Vec<Shard>,
    /// The shard being read.
    shard: usize,
    /// Number of the next record in it.
    record: u64,
    file: Option<RecordFile>,
}

impl Rlds {
    /// Opens a split of the dataset in a folder; no split means `train`, or the first.
    pub(crate) async fn open(storage: Storage, split: Option<&str>) -> Result<Self> {
        let name = |file: &str| format!("{}/{file}", storage.url().trim_end_matches('/'));
        let info = match get_if_present(&storage, "dataset_info.json").await? {
            None => None,
            Some(text) => {
                let info: DatasetInfo = serde_json::from_slice(&text)
                    .map_err(|e| Error::invalid(name("dataset_info.json"), e))?;
                if let Some(format) = info.file_format.as_ref().filter(|f| *f != "tfrecord") {
                    return Err(Error::invalid(
                        name("dataset_info.json"),
                        format!("its fileFormat is {format}; write it again as tfrecord with TFDS"),
                    ));
                }
                Some(info)
            }
        };
        let shards = find_shards(&storage, info.as_ref(), split).await?;
        let leaves = match get_if_present(&storage, "features.json").await? {
            Some(text) => {
                tfds::leaves(&text).map_err(|e| Error::invalid(name("features.json"), e))?
            }
            None => infer(&storage, &shards).await?,
        };
        let dataset = info.map(|info| info.name).unwrap_or_default();
        let profile = profile(&dataset, &leaves, &shards);
        let leaves = leaves
            .into_iter()
            .map(|leaf| (leaf.key.clone(), leaf))
            .collect();
        Ok(Self {
            storage,
            profile,
            leaves: Arc::new(leaves),
            shards,
            shard: 0,
            record: 0,
            file: None,
        })
    }

    /// Opens the current shard if it is not open; none means that there are no more.
    async fn file(&mut self) -> Result<Option<&mut RecordFile>> {
        if self.file.is_none() {
            let Some(shard) = self.shards.get(self.shard) else {
                return Ok(None);
            };
            self.file = Some(RecordFile::open(&self.storage, &shard.path).await?);
        }
        Ok(self.file.as_mut())
    }

    /// Goes to the next shard; the one that ended must have had all its records.
    fn end_shard(&mut self, file: &str) -> Result<()> {
        if let Some(records) = self.shards[self.shard]
            .records
            .filter(|n| *n != self.record)
        {
            let reason = format!(
                "it holds {} records and dataset_info.json says {records}; copy it again",
                self.record
            );
            return Err(Error::invalid(file, reason));
        }
        self.file = None;
        self.shard += 1;
        self.record = 0;
        Ok(())
    }
}

#[async_trait]
impl Source for Rlds {
    fn profile(&self) -> &Profile {
        &self.profile
    }

    async fn seek(&mut self, episode: u64) -> Result<()> {
        (self.shard, self.record, self.file) = (0, 0, None);
        let mut left = episode;
        while let Some(records) = self.shards.get(self.shard).and_then(|shard| shard.records) {
            if records > left {
                break;
            }
            left -= records;
            self.shard += 1;
        }
        while left > 0 {
            let Some(file) = self.file().await? else {
                break;
            };
            let name = file.name();
            if file.skip().await? {
                self.record += 1;
                left -= 1;
            } else {
                self.end_shard(&name)?;
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Work>> {
        while let Some(file) = self.file().await? {
            let name = file.name();
            let Some(record) = file.read().await? else {
                self.end_shard(&name)?;
                continue;
            };
            let number = self.record;
            self.record += 1;
            let leaves = Arc::clone(&self.leaves);
            let short = self.shards[self.shard].path.clone();
            return Ok(Some(Box::new(move |selection| {
                let episode = Episode {
                    example: parse(&record, &name)?,
                    leaves: &leaves,
                    name: format!("{short}#{number}"),
                    file: &name,
                    offset: record.offset,
                };
                episode.read(selection)
            })));
        }
        Ok(None)
    }
}

/// One message and what is known of it.
struct Episode<'a> {
    example: Example,
    leaves: &'a BTreeMap<String, Leaf>,
    name: String,
    file: &'a str,
    offset: u64,
}

impl Episode<'_> {
    fn read(&self, selection: &Selection) -> Result<Recording> {
        let num_frames = self.num_steps()?;
        let mut recording = Recording {
            name: self.name.clone(),
            num_frames,
            ..Recording::default()
        };
        for field in selection.number_fields() {
            let matrix = self.numbers(self.leaf(field)?, num_frames)?;
            recording.numbers.insert(field.into(), matrix);
        }
        for field in selection.image_fields() {
            let leaf = self.leaf(field)?;
            let files = self.byte_strings(leaf, num_frames)?;
            let frames = files.into_iter().enumerate().map(|(i, file)| {
                let frame = selection.pictures.file(file);
                frame.map_err(|e| Error::unusable(&self.name, format!("{field}, step {i}: {e}")))
            });
            recording
                .cameras
                .insert(field.into(), frames.collect::<Result<_>>()?);
        }
        if let Some(field) = &selection.instruction {
            let texts = self.byte_strings(self.leaf(field)?, num_frames)?;
            let first = texts.iter().find(|text| !text.is_empty());
            recording.instruction = first.map(|text| String::from_utf8_lossy(text).into_owned());
        }
        Ok(recording)
    }

    fn leaf(&self, field: &str) -> Result<&Leaf> {
        let leaf = self.leaves.get(&format!("steps/{field}"));
        let leaf = leaf.ok_or_else(|| self.unusable(format!("it has no field {field}")))?;
        if leaf.ragged {
            return Err(Error::invalid(
                self.file,
                format!(
                    "the steps of `{field}` have lists of different lengths, which a frame's \
                     feature cannot have; leave it out of the mapping"
                ),
            ));
        }
        Ok(leaf)
    }

    /// Returns the number of steps: the number of values of a scalar.
    fn num_steps(&self) -> Result<usize> {
        let scalar = |leaf: &&Leaf| {
            leaf.field.is_some() && !leaf.ragged && leaf.shape.as_deref() == Some(&[])
        };
        let one = |leaf: &&Leaf| leaf.field.is_some() && leaf.kind == LeafKind::Image;
        let mut candidates: Vec<&Leaf> = self.leaves.values().filter(scalar).collect();
        // `is_first` before the others, which some exports lack.
        candidates.sort_by_key(|leaf| leaf.field.as_deref() != Some("is_first"));
        candidates.extend(self.leaves.values().filter(one));
        for leaf in candidates {
            let count = self.values(leaf)?.len();
            if count > 0 {
                return if count <= MAX_STEPS {
                    Ok(count)
                } else {
                    Err(self.unusable(format!("it has {count} steps")))
                };
            }
        }
        Err(self.unusable("it has no steps".into()))
    }

    fn values(&self, leaf: &Leaf) -> Result<Values> {
        let values = self.example.values(&leaf.key);
        values.map_err(|e| Error::corrupt(self.file, self.offset + e.offset as u64, e.reason))
    }

    fn numbers(&self, leaf: &Leaf, steps: usize) -> Result<Matrix> {
        let values = match (self.values(leaf)?, &leaf.kind) {
            (Values::Floats(values), _) => values,
            (Values::Integers(values), _) => values.into_iter().map(|v| v as f32).collect(),
            (Values::Bytes(values), LeafKind::Packed { dtype, zlib }) => {
                self.unpack(leaf, &values, dtype, *zlib)?
            }
            (Values::None, _) => Vec::new(),
            (Values::Bytes(_), _) => {
                return Err(self.misfit(leaf, "it holds bytes in place of numbers"));
            }
        };
        let width = match &leaf.shape {
            Some(shape) => shape.iter().product(),
            None => values.len() / steps,
        };
        if width == 0 || Some(values.len()) != steps.checked_mul(width) {
            let found = values.len();
            return Err(self.misfit(leaf, &format!("{found} values are not {steps} x {width}")));
        }
        Ok(Matrix { width, values })
    }

    fn byte_strings(&self, leaf: &Leaf, steps: usize) -> Result<Vec<Bytes>> {
        match self.values(leaf)? {
            Values::Bytes(values) if values.len() == steps => Ok(values),
            Values::Bytes(values) => {
                let found = values.len();
                Err(self.misfit(leaf, &format!("it has {found} values for {steps} steps")))
            }
            _ => Err(self.misfit(leaf, "it holds no bytes")),
        }
    }

    /// Reads tensors that are stored as bytes, step by step.
    fn unpack(&self, leaf: &Leaf, steps: &[Bytes], dtype: &str, zlib: bool) -> Result<Vec<f32>> {
        let size = match dtype {
            "uint8" | "int8" | "bool" => 1,
            "int16" | "uint16" => 2,
            "float32" | "int32" | "uint32" => 4,
            "float64" | "int64" | "uint64" => 8,
            other => return Err(self.misfit(leaf, &format!("{other} tensors are not read"))),
        };
        let Some(shape) = &leaf.shape else {
            return Err(self.misfit(leaf, "its shape is not known"));
        };
        let expected = shape.iter().product::<usize>() * size;
        let mut numbers = Vec::new();
        for step in steps {
            let mut inflated = Vec::new();
            let bytes = if zlib {
                // One byte more than expected tells too long from just right.
                let mut decoder = ZlibDecoder::new(&step[..]).take(expected as u64 + 1);
                let read = decoder.read_to_end(&mut inflated);
                read.map_err(|e| self.misfit(leaf, &e.to_string()))?;
                &inflated[..]
            } else {
                &step[..]
            };
            if bytes.len() != expected {
                let reason = format!("a step has {} bytes in place of {expected}", bytes.len());
                return Err(self.misfit(leaf, &reason));
            }
            numbers.extend(bytes.chunks_exact(size).map(|bytes| number(dtype, bytes)));
        }
        Ok(numbers)
    }

    fn unusable(&self, reason: String) -> Error {
        Error::unusable(&self.name, reason)
    }

    fn misfit(&self, leaf: &Leaf, reason: &str) -> Error {
        let offset = self.offset + self.example.offset(&leaf.key) as u64;
        self.unusable(format!(
            "{}, byte {offset} of {}: {reason}",
            leaf.key, self.file
        ))
    }
}

/// Reads one little-endian number of a NumPy type.
pub(crate) fn number(dtype: &str, bytes: &[u8]) -> f32 {
    let mut buffer = [0; 8];
    let size = bytes.len().min(8);
    buffer[..size].copy_from_slice(&bytes[..size]);
    let word = u64::from_le_bytes(buffer);
    match dtype {
        "float32" => f32::from_bits(word as u32),
        "float64" => f64::from_bits(word) as f32,
        "int8" => f32::from((word as u8).cast_signed()),
        "int16" => f32::from((word as u16).cast_signed()),
        "int32" => (word as u32).cast_signed() as f32,
        "int64" => word.cast_signed() as f32,
        _ => word as f32,
    }
}
