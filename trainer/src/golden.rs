//! Reads the golden vectors of the reference implementation (tests only).

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

pub(crate) struct Golden {
    bytes: Vec<u8>,
    pub(crate) config: Value,
    pub(crate) tolerance: Value,
}

impl Golden {
    /// Opens `<name>.safetensors` in `POLLEN_GOLDEN_DIR`, or in the repository's `tests/golden`.
    pub(crate) fn open(name: &str) -> Self {
        let dir = std::env::var_os("POLLEN_GOLDEN_DIR").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")),
            PathBuf::from,
        );
        let path = dir.join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let metadata = header.metadata().as_ref().expect("metadata");
        let json = |key: &str| serde_json::from_str(&metadata[key]).expect("JSON");
        Self {
            config: json("config"),
            tolerance: json("tolerance"),
            bytes,
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("read before")
    }

    /// Returns the names below `prefix`, without it, sorted.
    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        let tensors = self.tensors();
        let mut names: Vec<String> = tensors
            .names()
            .iter()
            .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    fn values<const N: usize, T>(&self, name: &str, from: fn([u8; N]) -> T) -> Vec<T> {
        let tensors = self.tensors();
        let view = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            view.data().len(),
            N * view.shape().iter().product::<usize>(),
            "{name}: dtype"
        );
        view.data()
            .as_chunks::<N>()
            .0
            .iter()
            .map(|chunk| from(*chunk))
            .collect()
    }

    pub(crate) fn f32s(&self, name: &str) -> Vec<f32> {
        self.values(name, f32::from_le_bytes)
    }

    pub(crate) fn f64s(&self, name: &str) -> Vec<f64> {
        self.values(name, f64::from_le_bytes)
    }

    pub(crate) fn i64s(&self, name: &str) -> Vec<i64> {
        self.values(name, i64::from_le_bytes)
    }
}
