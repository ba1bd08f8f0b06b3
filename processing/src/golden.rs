//! Where tests find the golden vectors.

use std::path::PathBuf;

/// Reads a golden file; `POLLEN_GOLDEN_DIR` overrides the folder.
pub(crate) fn read(name: &str) -> Vec<u8> {
    let folder = std::env::var_os("POLLEN_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden"),
        PathBuf::from,
    );
    let path = folder.join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}
