//! Servers that are made of another: standbys, copies, recoveries, upgrades.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::cluster::{Cluster, Snapshot, Stop, as_postgres, copy, run};

impl Cluster {
    /// A hot standby of this server, which is stopped for a moment to be copied.
    pub(crate) async fn standby(&mut self) -> Self {
        self.standby_with("").await
    }

    /// A hot standby with further settings.
    pub(crate) async fn standby_with(&mut self, settings: &str) -> Self {
        let mut standby = self.stopped_copy().await;
        let primary = self.primary_conninfo();
        standby.configure(&format!("primary_conninfo = '{primary}'\nhot_standby = on"));
        standby.configure(settings);
        let signal = standby.data_dir().join("standby.signal");
        run(as_postgres("touch").arg(signal));
        standby.up().await;
        standby
    }

    /// The connection of a standby to this server, as it synchronises slots through it.
    pub(crate) fn primary_conninfo(&self) -> String {
        let (socket, port) = (self.socket_dir().display().to_string(), self.port);
        format!("host={socket} port={port} user=postgres dbname=postgres")
    }

    /// A second server that begins as this one is now, with its identity.
    pub(crate) async fn copy(&mut self) -> Self {
        let mut copy = self.stopped_copy().await;
        copy.up().await;
        copy
    }

    async fn stopped_copy(&mut self) -> Self {
        let other = Self::stopped(self.bin.clone());
        self.down(Stop::Fast);
        copy(&self.data_dir(), &other.data_dir());
        self.up().await;
        let socket_dir = other.socket_dir().display().to_string();
        other.configure(&format!("unix_socket_directories = '{socket_dir}'"));
        other.configure(&format!("port = {}", other.port));
        other
    }

    /// Recovers a snapshot from an archive of this server's log up to `target`, such as
    /// `recovery_target_name = 'x'`: the server goes on from there on a new timeline.
    pub(crate) async fn recover(&mut self, snapshot: &Snapshot, archive: &Path, target: &str) {
        self.down(Stop::Immediate);
        fs::remove_dir_all(self.data_dir()).expect("the old data goes");
        copy(&snapshot.0, &self.data_dir());
        let archive = archive.display();
        self.configure(&format!("restore_command = 'cp {archive}/%f %p'\n{target}"));
        self.configure("recovery_target_action = 'promote'");
        run(as_postgres("touch").arg(self.data_dir().join("recovery.signal")));
        self.up().await;
    }

    /// A folder below this server's that it may write, such as for an archive.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        let path = self.scratch.path().join(name);
        run(as_postgres("mkdir").arg("-p").arg(&path));
        path
    }

    /// Upgrades this server by pg_upgrade into `other`, which was made anew and is empty; both are
    /// stopped for it, and `other` runs afterwards.
    pub(crate) async fn upgrade_into(&mut self, other: &mut Self) {
        self.down(Stop::Fast);
        other.down(Stop::Fast);
        let work = other.folder("upgrade");
        let mut command = as_postgres(other.bin.join("pg_upgrade"));
        command.current_dir(&work).arg("--no-sync").args(["-U", "postgres"]);
        command.arg("-b").arg(&self.bin).arg("-B").arg(&other.bin);
        command.arg("-d").arg(self.data_dir()).arg("-D").arg(other.data_dir());
        command.arg("-p").arg(self.port.to_string()).arg("-P").arg(other.port.to_string());
        run(&mut command);
        other.up().await;
    }

    /// Whether this installation can upgrade.
    pub(crate) fn can_upgrade(&self) -> bool {
        self.bin.join("pg_upgrade").exists()
    }

    /// Ends the recovery of a standby: it becomes a primary on a new timeline.
    pub(crate) async fn promote(&self) {
        self.sql("select pg_promote(true, 60)").await;
    }
}
