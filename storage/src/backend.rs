//! Opens the store a URL names.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};

use crate::clouds;
use crate::config::StorageConfig;
use crate::error::{Error, Result};
use crate::location::Location;

/// What kind of store it is, where that matters.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// A bucket, or a container, at an endpoint.
    Bucket {
        service: Service,
        bucket: String,
        endpoint: String,
    },
    /// Folders.
    File,
    /// A web server: neither writes nor listings.
    Web,
    /// Anything else.
    Other,
}

/// Whose bucket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    S3,
    Azure,
    Google,
}

/// An open store and what its trait object hides.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) store: Arc<dyn ObjectStore>,
    /// Uploads in parts that can be sent again one by one, where the store has them.
    pub(crate) parts: Option<Arc<dyn Parts>>,
    /// URL of the store's root, without a slash at the end.
    pub(crate) base: String,
    pub(crate) kind: Kind,
}

/// [`MultipartStore`] with the `Debug` that the handle derives.
pub(crate) trait Parts: MultipartStore + std::fmt::Debug {}
impl<T: MultipartStore + std::fmt::Debug> Parts for T {}

static MEMORY: LazyLock<Mutex<HashMap<String, Arc<InMemory>>>> = LazyLock::new(Mutex::default);

impl Backend {
    /// Opens a location; `variables` are the environment's, for credentials and endpoints.
    pub(crate) fn open(
        location: Location,
        config: &StorageConfig,
        variables: &HashMap<String, String>,
    ) -> Result<(Self, Path)> {
        match location {
            Location::S3 { bucket, prefix } => Ok((s3(&bucket, config, variables)?, prefix)),
            Location::Azure { container, prefix } => {
                Ok((clouds::azure(&container, config, variables)?, prefix))
            }
            Location::Google { bucket, prefix } => {
                Ok((clouds::google(&bucket, config, variables)?, prefix))
            }
            Location::Web { base, prefix } => Ok((clouds::web(&base, config)?, prefix)),
            Location::File { prefix } => {
                // The root is `/`, so that a folder need not exist to be named.
                let store = LocalFileSystem::new().with_fsync(true);
                let backend = Self {
                    store: Arc::new(store),
                    parts: None,
                    base: "file://".into(),
                    kind: Kind::File,
                };
                Ok((backend, prefix))
            }
            Location::Memory { name, prefix } => {
                let mut stores = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
                let store = Arc::clone(stores.entry(name.clone()).or_default());
                let backend = Self {
                    store: Arc::clone(&store) as Arc<dyn ObjectStore>,
                    parts: Some(store),
                    base: format!("memory:///{name}"),
                    kind: Kind::Other,
                };
                Ok((backend, prefix))
            }
        }
    }
}

fn s3(
    bucket: &str,
    config: &StorageConfig,
    variables: &HashMap<String, String>,
) -> Result<Backend> {
    let url = format!("s3://{bucket}");
    let invalid = |reason: String| Error::InvalidUrl {
        url: url.clone(),
        reason,
    };
    let mut builder = AmazonS3Builder::new();
    for (name, value) in variables {
        if let Some(key) = name
            .starts_with("AWS_")
            .then(|| name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().ok())
            .flatten()
        {
            builder = builder.with_config(key, value);
        }
    }
    let has = |name: &str| variables.get(name).is_some_and(|value| !value.is_empty());
    let get = |key: AmazonS3ConfigKey| builder.get_config_value(&key);
    let endpoint = get(AmazonS3ConfigKey::S3Endpoint).or_else(|| get(AmazonS3ConfigKey::Endpoint));
    let elsewhere = [
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ];
    if endpoint.is_some() && !has("AWS_ACCESS_KEY_ID") && !elsewhere.into_iter().any(has) {
        return Err(invalid(
            "AWS_ENDPOINT_URL is set but there are no credentials: set AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY"
                .into(),
        ));
    }
    if has("AWS_ACCESS_KEY_ID") != has("AWS_SECRET_ACCESS_KEY") {
        return Err(invalid(
            "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither".into(),
        ));
    }
    let region = get(AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".into());
    let store = builder
        .with_bucket_name(bucket)
        .with_region(&region)
        .with_client_options(client_options(config, endpoint.as_deref()))
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(no_retries())
        .build()
        .map_err(|error| invalid(format!("{error}: check the AWS_* variables")))?;
    let store = Arc::new(store);
    Ok(Backend {
        store: Arc::clone(&store) as Arc<dyn ObjectStore>,
        parts: Some(store),
        base: url,
        kind: Kind::Bucket {
            service: Service::S3,
            bucket: bucket.into(),
            endpoint: endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com")),
        },
    })
}

/// Returns the client's settings for an endpoint.
pub(crate) fn client_options(config: &StorageConfig, endpoint: Option<&str>) -> ClientOptions {
    // The time limit is ours, around each attempt: it knows the size of the body.
    ClientOptions::new()
        .with_allow_http(endpoint.is_some_and(|url| url.starts_with("http://")))
        .with_connect_timeout(config.request_timeout.min(Duration::from_secs(5)))
        .with_timeout_disabled()
}

/// Retries are ours: counted, reported, and never of a conditional write.
pub(crate) fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}
