//! The runtime directory: which machines run on this host, told by locks that die with their owners.
//!
//! Below one root (`/run/apiary/vmm` for root, `$XDG_RUNTIME_DIR/apiary/vmm` for others, `$APIARY_RUN` before both)
//! each VM has a directory of its name:
//!
//! | file | content |
//! | --- | --- |
//! | `lock` | flock(2)ed by the VM's process from start to end, whatever ends it |
//! | `pid`, `engine` | decimal process id; name of the engine once chosen |
//! | `control.sock` | the control socket, mode 0600 |
//! | others | what the machine puts there (null-modem ends, …) |
//!
//! A directory whose lock is free is stale: its process died without cleaning up. Whoever comes across it removes it.
//! Every look at the locks happens under the root's own `.lock`, which is held only for that moment; so a look
//! never makes a start fail, and of two starts at once exactly one finds the name free.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sys;

/// Longest VM name in bytes, which is bhyve's: with any suffix it stays a file name.
pub const MAX_NAME_BYTES: usize = 229;
/// How long a start waits for a process that holds the name and may be about to end.
const GRACE: Duration = Duration::from_millis(100);
/// How long a start waits for a process that has been killed and is being taken apart by the kernel; with much
/// guest memory that is not instantaneous.
const DYING_GRACE: Duration = Duration::from_secs(10);

/// What went wrong with the runtime directory.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The name cannot be that of a VM.
    #[error("VM name `{name}`: {problem}")]
    BadName {
        /// The name as given.
        name: String,
        /// What is wrong with it, and what is accepted.
        problem: &'static str,
    },
    /// A machine of this name runs.
    #[error("VM {name} is already running{}; end it with `bhyvectl --destroy --vm={name}`", by_pid(*.pid))]
    InUse {
        /// Its name.
        name: String,
        /// Its process, if known.
        pid: Option<u32>,
    },
    /// No machine of this name runs.
    #[error("VM {name} is not running (see `bhyvectl --list`)")]
    NotRunning {
        /// The name as given.
        name: String,
    },
    /// There is no place for the runtime directory.
    #[error(
        "no runtime directory: XDG_RUNTIME_DIR is not set; set it, or APIARY_RUN, to a directory of yours"
    )]
    NoRoot,
    /// Somebody else owns the runtime directory.
    #[error("runtime directory {}: owned by user {owner}, not by this user; refusing to use it", .path.display())]
    ForeignOwner {
        /// Which directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
    },
    /// Something else is where the VM's directory belongs.
    #[error("{} is not the directory of a VM; choose another name or another APIARY_RUN", .path.display())]
    NotOurs {
        /// What is in the way.
        path: PathBuf,
    },
    /// The host refused an operation.
    #[error("{what} {}: {source}", .path.display())]
    Host {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

fn by_pid(pid: Option<u32>) -> String {
    pid.map(|p| format!(" (process {p})")).unwrap_or_default()
}

fn host<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> RuntimeError + 'a {
    move |source| RuntimeError::Host { what, path: path.to_owned(), source }
}

/// Checks that `name` can be the name of a VM: a file name of at most [`MAX_NAME_BYTES`] visible characters that
/// does not begin with a dot or a dash.
///
/// # Errors
/// [`RuntimeError::BadName`].
pub fn check_name(name: &str) -> Result<(), RuntimeError> {
    let problem = if name.is_empty() {
        "is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "is longer than 229 bytes"
    } else if name.starts_with(['.', '-']) {
        "must not begin with `.` or `-`"
    } else if name.chars().any(|c| c == '/' || c.is_control() || c.is_whitespace()) {
        "must not contain `/`, spaces or control characters"
    } else {
        return Ok(());
    };
    Err(RuntimeError::BadName { name: name.to_owned(), problem })
}

/// One running machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEntry {
    /// Its name.
    pub name: String,
    /// Its process; unknown for an instant while it starts.
    pub pid: Option<u32>,
    /// Its engine, once chosen.
    pub engine: Option<String>,
    /// Its directory.
    pub path: PathBuf,
}

impl VmEntry {
    /// Where its control socket is.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Waits until its process is gone; false after `timeout`.
    ///
    /// # Errors
    /// The host cannot tell.
    pub fn wait_gone(&self, timeout: Duration) -> io::Result<bool> {
        let Some(pid) = self.pid else { return Ok(false) };
        match sys::open_process(pid) {
            Ok(process) => sys::wait_readable(process.as_raw_fd(), timeout),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(true),
            Err(e) => Err(e),
        }
    }
}

/// The directory that holds one directory per running machine.
#[derive(Clone, Debug)]
pub struct Runtime {
    root: PathBuf,
    shared: PathBuf,
}

impl Runtime {
    /// The runtime directory of the calling user: `$APIARY_RUN`, else `/run/apiary/vmm` for root and
    /// `$XDG_RUNTIME_DIR/apiary/vmm` for others. It is made when first needed.
    ///
    /// # Errors
    /// [`RuntimeError::NoRoot`].
    pub fn for_user() -> Result<Self, RuntimeError> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(root) = set("APIARY_RUN") {
            return Ok(Self::at(root));
        }
        let shared = match set("XDG_RUNTIME_DIR") {
            _ if sys::effective_uid() == 0 => PathBuf::from("/run/apiary"),
            Some(directory) => directory.join("apiary"),
            None => return Err(RuntimeError::NoRoot),
        };
        Ok(Runtime { root: shared.join("vmm"), shared })
    }

    /// A runtime directory of the caller's choice.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Runtime { shared: root.clone(), root }
    }

    /// Its path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where files are that machines share (ends of null modems): `/run/apiary`, `$XDG_RUNTIME_DIR/apiary`, or the runtime
    /// directory itself where the caller chose one.
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// Takes the name for this process until the returned value is dropped or the process ends.
    ///
    /// # Errors
    /// The name is not a name or is in use, or the host refuses the files.
    pub fn claim(&self, name: &str) -> Result<VmDirectory, RuntimeError> {
        check_name(name)?;
        match self.try_claim(name)? {
            Claim::Taken(directory) => Ok(directory),
            Claim::Held(pid) => {
                // Its owner may have been killed an instant ago: the lock goes with its last thread.
                if pid.is_some_and(wait_for_dying)
                    && let Claim::Taken(directory) = self.try_claim(name)?
                {
                    return Ok(directory);
                }
                Err(RuntimeError::InUse { name: name.to_owned(), pid })
            }
        }
    }

    fn try_claim(&self, name: &str) -> Result<Claim, RuntimeError> {
        let _guard = self.guard(true)?;
        let path = self.root.join(name);
        make_directory(&path)?;
        let lock_path = path.join("lock");
        if !lock_path.exists() && fs::read_dir(&path).map_err(host("reading", &path))?.next().is_some() {
            return Err(RuntimeError::NotOurs { path });
        }
        let lock = open_lock(&lock_path, true)?;
        if !sys::lock(&lock, false).map_err(host("locking", &lock_path))? {
            return Ok(Claim::Held(read_pid(&path)));
        }
        let directory = VmDirectory { runtime: self.clone(), name: name.to_owned(), path, _lock: lock };
        // From here on a failure drops `directory`, which removes it; it must not wait for the guard we hold.
        if let Err(error) = directory.prepare() {
            let _ = remove_tree(&directory.path);
            directory.forget();
            return Err(error);
        }
        Ok(Claim::Taken(directory))
    }

    /// Every machine that runs, by name. Stale directories are removed on the way.
    ///
    /// # Errors
    /// The host refuses to show the directory.
    pub fn list(&self) -> Result<Vec<VmEntry>, RuntimeError> {
        let Some(_guard) = self.guard(false)? else { return Ok(Vec::new()) };
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.root).map_err(host("reading", &self.root))? {
            let file = file.map_err(host("reading", &self.root))?;
            let Ok(name) = file.file_name().into_string() else { continue };
            if check_name(&name).is_err() || !file.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            entries.extend(self.look(&name)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The machine of this name.
    ///
    /// # Errors
    /// [`RuntimeError::NotRunning`], or the host refuses to show the directory.
    pub fn find(&self, name: &str) -> Result<VmEntry, RuntimeError> {
        check_name(name)?;
        let entry = match self.guard(false)? {
            Some(_guard) => self.look(name)?,
            None => None,
        };
        entry.ok_or_else(|| RuntimeError::NotRunning { name: name.to_owned() })
    }

    /// Ends the machine's process without asking it, waits until it is gone and removes what it left.
    ///
    /// # Errors
    /// No such machine, or the host refuses.
    pub fn kill(&self, name: &str) -> Result<(), RuntimeError> {
        let entry = self.find(name)?;
        if let Some(pid) = entry.pid {
            match sys::open_process(pid) {
                Ok(process) => {
                    // The number may have passed to another process since it was read; the lock says.
                    if self.find(name).is_ok_and(|now| now.pid == Some(pid)) {
                        sys::kill_process(&process).map_err(host("ending the process of", &entry.path))?;
                    }
                    sys::wait_readable(process.as_raw_fd(), DYING_GRACE)
                        .map_err(host("waiting for the process of", &entry.path))?;
                }
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(host("opening the process of", &entry.path)(e)),
            }
        }
        match self.find(name) {
            Err(RuntimeError::NotRunning { .. }) => Ok(()),
            Ok(entry) => Err(RuntimeError::InUse { name: entry.name, pid: entry.pid }),
            Err(error) => Err(error),
        }
    }

    /// Looks at one directory, with the guard held; removes it if it is stale.
    fn look(&self, name: &str) -> Result<Option<VmEntry>, RuntimeError> {
        let path = self.root.join(name);
        let lock_path = path.join("lock");
        match open_lock(&lock_path, false) {
            Ok(lock) => {
                if !sys::lock(&lock, false).map_err(host("locking", &lock_path))? {
                    let engine = fs::read_to_string(path.join("engine")).ok();
                    return Ok(Some(VmEntry {
                        name: name.to_owned(),
                        pid: read_pid(&path),
                        engine: engine.map(|e| e.trim_end().to_owned()),
                        path,
                    }));
                }
            }
            Err(RuntimeError::Host { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                // Ours only if its maker died before the lock was there, and then it is empty.
                let _ = fs::remove_dir(&path);
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        remove_tree(&path)?;
        Ok(None)
    }

    /// Takes the root's own lock. With `create` the root is made if missing; without, `None` says it is missing.
    fn guard(&self, create: bool) -> Result<Option<File>, RuntimeError> {
        if create {
            make_root(&self.root)?;
        }
        let path = self.root.join(".lock");
        let file = match open_lock(&path, true) {
            Err(RuntimeError::Host { source, .. }) if !create && source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?,
        };
        sys::lock(&file, true).map_err(host("locking", &path))?;
        Ok(Some(file))
    }
}

enum Claim {
    Taken(VmDirectory),
    Held(Option<u32>),
}

/// The directory of a VM of this process. Dropping it removes the directory and frees the name.
#[derive(Debug)]
pub struct VmDirectory {
    runtime: Runtime,
    name: String,
    path: PathBuf,
    _lock: File,
}

impl VmDirectory {
    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory, for files that are to vanish with the machine.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the control socket belongs.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Tells the world which engine runs the machine.
    ///
    /// # Errors
    /// The host refuses the file.
    pub fn set_engine(&self, engine: &str) -> Result<(), RuntimeError> {
        self.put("engine", engine)
    }

    fn put(&self, file: &str, text: &str) -> Result<(), RuntimeError> {
        let path = self.path.join(file);
        let new = self.path.join(format!(".{file}.new"));
        fs::write(&new, format!("{text}\n")).map_err(host("writing", &new))?;
        fs::rename(&new, &path).map_err(host("renaming to", &path))
    }

    /// Removes what a predecessor left and says who we are.
    fn prepare(&self) -> Result<(), RuntimeError> {
        empty(&self.path)?;
        self.put("pid", &std::process::id().to_string())
    }

    /// Frees the name without touching the directory.
    fn forget(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for VmDirectory {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        // If the guard cannot be had the directory stays behind as stale and the next command removes it.
        if let Ok(Some(_guard)) = self.runtime.guard(false) {
            let _ = remove_tree(&self.path);
        }
    }
}

/// Opens a lock file. It is created readable by its owner only, and never followed if it is a link.
fn open_lock(path: &Path, create: bool) -> Result<File, RuntimeError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(host("opening", path))
}

fn make_root(path: &Path) -> Result<(), RuntimeError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(host("creating", path))?;
    // The root itself may be reached through a link that its owner made.
    check_owner(&fs::canonicalize(path).map_err(host("examining", path))?)
}

fn make_directory(path: &Path) -> Result<(), RuntimeError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => check_owner(path),
        Err(e) => Err(host("creating", path)(e)),
    }
}

/// A directory that another user owns could be swapped under us.
fn check_owner(path: &Path) -> Result<(), RuntimeError> {
    let metadata = fs::symlink_metadata(path).map_err(host("examining", path))?;
    if !metadata.is_dir() {
        return Err(RuntimeError::NotOurs { path: path.to_owned() });
    }
    let owner = metadata.uid();
    if owner != sys::effective_uid() {
        return Err(RuntimeError::ForeignOwner { path: path.to_owned(), owner });
    }
    Ok(())
}

/// Removes a VM's directory, its lock last: whatever is left when this process is killed on the way is still known as
/// the stale directory of a VM.
fn remove_tree(path: &Path) -> Result<(), RuntimeError> {
    remove_tree_by(path, &mut remove)
}

fn remove_tree_by(path: &Path, remove: &mut Remove<'_>) -> Result<(), RuntimeError> {
    empty_by(path, remove)?;
    for last in [&path.join("lock"), path] {
        gone(remove(last)).map_err(host("removing", last))?;
    }
    Ok(())
}

/// Removes everything in a VM's directory but its lock.
fn empty(path: &Path) -> Result<(), RuntimeError> {
    empty_by(path, &mut remove)
}

fn empty_by(path: &Path, remove: &mut Remove<'_>) -> Result<(), RuntimeError> {
    let files = match fs::read_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(host("reading", path))?,
    };
    for file in files {
        let file = file.map_err(host("reading", path))?;
        if file.file_name() != "lock" {
            gone(remove(&file.path())).map_err(host("removing", &file.path()))?;
        }
    }
    Ok(())
}

/// How one entry is removed.
type Remove<'a> = dyn FnMut(&Path) -> io::Result<()> + 'a;

fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// What is not there is removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read_pid(directory: &Path) -> Option<u32> {
    fs::read_to_string(directory.join("pid")).ok()?.trim_end().parse().ok()
}

/// Waits for a process that has been killed to be gone; false if it lives on.
fn wait_for_dying(pid: u32) -> bool {
    if pid == std::process::id() {
        return false;
    }
    let Ok(process) = sys::open_process(pid) else { return true };
    let gone = |timeout| sys::wait_readable(process.as_raw_fd(), timeout).unwrap_or(false);
    gone(GRACE) || (is_dying(pid) && gone(DYING_GRACE))
}

/// Whether a process has a SIGKILL pending or is exiting (proc(5), `stat` field 9 and `status`).
fn is_dying(pid: u32) -> bool {
    /// `PF_EXITING` of the process flags.
    const EXITING: u64 = 4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is the command in parentheses and may contain anything; count from its end.
    let exiting = stat.rsplit_once(')').is_some_and(|(_, rest)| {
        let mut fields = rest.split_whitespace();
        let state = fields.next().unwrap_or_default();
        let flags = fields.nth(5).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
        matches!(state, "Z" | "X") || flags & EXITING != 0
    });
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kill_pending = status.lines().any(|line| {
        let pending = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
        pending
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & (1 << (libc::SIGKILL - 1)) != 0)
    });
    exiting || kill_pending
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_free_wherever_its_owner_died_while_removing_it() {
        let root = std::env::temp_dir().join(format!("apiary-removal-{}", std::process::id()));
        let runtime = Runtime::at(&root);
        for survived in 0.. {
            let directory = runtime.claim("g1").unwrap();
            directory.set_engine("soft").unwrap();
            fs::write(directory.socket(), "").unwrap();
            // As if the process ended there: its lock goes, the rest stays.
            let mut left = survived;
            let died = remove_tree_by(directory.path(), &mut |path| {
                left -= 1;
                if left < 0 { Err(io::ErrorKind::Interrupted.into()) } else { remove(path) }
            })
            .is_err();
            directory.forget();
            runtime.claim("g1").unwrap_or_else(|e| panic!("after {survived} removals: {e}"));
            assert_eq!(runtime.list().unwrap(), vec![], "after {survived} removals");
            if !died {
                assert!(survived >= 5, "pid, engine, socket, lock and directory were to be removed");
                break;
            }
        }
        fs::remove_dir_all(root).unwrap();
    }
}
