//! A folder that takes the processes started in it along when it goes.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Waits until the test lets go of its end of the pipe, by dropping the `Scratch` or by dying in
/// whatever way; then kills each process whose id stands in the first line of a `*.pid` file of
/// the folder, and removes that.
const WATCHDOG: &str = r#"
cat >/dev/null
for file in "$1"/*.pid; do
    [ -e "$file" ] && kill -KILL "$(head -n 1 "$file")" 2>/dev/null
done
[ -z "$2" ] || exit 0
for _ in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf "$1" 2>/dev/null && exit 0
    sleep 0.1
done
"#;

/// A temporary folder, and the watchdog that clears up after it even when the test is killed.
///
/// With `WALRACE_KEEP=1` the folder stays for a look.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    watchdog: Child,
}

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = tempfile::Builder::new()
            .prefix(&format!("walrace-{name}-"))
            .tempdir()
            .expect("a temporary folder")
            .keep();
        let keep = if std::env::var_os("WALRACE_KEEP").is_some() { "keep" } else { "" };
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog"])
            .args([path.as_os_str(), keep.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0) // Ctrl-C and the test runner's kill must not reach it
            .spawn()
            .expect("sh");
        Self { path, watchdog }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Notes a process that must not outlive the folder.
    pub(crate) fn note(&self, name: &str, pid: u32) {
        fs::write(self.path.join(format!("{name}.pid")), pid.to_string()).expect("a pid file");
    }

    /// The process has ended: its id may soon be another's.
    pub(crate) fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.path.join(format!("{name}.pid")));
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}
