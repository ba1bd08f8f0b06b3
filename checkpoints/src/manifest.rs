//! What a checkpoint consists of: the MANIFEST and the records of its files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use pollen_core::tensor_header::{self, Dtype};
use serde::{Deserialize, Serialize};

/// Version of the MANIFEST this build writes and reads.
const VERSION: u32 = 1;

/// Which checkpoint: its step and the generation that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CheckpointId {
    /// The training step.
    pub step: u64,
    /// The generation.
    pub generation: u64,
}

impl fmt::Display for CheckpointId {
    /// Writes the folder below `checkpoints/`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step-{:08}/g{}", self.step, self.generation)
    }
}

impl FromStr for CheckpointId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (step, generation) = text.strip_prefix("step-")?.split_once("/g")?;
            let id = Self {
                step: step.parse().ok()?,
                generation: generation.parse().ok()?,
            };
            (id.to_string() == text).then_some(id)
        };
        parse().ok_or_else(|| format!("`{text}` is not the folder of a checkpoint"))
    }
}

impl CheckpointId {
    /// Returns the path of the MANIFEST below `checkpoints/`.
    pub fn manifest(&self) -> String {
        format!("{self}/MANIFEST.json")
    }
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Weights.
    Model,
    /// Averaged weights.
    Ema,
    /// Flat ranges of the optimizer's state.
    Optim,
    /// Anything else.
    Other,
}

impl FileKind {
    /// Returns the name of a rank's part; counted from 1, as Hugging Face does.
    pub(crate) fn part(self, rank: u32, world_size: u32) -> String {
        let kind = match self {
            Self::Model => "model",
            Self::Ema => "ema",
            Self::Optim => "optim",
            Self::Other => "other",
        };
        let number = u64::from(rank) + 1;
        format!("{kind}-{number:05}-of-{world_size:05}.safetensors")
    }
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Canonical name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Global shape; a tensor is never split.
    pub shape: Vec<usize>,
}

/// A range of a flat f32 array in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlatRecord {
    /// Name of the array.
    pub name: String,
    /// Elements of the whole array.
    pub global_len: u64,
    /// First element of the range.
    pub offset: u64,
    /// Elements of the range.
    pub len: u64,
    /// First byte in the file.
    pub start: u64,
}

/// A file that was written: what its writer hands to rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Name inside the checkpoint's folder.
    pub name: String,
    /// What it is for.
    pub kind: FileKind,
    /// Size.
    pub bytes: u64,
    /// CRC-32C (Castagnoli).
    pub crc32c: u32,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
    /// Tensors in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorRecord>,
    /// Flat ranges in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flat: Vec<FlatRecord>,
}

/// What the trainer says about a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestHead {
    /// Training steps done.
    pub step: u64,
    /// Optimizer updates done; a skipped step is none.
    pub updates: u64,
    /// Samples consumed.
    pub samples: u64,
    /// World size that saved it; any may restore it.
    pub world_size: u32,
    /// Hash of the resolved configuration.
    pub config_hash: String,
    /// Hash of the recipe's own file.
    pub recipe_hash: String,
    /// Hash of the layout of the flat arrays.
    pub layout_hash: String,
    /// Version of the sample order.
    pub order_version: u32,
    /// Hash of each dataset.
    pub dataset_hashes: BTreeMap<String, String>,
    /// GPU-hours spent so far.
    pub gpu_hours_spent: f64,
    /// Held-out error of these weights, if it was measured; lower is better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_error: Option<f64>,
    /// Whatever else the trainer wants back.
    #[serde(default)]
    pub extra: serde_json::Value,
}

/// The file that names all others; written last before the log entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this schema; 1.
    pub version: u32,
    /// The generation that wrote it.
    pub generation: u64,
    /// What the trainer said.
    #[serde(flatten)]
    pub head: ManifestHead,
    /// Every file.
    pub files: Vec<FileRecord>,
}

impl Manifest {
    pub(crate) fn new(generation: u64, head: ManifestHead, files: Vec<FileRecord>) -> Self {
        Self {
            version: VERSION,
            generation,
            head,
            files,
        }
    }

    /// Returns which checkpoint it is.
    pub fn id(&self) -> CheckpointId {
        CheckpointId {
            step: self.head.step,
            generation: self.generation,
        }
    }

    /// Returns the size of all files.
    pub fn bytes(&self) -> u64 {
        let sizes = self.files.iter().map(|file| file.bytes);
        sizes.fold(0, u64::saturating_add)
    }

    /// Reads a MANIFEST; whatever is wrong with it is named.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if manifest.version != VERSION {
            return Err(format!(
                "version {} is not known; this build reads {VERSION}",
                manifest.version
            ));
        }
        let faults = manifest.faults();
        if faults.is_empty() {
            Ok(manifest)
        } else {
            Err(faults.join("; "))
        }
    }

    /// Returns every way in which the files do not make up a checkpoint.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut names = BTreeSet::new();
        for file in &self.files {
            if !is_file_name(&file.name) {
                faults.push(format!("`{}` is not a file name", file.name));
            }
            if !names.insert(&file.name) {
                faults.push(format!("file `{}` is there twice", file.name));
            }
        }
        for kind in [FileKind::Model, FileKind::Ema, FileKind::Optim] {
            faults.extend(self.missing_parts(kind));
        }
        for kind in [FileKind::Model, FileKind::Ema] {
            faults.extend(self.tensor_faults(kind));
        }
        faults.extend(self.flat_faults());
        faults
    }

    /// Each kind of file is there from the first part to the last, or not at all.
    fn missing_parts(&self, kind: FileKind) -> Vec<String> {
        let names: BTreeSet<&str> = self.of_kind(kind).map(|file| &*file.name).collect();
        let Some(first) = names.first() else {
            return Vec::new();
        };
        let parts = first
            .strip_suffix(".safetensors")
            .and_then(|stem| stem.rsplit_once("-of-")?.1.parse::<u32>().ok());
        let Some(parts) = parts.filter(|parts| *parts as usize >= names.len()) else {
            return vec![format!("`{first}` does not count the parts")];
        };
        // A forged count must not be walked to its end: the first few gaps say enough.
        let mut faults: Vec<String> = (0..parts)
            .map(|rank| kind.part(rank, parts))
            .filter(|name| !names.contains(name.as_str()))
            .take(3)
            .map(|name| format!("`{name}` is missing"))
            .collect();
        if faults.is_empty() && names.len() != parts as usize {
            faults.push(format!("{} of {parts} parts of {kind:?}", names.len()));
        }
        faults
    }

    fn tensor_faults(&self, kind: FileKind) -> Vec<String> {
        let mut faults = Vec::new();
        let mut names = BTreeSet::new();
        for file in self.of_kind(kind) {
            let mut left = file.bytes;
            for tensor in &file.tensors {
                if !names.insert(&tensor.name) {
                    faults.push(format!("tensor `{}` is there twice", tensor.name));
                }
                let size = tensor_header::size_of(tensor.dtype, &tensor.shape);
                match size.and_then(|size| left.checked_sub(size)) {
                    Some(rest) => left = rest,
                    None => faults.push(format!(
                        "tensor `{}` is larger than `{}`",
                        tensor.name, file.name
                    )),
                }
            }
        }
        faults
    }

    /// The ranges of each flat array must cover it, once.
    fn flat_faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut arrays: BTreeMap<&str, Vec<&FlatRecord>> = BTreeMap::new();
        for file in &self.files {
            for flat in &file.flat {
                let end = flat.len.checked_mul(4);
                let end = end.and_then(|bytes| bytes.checked_add(flat.start));
                if end.is_none_or(|end| end > file.bytes) {
                    faults.push(format!(
                        "array `{}` reaches beyond `{}`",
                        flat.name, file.name
                    ));
                }
                arrays.entry(&flat.name).or_default().push(flat);
            }
        }
        for (name, mut ranges) in arrays {
            ranges.sort_by_key(|flat| (flat.offset, flat.len));
            let global_len = ranges[0].global_len;
            let mut covered = 0;
            for flat in ranges {
                if flat.global_len != global_len {
                    faults.push(format!(
                        "array `{name}` has {global_len} and {} elements",
                        flat.global_len
                    ));
                }
                match flat.offset.cmp(&covered) {
                    std::cmp::Ordering::Greater => faults.push(format!(
                        "array `{name}` lacks elements {covered}..{}",
                        flat.offset
                    )),
                    std::cmp::Ordering::Less => faults.push(format!(
                        "array `{name}` has elements {}..{covered} twice",
                        flat.offset
                    )),
                    std::cmp::Ordering::Equal => {}
                }
                covered = covered.max(flat.offset.saturating_add(flat.len));
            }
            if covered != global_len {
                faults.push(format!(
                    "array `{name}` is known up to {covered} of {global_len}"
                ));
            }
        }
        faults
    }

    /// Returns the files of one kind.
    pub fn of_kind(&self, kind: FileKind) -> impl Iterator<Item = &FileRecord> {
        self.files.iter().filter(move |file| file.kind == kind)
    }
}

/// Returns whether a name stays inside its folder and is no name of ours.
pub(crate) fn is_file_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name != "MANIFEST.json"
        && name.chars().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn optim(rank: u32, world_size: u32, offset: u64, len: u64, global_len: u64) -> FileRecord {
        FileRecord {
            name: FileKind::Optim.part(rank, world_size),
            kind: FileKind::Optim,
            bytes: 4 * len,
            crc32c: 0,
            sha256: String::new(),
            tensors: Vec::new(),
            flat: vec![FlatRecord {
                name: "m".into(),
                global_len,
                offset,
                len,
                start: 0,
            }],
        }
    }

    fn manifest(files: Vec<FileRecord>) -> Manifest {
        let head = ManifestHead {
            step: 12,
            updates: 11,
            samples: 48,
            world_size: 2,
            config_hash: "c".into(),
            recipe_hash: "r".into(),
            layout_hash: "l".into(),
            order_version: 1,
            dataset_hashes: BTreeMap::from([("bridge".into(), "h".into())]),
            gpu_hours_spent: 0.5,
            eval_error: None,
            extra: serde_json::json!({"note": [1, 2]}),
        };
        Manifest::new(3, head, files)
    }

    #[test]
    fn round_trips() {
        let before = manifest(vec![optim(0, 2, 0, 5, 8), optim(1, 2, 5, 3, 8)]);
        assert_eq!(before.faults(), Vec::<String>::new());
        let json = serde_json::to_vec_pretty(&before).expect("serialises");
        assert_eq!(Manifest::parse(&json), Ok(before));
    }

    #[test]
    fn faults_are_named() {
        for (files, fault) in [
            (
                vec![optim(0, 2, 0, 8, 8)],
                "optim-00002-of-00002.safetensors` is missing",
            ),
            (
                vec![optim(0, 2, 0, 4, 8), optim(1, 2, 5, 3, 8)],
                "lacks elements 4..5",
            ),
            (
                vec![optim(0, 2, 0, 6, 8), optim(1, 2, 5, 3, 8)],
                "has elements 5..6 twice",
            ),
            (vec![optim(0, 1, 0, 7, 8)], "known up to 7 of 8"),
            (
                vec![optim(0, 1, 0, 8, 8), optim(0, 1, 0, 8, 8)],
                "there twice",
            ),
            (vec![optim(0, u32::MAX, 0, 8, 8)], "is missing"),
        ] {
            let faults = manifest(files).faults().join("; ");
            assert!(faults.contains(fault), "{faults}");
        }
        let mut outside = optim(0, 1, 0, 8, 8);
        outside.name = "../x".into();
        outside.kind = FileKind::Other;
        outside.flat[0].start = u64::MAX;
        let faults = manifest(vec![outside]).faults().join("; ");
        assert!(faults.contains("not a file name") && faults.contains("reaches beyond"));
    }

    #[test]
    fn folders_are_parsed_strictly() {
        let id = CheckpointId {
            step: 12_000,
            generation: 3,
        };
        assert_eq!(id.to_string(), "step-00012000/g3");
        assert_eq!("step-00012000/g3".parse(), Ok(id));
        for bad in [
            "step-12000/g3",
            "step-00012000/g03",
            "step-00012000",
            "../step-00012000/g3",
        ] {
            assert!(bad.parse::<CheckpointId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_manifests_never_panic(at in any::<proptest::sample::Index>(), to in any::<u8>()) {
            let before = manifest(vec![optim(0, 2, 0, 5, 8), optim(1, 2, 5, 3, 8)]);
            let mut json = serde_json::to_vec(&before).expect("serialises");
            let at = at.index(json.len());
            json[at] = to;
            if let Ok(read) = Manifest::parse(&json) {
                prop_assert!(read.faults().is_empty());
            }
            let _ = Manifest::parse(&json[..at]);
        }

        #[test]
        fn hostile_numbers_never_panic(
            numbers in proptest::array::uniform4(any::<u64>()),
            bytes in any::<u64>(),
        ) {
            let mut file = optim(0, 1, 0, 8, 8);
            file.bytes = bytes;
            file.flat[0].global_len = numbers[0];
            file.flat[0].offset = numbers[1];
            file.flat[0].len = numbers[2];
            file.flat[0].start = numbers[3];
            file.tensors = vec![TensorRecord {
                name: "x".into(),
                dtype: Dtype::F64,
                shape: numbers.map(|n| n as usize).into(),
            }];
            let _ = manifest(vec![file]).faults();
        }
    }
}
