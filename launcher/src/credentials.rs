//! Keys of the demo's object server, made once per data folder.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::atomic_file;
use crate::error::Error;

/// An S3 key pair; its secret half is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Credentials {
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Returns the folder's keys; makes them at the first call.
    pub(crate) fn of_folder(root: &Path) -> Result<Self, Error> {
        let path = root.join("credentials.json");
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| Error::Damaged { path, source })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let keys = Self {
                    access_key_id: random_hex(10)?,
                    secret_access_key: random_hex(20)?,
                };
                let text = serde_json::to_vec_pretty(&keys).expect("strings have a JSON form");
                atomic_file::replace(&path, &text, 0o600)?;
                Ok(keys)
            }
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }
}

fn random_hex(bytes: usize) -> Result<String, Error> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random)
        .map_err(|error| Error::system("draw random numbers")(std::io::Error::other(error)))?;
    let digits = random.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    Ok(digits
        .filter_map(|digit| char::from_digit(u32::from(digit), 16))
        .collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_and_only_the_owner_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Credentials::of_folder(folder.path()).unwrap();
        assert_eq!(keys, Credentials::of_folder(folder.path()).unwrap());
        assert_eq!(keys.secret_access_key.len(), 40);
        let path = folder.path().join("credentials.json");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(keys, Credentials::of_folder(other.path()).unwrap());
    }

    #[test]
    fn the_secret_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Credentials::of_folder(folder.path()).unwrap();
        assert!(!format!("{keys:?}").contains(&keys.secret_access_key));
    }
}
