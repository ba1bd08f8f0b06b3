//! Parses URLs: `s3://bucket/prefix`, `az://container/prefix`, `gs://bucket/prefix`,
//! `file:///folder` or a plain path, `https://host/folder`, `memory:///name/prefix`.

use std::path::{Component, Path as FsPath, PathBuf};

use object_store::path::Path;
use url::Url;

use crate::error::{Error, Result};

/// Where objects are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// A bucket of an S3 server.
    S3 {
        /// Its name.
        bucket: String,
        /// Key prefix.
        prefix: Path,
    },
    /// A container of the Azure account that the environment names.
    Azure {
        /// Its name.
        container: String,
        /// Key prefix.
        prefix: Path,
    },
    /// A bucket of Google Cloud Storage.
    Google {
        /// Its name.
        bucket: String,
        /// Key prefix.
        prefix: Path,
    },
    /// A folder of a web server.
    Web {
        /// Scheme, host and port.
        base: String,
        /// Path.
        prefix: Path,
    },
    /// A folder.
    File {
        /// Its absolute path, without the leading slash.
        prefix: Path,
    },
    /// A store in this process.
    Memory {
        /// Its name.
        name: String,
        /// Key prefix.
        prefix: Path,
    },
}

impl Location {
    /// Parses a URL or a path.
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidUrl {
            url: url.into(),
            reason,
        };
        if url.is_empty() {
            return Err(invalid(
                "it is empty: write s3://bucket/prefix or a folder".into(),
            ));
        }
        let Some((scheme, rest)) = url.split_once("://") else {
            return folder(FsPath::new(url)).map_err(invalid);
        };
        let parse =
            |text: &str| Path::parse(text.trim_matches('/')).map_err(|e| invalid(e.to_string()));
        match scheme {
            "s3" | "s3a" | "az" | "gs" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                let legal = |c: char| c.is_ascii_alphanumeric() || "-._$".contains(c);
                if bucket.len() < 3 || bucket.len() > 63 || !bucket.chars().all(legal) {
                    return Err(invalid(
                        "the name of a bucket or container has 3 to 63 letters, digits, dots and \
                         hyphens"
                            .into(),
                    ));
                }
                let (bucket, prefix) = (bucket.to_owned(), parse(prefix)?);
                Ok(match scheme {
                    "az" => Self::Azure {
                        container: bucket,
                        prefix,
                    },
                    "gs" => Self::Google { bucket, prefix },
                    _ => Self::S3 { bucket, prefix },
                })
            }
            "http" | "https" => {
                let parsed = Url::parse(url).map_err(|e| invalid(e.to_string()))?;
                if parsed.query().is_some() || !parsed.username().is_empty() {
                    return Err(invalid(
                        "write https://host/folder, without a user, a query or a token".into(),
                    ));
                }
                let path = Path::from_url_path(parsed.path());
                Ok(Self::Web {
                    base: parsed.origin().ascii_serialization(),
                    prefix: path.map_err(|e| invalid(e.to_string()))?,
                })
            }
            "file" => {
                let path = Url::parse(url)
                    .map_err(|e| invalid(e.to_string()))?
                    .to_file_path()
                    .map_err(|()| invalid("write file:///absolute/folder".into()))?;
                folder(&path).map_err(invalid)
            }
            "memory" => {
                let rest = rest.trim_matches('/');
                let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if name.is_empty() {
                    return Err(invalid("write memory:///name".into()));
                }
                Ok(Self::Memory {
                    name: name.into(),
                    prefix: parse(prefix)?,
                })
            }
            other => Err(invalid(format!(
                "`{other}://` is not built in: use s3:// (most others answer to it through \
                 AWS_ENDPOINT_URL), az://, gs://, https://, file:// or a plain path"
            ))),
        }
    }
}

fn folder(path: &FsPath) -> Result<Location, String> {
    let mut absolute = std::path::absolute(path).map_err(|e| e.to_string())?;
    if absolute
        .components()
        .any(|part| part == Component::ParentDir)
    {
        absolute = resolve(&absolute);
    }
    let prefix = Path::from_absolute_path(&absolute).map_err(|e| e.to_string())?;
    Ok(Location::File { prefix })
}

/// Resolves `..` through the file system where the path exists, by name below that.
fn resolve(path: &FsPath) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            resolved = std::fs::canonicalize(&resolved).unwrap_or(resolved);
            resolved.pop();
        } else {
            resolved.push(part);
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(url: &str) -> String {
        match Location::parse(url).expect("parses") {
            Location::S3 { prefix, .. }
            | Location::Azure { prefix, .. }
            | Location::Google { prefix, .. }
            | Location::Web { prefix, .. }
            | Location::File { prefix }
            | Location::Memory { prefix, .. } => prefix.to_string(),
        }
    }

    #[test]
    fn prefixes_have_no_slashes_at_the_ends() {
        assert_eq!(prefix("s3://bucket"), "");
        assert_eq!(prefix("s3://bucket/a/b/"), "a/b");
        assert_eq!(prefix("az://container/a/b/"), "a/b");
        assert_eq!(prefix("gs://bucket/a"), "a");
        assert_eq!(prefix("https://host:8443/a%20b/c/"), "a b/c");
        assert_eq!(prefix("file:///a/b%20c/"), "a/b c");
        assert_eq!(prefix("/a/b c"), "a/b c");
        assert_eq!(prefix("/nonexistent/x/../b"), "nonexistent/b");
        assert_eq!(prefix("memory:///name/a/b"), "a/b");
    }

    #[test]
    fn bad_urls_say_what_to_write() {
        for (url, hint) in [
            ("", "s3://bucket/prefix"),
            ("ftp://bucket/x", "AWS_ENDPOINT_URL"),
            ("gs://b/x", "3 to 63"),
            ("https://host/a?token=secret", "without a user"),
            ("s3://ab/x", "3 to 63"),
            ("s3://bucket/a//b", "empty"),
            ("s3://bucket/../b", "illegal character sequence"),
            ("memory://", "memory:///name"),
            ("file://relative/x", "file:///absolute"),
        ] {
            let error = Location::parse(url).expect_err(url).to_string();
            assert!(error.contains(hint), "{url}: {error}");
        }
    }
}
