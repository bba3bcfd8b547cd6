//! Logging in: passwords, TLS, privileges, and what is said when it fails.

use std::os::unix::fs::chown;

use walrace::{
    error::{Class, Error},
    source::{Known, postgres},
};

use crate::{
    kit::{Cluster, Scratch, Setup, certificates},
    source::{Reading, config},
};

async fn opens(url: &str) {
    if let Err(error) = Reading::open(&config(url), Known::default()).await {
        panic!("{error}");
    }
}

async fn refused(url: &str) -> Error {
    let error = Reading::open(&config(url), Known::default()).await.err().expect("no login");
    assert!(!error.to_string().contains("s3cret"), "it shows the password: {error}");
    error
}

/// A role for each source, because a slot has one reader.
async fn with_role(cluster: &Cluster, method: &str) -> String {
    cluster
        .sql(&format!(
            "set password_encryption = '{}'; create role app login replication password 's3cret@1';
             grant create on database postgres to app",
            if method == "md5" { "md5" } else { "scram-sha-256" }
        ))
        .await;
    cluster.set_hba(&format!("host all all 127.0.0.1/32 {method}"));
    cluster.reload().await;
    format!("postgres://app:s3cret%401@127.0.0.1:{}/postgres", cluster.port())
}

#[tokio::test]
async fn each_password_method_lets_the_right_password_in_and_names_the_wrong_one() {
    for method in ["scram-sha-256", "md5", "password"] {
        let cluster = Cluster::start().await;
        let url = with_role(&cluster, method).await;
        let wrong = refused(&url.replace("s3cret", "s3cretX")).await;
        assert_eq!(wrong.class(), Class::Config, "{method}: {wrong}");
        assert!(wrong.to_string().contains("28P01"), "{method}: {wrong}");
        let missing = refused(&url.replace(":s3cret%401", "")).await;
        assert_eq!(missing.class(), Class::Config, "{method}: {missing}");
        opens(&url).await;
    }
}

#[tokio::test]
async fn a_missing_privilege_or_database_says_what_to_grant() {
    let cluster = Cluster::start().await;
    let url = with_role(&cluster, "scram-sha-256").await;
    let error = refused(&url.replace("/postgres", "/nowhere")).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("3D000"), "{error}");
    cluster.sql("create table t (id int primary key)").await;
    let error = refused(&url).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("CREATE PUBLICATION \"walrace_app\" FOR TABLE"), "{error}");
    cluster.sql("alter role app noreplication").await;
    let error = refused(&url).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("REPLICATION"), "{error}");
}

#[tokio::test]
async fn nobody_listening_is_retried() {
    let error = refused("postgres://u:s3cret@127.0.0.1:1/d").await;
    assert_eq!(error.class(), Class::Retry, "{error}");
}

pub(crate) async fn with_tls(name: &str) -> (Cluster, Scratch, String) {
    let scratch = Scratch::new("tls");
    certificates(scratch.path(), name);
    let mut cluster = Cluster::with(Setup::default()).await;
    for (from, to) in [("server.key", "server.key"), ("server.pem", "server.crt")] {
        let to = cluster.data_dir().join(to);
        std::fs::copy(scratch.path().join(from), &to).unwrap();
        let owner = std::fs::metadata(cluster.data_dir()).unwrap();
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    cluster.configure("ssl = on");
    cluster.restart(crate::kit::Stop::Fast).await;
    let url = with_role(&cluster, "scram-sha-256").await;
    cluster.set_hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    cluster.reload().await;
    let root = scratch.path().join("ca.pem").display().to_string();
    (cluster, scratch, format!("{url}?sslrootcert={root}&sslmode="))
}

#[tokio::test]
async fn verify_full_wants_the_authority_and_the_name_and_binds_scram_to_the_channel() {
    let (cluster, scratch, url) = with_tls("IP:127.0.0.1").await;
    let encrypted = async |mode: &str| {
        let reading = Reading::open(&config(&format!("{url}{mode}")), Known::default()).await;
        let reading = reading.unwrap_or_else(|error| panic!("{mode}: {error}"));
        let ssl = "select bool_and(ssl) from pg_stat_ssl join pg_stat_replication using (pid)";
        assert_eq!(cluster.value(ssl).await, true, "{mode}");
        drop(reading);
        let free = async || {
            let active = "select count(*) from pg_replication_slots where active";
            (cluster.value(active).await == 0).then_some(())
        };
        crate::kit::wait_for(crate::source::PATIENCE, free, || "not freed".into()).await;
    };
    for mode in ["verify-full", "verify-ca", "require", "prefer"] {
        encrypted(mode).await;
    }
    let plain = refused(&format!("{url}disable")).await;
    assert_eq!(plain.class(), Class::Config, "{plain}");
    certificates(scratch.path(), "IP:127.0.0.1"); // another authority of the same name
    for mode in ["verify-full", "verify-ca"] {
        let foreign = refused(&format!("{url}{mode}")).await;
        assert_eq!(foreign.class(), Class::Config, "{foreign}");
        assert!(foreign.to_string().contains("certificate is not accepted"), "{foreign}");
    }
}

#[tokio::test]
async fn the_wrong_name_passes_verify_ca_and_not_verify_full() {
    let (_cluster, _scratch, url) = with_tls("DNS:db.example").await;
    let error = refused(&format!("{url}verify-full")).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    opens(&format!("{url}verify-ca")).await;
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let cluster = Cluster::start().await;
    let error = refused(&format!("{}?sslmode=require", cluster.url())).await;
    assert_eq!(error.class(), Class::Config, "{error}");
    assert!(error.to_string().contains("does not offer TLS"), "{error}");
    opens(&cluster.url()).await;
}

#[tokio::test]
async fn preflight_names_what_is_wrong_with_its_sql() {
    use postgres::Level;
    let settings = "wal_level = replica".into();
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    cluster.sql("create table owned (id int primary key); create table bare (id int)").await;
    let url = with_role(&cluster, "scram-sha-256").await;
    cluster.sql("alter role app noreplication; revoke create on database postgres from app").await;
    let findings = postgres::preflight("app", &config(&url)).await;
    let find = |subject: &str, level: Level| {
        let found = findings.iter().find(|f| f.subject == subject && f.level == level);
        found.unwrap_or_else(|| panic!("no {level:?} about {subject}: {findings:#?}"))
    };
    let sql = |subject, level| find(subject, level).sql.clone().unwrap();
    assert_eq!(sql("wal_level", Level::Error), "ALTER SYSTEM SET wal_level = logical");
    assert_eq!(sql("privileges", Level::Error), "GRANT CREATE ON DATABASE \"postgres\" TO \"app\"");
    assert_eq!(sql("public.owned", Level::Error), "GRANT \"postgres\" TO \"app\"");
    assert!(sql("public.bare", Level::Warning).contains("REPLICA IDENTITY FULL"));
    find("replication", Level::Error);
    find("tls", Level::Warning);
    find("version", Level::Ok);
    let count = cluster.value("select count(*) from pg_publication").await;
    assert_eq!(count, 0, "looking changes nothing");
}
