//! Opens Azure containers, Google buckets and folders of web servers.

use std::collections::HashMap;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;

use crate::backend::{Backend, Kind, Service, client_options, no_retries};
use crate::config::StorageConfig;
use crate::error::{Error, Result};

/// Opens a container; account and credentials come from the `AZURE_*` variables.
pub(crate) fn azure(
    container: &str,
    config: &StorageConfig,
    variables: &HashMap<String, String>,
) -> Result<Backend> {
    let url = format!("az://{container}");
    let mut builder = MicrosoftAzureBuilder::new();
    for (key, value) in keys::<AzureConfigKey>("AZURE_", variables) {
        builder = builder.with_config(key, value);
    }
    let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
    let account = builder.get_config_value(&AzureConfigKey::AccountName);
    let store = builder
        .with_container_name(container)
        .with_client_options(client_options(config, endpoint.as_deref()))
        .with_retry(no_retries())
        .build()
        .map_err(|error| {
            invalid(
                &url,
                &error,
                "the AZURE_* variables, AZURE_STORAGE_ACCOUNT_NAME first",
            )
        })?;
    let endpoint = endpoint.unwrap_or_else(|| match account {
        Some(account) => format!("https://{account}.blob.core.windows.net"),
        None => "the emulator".into(),
    });
    let store = Arc::new(store);
    Ok(Backend {
        store: Arc::clone(&store) as Arc<dyn ObjectStore>,
        parts: Some(store),
        kind: Kind::Bucket {
            service: Service::Azure,
            bucket: container.into(),
            endpoint,
        },
        base: url,
    })
}

/// Opens a bucket; credentials come from the `GOOGLE_*` variables or from the machine.
pub(crate) fn google(
    bucket: &str,
    config: &StorageConfig,
    variables: &HashMap<String, String>,
) -> Result<Backend> {
    let url = format!("gs://{bucket}");
    let mut builder = GoogleCloudStorageBuilder::new();
    for (key, value) in keys::<GoogleConfigKey>("GOOGLE_", variables) {
        builder = builder.with_config(key, value);
    }
    let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
    let store = builder
        .with_bucket_name(bucket)
        .with_client_options(client_options(config, endpoint.as_deref()))
        .with_retry(no_retries())
        .build()
        .map_err(|error| invalid(&url, &error, "GOOGLE_APPLICATION_CREDENTIALS"))?;
    let store = Arc::new(store);
    Ok(Backend {
        store: Arc::clone(&store) as Arc<dyn ObjectStore>,
        parts: Some(store),
        kind: Kind::Bucket {
            service: Service::Google,
            bucket: bucket.into(),
            endpoint: endpoint.unwrap_or_else(|| "https://storage.googleapis.com".into()),
        },
        base: url,
    })
}

/// Opens a web server, to read only; `base` is its URL without a path.
pub(crate) fn web(base: &str, config: &StorageConfig) -> Result<Backend> {
    let store = HttpBuilder::new()
        .with_url(base)
        .with_client_options(client_options(config, Some(base)))
        .with_retry(no_retries())
        .build()
        .map_err(|error| invalid(base, &error, "the URL"))?;
    Ok(Backend {
        store: Arc::new(store),
        parts: None,
        base: base.into(),
        kind: Kind::Web,
    })
}

/// Returns the variables that the client knows.
fn keys<'a, K: std::str::FromStr + 'a>(
    prefix: &'a str,
    variables: &'a HashMap<String, String>,
) -> impl Iterator<Item = (K, &'a String)> {
    let ours = variables
        .iter()
        .filter(move |(name, value)| name.starts_with(prefix) && !value.is_empty());
    ours.filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value)))
}

fn invalid(url: &str, error: &object_store::Error, check: &str) -> Error {
    Error::InvalidUrl {
        url: url.into(),
        reason: format!("{error}: check {check}"),
    }
}
