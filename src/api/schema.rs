//! The history of a source's schemas.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Query, State},
};
use serde::{Deserialize, Serialize};

use super::{Failure, Reason};
use crate::{
    catalog::{Known, Version},
    change::Timestamp,
    config::glob_matches,
    runtime::Walrace,
    schema::Identity,
};

/// One version of a table, as people and programs read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownVersion {
    /// `schema.table`.
    pub table: String,
    /// From 1.
    pub version: u32,
    /// The offset of the first change that carries it.
    pub offset: u64,
    /// The position of that change: timeline, LSN of the commit, index.
    pub position: String,
    /// When that was committed.
    pub at: Timestamp,
    /// `observed`: the stream carried it from there on; `observed_later`: the oldest change that
    /// was left carried it already.
    pub known: Known,
    /// The replica identity.
    pub identity: Identity,
    /// The columns of the key; empty: the whole row.
    pub key: Vec<String>,
    /// The columns in their order.
    pub columns: Vec<ShownColumn>,
}

/// One column of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownColumn {
    /// Its name.
    pub name: String,
    /// Its type, as SQL has it.
    pub r#type: String,
    /// Whether NULL is allowed; `null` where that is not known.
    pub nullable: Option<bool>,
    /// Part of the key.
    pub key: bool,
    /// Part of the replica identity.
    pub identity: bool,
}

impl From<&Version> for ShownVersion {
    fn from(version: &Version) -> Self {
        let table = &version.table;
        let key = table.key_names();
        let columns = table.columns.iter().map(|column| ShownColumn {
            name: column.name.clone(),
            r#type: column.ty.sql(),
            nullable: column.nullable,
            key: key.contains(&column.name),
            identity: column.identity,
        });
        Self {
            table: table.full_name(),
            version: version.number,
            offset: version.offset,
            position: version.position.to_string(),
            at: version.at,
            known: version.known,
            identity: table.identity,
            columns: columns.collect(),
            key,
        }
    }
}

/// The body of an acceptance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Accept {
    /// The table, `schema.table`.
    pub table: String,
    /// Which version; by default the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Who and why.
    #[serde(flatten)]
    pub reason: Reason,
}

/// What was accepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Accepted {
    /// The version.
    pub version: u32,
    /// Changes that waited for it, or were dead letters for its sake, and are tried again.
    pub retried: u64,
}

/// Accepts a version of a table, whatever it breaks.
pub(super) async fn accept(
    State(walrace): State<Arc<Walrace>>,
    Path(source): Path<String>,
    Json(body): Json<Accept>,
) -> Result<Json<Accepted>, Failure> {
    let which = (body.table.as_str(), body.version);
    let (version, retried) = walrace.accept_schema(&source, which, &body.reason.by()).await?;
    Ok(Json(Accepted { version, retried }))
}

/// Which tables.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Which {
    /// A glob over `schema.table`.
    table: Option<String>,
}

/// Every version of every table, by name and number.
pub(super) async fn versions(
    State(walrace): State<Arc<Walrace>>,
    Path(source): Path<String>,
    Query(which): Query<Which>,
) -> Result<Json<Vec<ShownVersion>>, Failure> {
    let versions = walrace.schema_versions(&source).await?;
    let glob = which.table.as_deref().unwrap_or("*");
    let chosen = versions.iter().filter(|version| glob_matches(glob, &version.table.full_name()));
    Ok(Json(chosen.map(ShownVersion::from).collect()))
}
