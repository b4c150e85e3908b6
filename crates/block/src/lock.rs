//! Locks on image files, so that two programs do not write one image, nor one change what another reads.
//!
//! The scheme is QEMU's (`docs/system/images.rst` of QEMU, "Disk image file locking"; `qemu-img`(1), option `-U`), so that bhyve and
//! QEMU respect each other. What a program may do with an image is a set of permissions; each is a number. For each that it holds, it
//! has a shared lock on byte 100 + number of the file, and for each that it grants nobody else, on byte 200 + number. An exclusive lock
//! is never taken, only tried: if one could be taken on 200 + number, nobody minds that permission, and on 100 + number, nobody has it.
//! The locks belong to the open file (fcntl(2), "Open file description locks"): they end when the last descriptor of it is closed,
//! however the program ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// The numbers of the permissions. (2, writing what is there already, is what copying on read does; nobody here minds or does it.)
const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const RESIZE: u8 = 3;

/// First byte of the permissions held, and of those not granted to others.
const HELD: i64 = 100;
const NOT_SHARED: i64 = 200;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Reading; others may read.
    Read,
    /// Reading and writing; others may do nothing that needs what is read to stay as it is.
    Write,
    /// As [`Purpose::Write`], and the file may grow and shrink: that of a format.
    WriteFormat,
}

impl Purpose {
    fn held(self) -> &'static [u8] {
        match self {
            Purpose::Read => &[CONSISTENT_READ],
            Purpose::Write => &[CONSISTENT_READ, WRITE],
            Purpose::WriteFormat => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn not_shared(self) -> &'static [u8] {
        &[WRITE, RESIZE]
    }
}

/// Why there is no lock.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Others have it. What is known of them: "" or " (pid N, NAME)".
    InUse(String),
    /// The host failed.
    Host(io::Error),
}

/// Locks a file, for as long as it is open. On a file system without locks, says so in the log and goes on.
pub(crate) fn lock(file: &File, purpose: Purpose) -> Result<(), LockError> {
    let held = purpose.held().iter().map(|permission| HELD + i64::from(*permission));
    let not_shared = purpose.not_shared().iter().map(|permission| NOT_SHARED + i64::from(*permission));
    // First say what is wanted, then look for those who mind: of two that start at a time, both may find the other, but never neither.
    for byte in held.chain(not_shared) {
        match control(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(LockError::InUse(holders(file)));
            }
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
                ) =>
            {
                tracing::warn!(
                    "the file system has no locks; nothing keeps others from using the image: {error}"
                );
                return Ok(());
            }
            Err(error) => return Err(LockError::Host(error)),
        }
    }
    let minded = purpose.held().iter().map(|permission| NOT_SHARED + i64::from(*permission));
    let done = purpose.not_shared().iter().map(|permission| HELD + i64::from(*permission));
    for byte in minded.chain(done) {
        if control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map_err(LockError::Host)? != libc::F_UNLCK {
            unlock(file);
            return Err(LockError::InUse(holders(file)));
        }
    }
    Ok(())
}

/// Takes all locks of this open file away. Closing it does that too, but not while a process that was just being started still has a copy
/// of the descriptor.
pub(crate) fn unlock(file: &File) {
    for byte in (0..4).flat_map(|number| [HELD + number, NOT_SHARED + number]) {
        let _ = control(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte);
    }
}

/// A command on one byte; returns the kind of lock that the kernel has put into the structure.
fn control(file: &File, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::c_int> {
    // SAFETY: all-zero is a valid flock, and OFD commands want zero in `l_pid`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: the structure is valid for reads and writes during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        0 => Ok(libc::c_int::from(lock.l_type)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The processes that have this file open, as far as /proc shows, for a message: the kernel does not tell whose such a lock is.
fn holders(file: &File) -> String {
    let Ok(wanted) = file.metadata() else { return String::new() };
    let same = |path: &std::path::Path| {
        fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    };
    let entries = |path: &str| fs::read_dir(path).into_iter().flatten().flatten();
    let own = std::process::id();
    let mut found = Vec::new();
    for process in entries("/proc") {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let open = entries(&format!("/proc/{pid}/fd")).filter(|descriptor| same(&descriptor.path())).count();
        // We have it open ourselves, to look.
        if open > usize::from(pid == own) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push(format!("pid {pid}, {}", name.trim()));
        }
        if found.len() == 3 {
            break;
        }
    }
    if found.is_empty() { String::new() } else { format!(" ({})", found.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(file: &tempfile::NamedTempFile) -> File {
        File::options().read(true).write(true).open(file.path()).unwrap()
    }

    #[test]
    fn one_writer_or_several_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let readers = [open(&file), open(&file)];
        for reader in &readers {
            lock(reader, Purpose::Read).unwrap();
        }
        let writer = open(&file);
        for purpose in [Purpose::Write, Purpose::WriteFormat] {
            assert!(matches!(lock(&writer, purpose), Err(LockError::InUse(_))));
        }
        drop(readers);
        lock(&writer, Purpose::Write).unwrap();
        for purpose in [Purpose::Read, Purpose::Write, Purpose::WriteFormat] {
            let Err(LockError::InUse(by)) = lock(&open(&file), purpose) else {
                panic!("{purpose:?} was granted")
            };
            assert!(by.contains(&format!("pid {}", std::process::id())), "{by}");
        }
    }

    #[test]
    fn who_was_refused_leaves_no_lock_behind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (reader, writer) = (open(&file), open(&file));
        lock(&reader, Purpose::Read).unwrap();
        lock(&writer, Purpose::Write).unwrap_err();
        lock(&open(&file), Purpose::Read).unwrap();
    }
}
