//! A bucket, or a local folder: requests with a limit of time, and what their failures mean.

use std::{
    error::Error as _,
    fmt::Write,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
    time::Duration,
};

use ::object_store::{
    ClientOptions, ObjectStore, ObjectStoreExt, PutMode, RetryConfig, aws::AmazonS3Builder,
    local::LocalFileSystem, path::Path,
};
use bytes::Bytes;
use futures_util::TryStreamExt;
use url::Url;

use crate::{
    config,
    error::{Class, Classify, Error, Result},
    sink::http,
};

/// Of a store's own words this much is shown.
const REASON_BYTES_MAX: usize = 600;

type Failure = ::object_store::Error;

/// Where objects are.
#[derive(Debug)]
pub(super) struct Bucket {
    place: Place,
    /// Below it is everything of this sink.
    prefix: Path,
    /// What errors may show.
    name: String,
    timeout: Duration,
    secrets: Vec<String>,
}

#[derive(Debug)]
enum Place {
    S3(Arc<dyn ObjectStore>),
    /// The folder, and once it is there the store in it.
    Folder(PathBuf, Option<Arc<dyn ObjectStore>>),
}

impl Bucket {
    /// Checks the options; connects to nothing.
    pub(super) fn new(options: &config::ObjectStore) -> Result<Self> {
        // Fails where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let wrong = || {
            Error::config("`url` is no address of objects")
                .remedy("write s3://bucket/prefix or file:///folder")
        };
        let url = Url::parse(options.url.expose()).map_err(|_| wrong())?;
        let timeout = Duration::from_millis(options.timeout_ms);
        let (place, prefix, name) = match (url.scheme(), url.host_str()) {
            ("s3", Some(bucket)) => {
                let prefix = Path::from_url_path(url.path()).map_err(|_| wrong())?;
                let store = s3(options, bucket, timeout)?;
                (Place::S3(store), prefix, format!("bucket {bucket}"))
            }
            ("file", None) => {
                let folder = url.to_file_path().map_err(|()| wrong())?;
                let name = folder.display().to_string();
                (Place::Folder(folder, None), Path::default(), name)
            }
            _ => return Err(wrong()),
        };
        let secret = options.secret_access_key.as_ref().map(|key| key.expose().to_owned());
        let secrets = secret.into_iter().chain(options.access_key_id.clone());
        let secrets = secrets.filter(|text| !text.is_empty()).collect();
        Ok(Self { place, prefix, name, timeout, secrets })
    }

    /// What errors may show of the address.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the folder of a local store where `create`; `false`: it is not there.
    pub(super) fn connect(&mut self, create: bool) -> Result<bool> {
        let Place::Folder(folder, store) = &mut self.place else { return Ok(true) };
        if store.is_none() {
            if create {
                std::fs::create_dir_all(&*folder).map_err(|cause| no_folder(folder, cause))?;
            } else if !folder.exists() {
                return Ok(false);
            }
            *store = Some(local(folder)?);
        }
        Ok(true)
    }

    /// Writes an object that must not be there yet; `false`: it is.
    pub(super) async fn create(&self, name: &str, bytes: Bytes) -> Result<bool> {
        let (store, path) = self.at(name)?;
        let put = store.put_opts(&path, bytes.into(), PutMode::Create.into());
        match self.limit(put).await? {
            Ok(_) => Ok(true),
            Err(Failure::AlreadyExists { .. } | Failure::Precondition { .. }) => Ok(false),
            Err(cause) => Err(self.failed("write", &path, &cause)),
        }
    }

    /// The object's bytes, if it is there.
    pub(super) async fn get(&self, name: &str) -> Result<Option<Bytes>> {
        let (store, path) = self.at(name)?;
        let get = async { store.get(&path).await?.bytes().await };
        match self.limit(get).await? {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Failure::NotFound { .. }) => Ok(None),
            Err(cause) => Err(self.failed("read", &path, &cause)),
        }
    }

    /// Removes an object; one that is not there is none.
    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        let (store, path) = self.at(name)?;
        match self.limit(store.delete(&path)).await? {
            Ok(()) | Err(Failure::NotFound { .. }) => Ok(()),
            Err(cause) => Err(self.failed("delete", &path, &cause)),
        }
    }

    /// The last part of the name of each object right in a folder.
    pub(super) async fn list(&self, folder: &str) -> Result<Vec<String>> {
        let (store, path) = self.at(folder)?;
        let list = store.list(Some(&path)).map_ok(|meta| meta.location).try_collect::<Vec<_>>();
        let found = self.limit(list).await?;
        let found = found.map_err(|cause| self.failed("list", &path, &cause))?;
        let own = |location: &Path| {
            let mut rest = location.prefix_match(&path)?;
            let name = rest.next()?.as_ref().to_owned();
            rest.next().is_none().then_some(name)
        };
        Ok(found.iter().filter_map(own).collect())
    }

    fn at(&self, name: &str) -> Result<(&Arc<dyn ObjectStore>, Path)> {
        let store = match &self.place {
            Place::S3(store) | Place::Folder(_, Some(store)) => store,
            Place::Folder(_, None) => return Err(Error::bug("the folder is not open")),
        };
        let name = Path::from(name);
        let parts = self.prefix.parts().chain(name.parts());
        Ok((store, Path::from_iter(parts)))
    }

    async fn limit<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        tokio::time::timeout(self.timeout, work).await.map_err(|_| {
            let timeout_ms = self.timeout.as_millis();
            Error::retry(format!("{} did not answer within {timeout_ms} ms", self.name))
        })
    }

    fn failed(&self, verb: &str, path: &Path, cause: &Failure) -> Error {
        let mut reason = cause.to_string();
        let mut source = cause.source();
        while let Some(error) = source {
            let text = error.to_string();
            if !reason.contains(&text) {
                let _ = write!(reason, ": {text}");
            }
            source = error.source();
        }
        for secret in &self.secrets {
            reason = reason.replace(secret, "***");
        }
        http::cut(&mut reason, REASON_BYTES_MAX);
        let reason = reason.replace(char::is_control, " ");
        let error =
            |class| Error::new(class, format!("cannot {verb} {path} of {}: {reason}", self.name));
        match cause {
            Failure::PermissionDenied { .. } | Failure::Unauthenticated { .. } => login(error),
            Failure::NotFound { .. } => bucket(error),
            Failure::InvalidPath { .. } => error(Class::Data),
            Failure::NotImplemented { .. } | Failure::NotSupported { .. } => error(Class::Config)
                .remedy("the store must know conditional writes (If-None-Match)"),
            // Of a list the library tells the status in words only.
            _ if is_answered(&reason, &[401, 403]) => login(error),
            _ if is_answered(&reason, &[301, 404]) => bucket(error),
            _ if is_denied(cause) => {
                error(Class::Config).remedy("let the user that runs walrace write in this folder")
            }
            _ => error(Class::Retry),
        }
    }
}

fn login(error: impl Fn(Class) -> Error) -> Error {
    error(Class::Config).remedy(
        "check `access_key_id` and `secret_access_key`; the login has to read, write, list and \
         delete below the prefix",
    )
}

fn bucket(error: impl Fn(Class) -> Error) -> Error {
    error(Class::Config).remedy("create the bucket, or mend `url` and `region`")
}

fn is_answered(reason: &str, statuses: &[u16]) -> bool {
    statuses.iter().any(|status| reason.contains(&format!("status code: {status}")))
}

/// Whether the file system denied it.
fn is_denied(cause: &Failure) -> bool {
    let mut source = cause.source();
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::PermissionDenied;
        }
        source = error.source();
    }
    false
}

fn no_folder(folder: &FilePath, cause: std::io::Error) -> Error {
    use std::io::ErrorKind::{AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem};
    let class = match cause.kind() {
        AlreadyExists | NotADirectory | PermissionDenied | ReadOnlyFilesystem => Class::Config,
        _ => Class::Retry,
    };
    Error::new(class, format!("cannot create the folder {}", folder.display())).caused_by(cause)
}

fn local(folder: &FilePath) -> Result<Arc<dyn ObjectStore>> {
    let store = LocalFileSystem::new_with_prefix(folder)
        .class(Class::Config, || format!("cannot open the folder {}", folder.display()))?;
    Ok(Arc::new(store.with_fsync(true)))
}

fn s3(
    options: &config::ObjectStore,
    bucket: &str,
    timeout: Duration,
) -> Result<Arc<dyn ObjectStore>> {
    // The loop that calls the sink waits and tries again; a second one below it would hide that.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let client = ClientOptions::new()
        .with_timeout(timeout)
        .with_connect_timeout(timeout)
        .with_allow_http(options.allow_http);
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(&options.region)
        .with_retry(retry)
        .with_client_options(client);
    if let Some(endpoint) = &options.endpoint {
        if endpoint.starts_with("http://") && !options.allow_http {
            return Err(Error::config("`endpoint` is plain HTTP")
                .remedy("use https, or set `allow_http = true` where nobody can listen"));
        }
        builder = builder.with_endpoint(endpoint);
    }
    match (&options.access_key_id, &options.secret_access_key) {
        (Some(id), Some(secret)) => {
            builder = builder.with_access_key_id(id).with_secret_access_key(secret.expose());
        }
        (None, None) => {}
        _ => {
            return Err(Error::config("`access_key_id` and `secret_access_key` belong together"));
        }
    }
    let store = builder.build().class(Class::Config, || "the options of S3 do not fit together")?;
    Ok(Arc::new(store))
}
