//! What a conversion leaves at its destination so that it can go on after a kill.
//!
//! ```text
//! conversion/plan.json          identity of source and arguments, features of the dataset
//! conversion/file-000000.json   one record a finished data file, written after it
//! meta/conversion.json          at the end, in place of the above: where the dataset came from
//! ```

use pollen_storage::Storage;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::metadata::{INFO, to_json};
use crate::reader::get_if_present;
use crate::schema::DatasetSpec;
use crate::source::SourceKind;
use crate::writer::{Dropped, FileRecord};

const PLAN: &str = "conversion/plan.json";
const CONVERSION: &str = "meta/conversion.json";
const VERSION: u32 = 1;

/// What must be the same for a conversion to go on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    version: u32,
    /// Hash of the source's fingerprint and of all that changes the result.
    pub(crate) identity: String,
    pub(crate) spec: DatasetSpec,
}

/// Where a dataset came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Conversion {
    pub(crate) version: u32,
    pub(crate) identity: String,
    pub(crate) kind: SourceKind,
    pub(crate) source: String,
    pub(crate) episodes: u64,
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    pub(crate) dropped: Vec<Dropped>,
    pub(crate) notes: Vec<String>,
    pub(crate) files: Vec<StoredFile>,
}

/// A data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredFile {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// What a destination holds.
pub(crate) enum Destination {
    Empty,
    Unfinished(Box<Plan>, Vec<FileRecord>),
    Finished(Box<Conversion>),
}

impl Destination {
    /// Looks at a destination; one that holds something else is refused.
    pub(crate) async fn look(storage: &Storage, identity: &str) -> Result<Self> {
        let url = storage.url();
        let other = |what: &str| {
            Error::arguments(format!(
                "{url} holds {what}; delete it or give another destination"
            ))
        };
        if let Some(text) = get_if_present(storage, CONVERSION).await? {
            let conversion: Conversion = parse(storage, CONVERSION, &text)?;
            return if conversion.identity == identity {
                Ok(Self::Finished(Box::new(conversion)))
            } else {
                Err(other(
                    "a dataset converted from another source or otherwise",
                ))
            };
        }
        if let Some(text) = get_if_present(storage, PLAN).await? {
            let plan: Plan = parse(storage, PLAN, &text)?;
            if (plan.version, plan.identity.as_str()) != (VERSION, identity) {
                return Err(other(
                    "an unfinished conversion with another source or arguments",
                ));
            }
            let records = records(storage).await?;
            return Ok(Self::Unfinished(Box::new(plan), records));
        }
        match get_if_present(storage, INFO).await? {
            Some(_) => Err(other("a dataset")),
            None => Ok(Self::Empty),
        }
    }
}

/// Notes the start of a conversion.
pub(crate) async fn start(storage: &Storage, identity: &str, spec: &DatasetSpec) -> Result<()> {
    let plan = Plan {
        version: VERSION,
        identity: identity.into(),
        spec: spec.clone(),
    };
    Ok(storage.put(PLAN, to_json(&plan).into()).await?)
}

/// Notes a finished data file.
pub(crate) async fn record(storage: &Storage, file: &FileRecord) -> Result<()> {
    let path = format!("conversion/file-{:06}.json", file.index);
    Ok(storage.put(&path, to_json(file).into()).await?)
}

/// Notes the end and removes the notes made on the way.
pub(crate) async fn finish(storage: &Storage, conversion: &Conversion) -> Result<()> {
    storage.put(CONVERSION, to_json(conversion).into()).await?;
    clean(storage).await
}

/// Removes the notes made on the way.
pub(crate) async fn clean(storage: &Storage) -> Result<()> {
    for object in storage.list("conversion").await? {
        storage.delete(&object.path).await?;
    }
    Ok(())
}

/// Returns the records of the files that are all there, in order.
async fn records(storage: &Storage) -> Result<Vec<FileRecord>> {
    let mut records: Vec<FileRecord> = Vec::new();
    for object in storage.list("conversion/").await? {
        if object.path == PLAN {
            continue;
        }
        let text = storage.get(&object.path).await?;
        let record: FileRecord = parse(storage, &object.path, &text)?;
        let size = match storage.head(&record.path).await {
            Ok(size) => size,
            Err(error) if error.is_not_found() => 0,
            Err(error) => return Err(error.into()),
        };
        // A gap means that somebody removed something: make the rest again.
        if record.index != records.len() as u64 || size != record.bytes {
            break;
        }
        records.push(record);
    }
    Ok(records)
}

fn parse<T: for<'de> Deserialize<'de>>(storage: &Storage, path: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|e| {
        let url = storage.url();
        Error::invalid(
            format!("{url}/{path}"),
            format!("{e}; delete the destination"),
        )
    })
}
