//! A file system of a few MiB, which is really full when it is.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Mounts, says so, and unmounts once the test lets go of its end of the pipe, in whatever way it
/// ends. What is open by then keeps what it has.
const HOLDER: &str = r#"
mount -t tmpfs -o "size=$2m,mode=0700" tmpfs "$1" || exit 1
echo mounted
cat >/dev/null
umount -l "$1"
"#;

/// A tmpfs, mounted for as long as this lives. Its blocks are of 4 KiB, and there is no other room
/// to fall back to, not even for root.
#[derive(Debug)]
pub(crate) struct SmallDisk {
    path: PathBuf,
    holder: Child,
}

impl SmallDisk {
    /// Mounts `mib` MiB at `path`, which only root may. A namespace of one's own is no way out:
    /// SQLite resolves links, and would put the catalog outside of what is mounted there.
    pub(crate) fn mount(path: PathBuf, mib: u32) -> Self {
        fs::create_dir_all(&path).expect("a mount point");
        let mut holder = Command::new("sh")
            .args(["-c", HOLDER, "holder"])
            .arg(&path)
            .arg(mib.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0) // Ctrl-C and the test runner's kill must not reach it
            .spawn()
            .expect("sh");
        let mut said = String::new();
        let out = holder.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut said).expect("its output");
        assert_eq!(
            said.trim(),
            "mounted",
            "this test needs a small file system and may not mount one: run it as root, in a \
             container with CAP_SYS_ADMIN"
        );
        Self { path, holder }
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are free.
    pub(crate) fn free_bytes(&self) -> u64 {
        let volume = rustix::fs::statvfs(&self.path).expect("its size");
        volume.f_bavail * volume.f_frsize
    }

    /// Fills it until `left` bytes are free.
    pub(crate) fn fill(&self, left: u64) {
        let bytes = self.free_bytes().saturating_sub(left);
        fs::write(self.ballast(), vec![b'x'; bytes as usize]).expect("ballast");
    }

    /// Makes room again.
    pub(crate) fn drop_ballast(&self) {
        fs::remove_file(self.ballast()).expect("ballast");
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
