//! A null modem: two terminal devices, what is written to one can be read from the other (FreeBSD's nmdm(4)), made of a
//! pseudo-terminal. The guest's end is the master. The user's end is the slave, reachable by links:
//!
//! | link | for |
//! | --- | --- |
//! | `RUNTIME/com1` | this VM's first port, whatever the null modem's number |
//! | `SHARED/nmdm0B` | the number, for every user |
//! | `/dev/nmdm0B` | the number as on FreeBSD, where this user may make links in `/dev` |
//!
//! A lock on `SHARED/nmdm0.lock`, which dies with its process, says whether links of that number are in use or left over. A
//! VM that asks for the end another VM has left for the user gets it: two guests are then connected to each other.
//!
//! Whether a user is attached is told by the kernel: the master hangs up while nobody has the slave open, and inotify(7) tells
//! when somebody opens it.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::link::Link;
use crate::{ConsoleError, Place, poll, terminal};

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum NullModemEnd {
    A,
    B,
}

impl NullModemEnd {
    fn other(self) -> Self {
        match self {
            NullModemEnd::A => NullModemEnd::B,
            NullModemEnd::B => NullModemEnd::A,
        }
    }
}

/// What [`NullModem::open`] found.
pub enum Opened {
    /// A new null modem.
    Made(NullModem),
    /// Another VM has made it, and this terminal is the end that was asked for.
    Peer(PathBuf),
}

/// See the module.
pub struct NullModem {
    master: OwnedFd,
    /// Tells when the slave is opened.
    opened: OwnedFd,
    /// Somebody has the slave open, as far as we have looked.
    attached: bool,
    /// There may be input, even if whoever wrote it has left already.
    readable: bool,
    links: Vec<UserLink>,
    _lock: UnitLock,
}

impl NullModem {
    /// Makes null modem `unit`, of which the guest gets `end`.
    pub fn open(unit: &str, end: NullModemEnd, place: &Place) -> Result<Opened, ConsoleError> {
        let host = |what: String| {
            let port = place.name.clone();
            move |source: io::Error| ConsoleError::Host { port, what, source }
        };
        let shared = &place.shared_dir;
        fs::create_dir_all(shared).map_err(host(format!("make {}", shared.display())))?;
        let lock_path = shared.join(format!("nmdm{unit}.lock"));
        let lock = UnitLock::take(&lock_path).map_err(host(format!("lock {}", lock_path.display())))?;
        let Some(lock) = lock else {
            let wanted = shared.join(format!("nmdm{unit}{end:?}"));
            return if wanted.exists() {
                Ok(Opened::Peer(wanted))
            } else {
                Err(ConsoleError::NullModemTaken { port: place.name.clone(), unit: unit.to_owned(), end })
            };
        };
        let (master, slave, opened) = make_pair().map_err(host("make a pseudo-terminal".to_owned()))?;
        let name = format!("nmdm{unit}{:?}", end.other());
        let mut modem =
            NullModem { master, opened, attached: false, readable: false, links: Vec::new(), _lock: lock };
        let wanted = [
            (place.runtime_dir.join(&place.name), true),
            (shared.join(&name), true),
            (place.device_dir.join(&name), false),
        ];
        for (path, required) in wanted {
            match UserLink::make(&path, &slave) {
                Ok(link) => modem.links.push(link),
                Err(LinkError::Foreign) => {
                    return Err(ConsoleError::Foreign { port: place.name.clone(), path });
                }
                Err(LinkError::Host(source)) if required => {
                    return Err(host(format!("make the link {}", path.display()))(source));
                }
                Err(LinkError::Host(error)) => tracing::info!(
                    "no {}: {error}; attach to {} instead",
                    path.display(),
                    modem.links[0].path.display()
                ),
            }
        }
        Ok(Opened::Made(modem))
    }

    /// Where the user can attach.
    pub fn viewer_paths(&self) -> Vec<PathBuf> {
        self.links.iter().map(|link| link.path.clone()).collect()
    }
}

/// Master, path of the slave, and a descriptor that becomes readable when the slave is opened.
fn make_pair() -> io::Result<(OwnedFd, PathBuf, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&master, true)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ptsname(&master, Vec::new())?;
    let slave = PathBuf::from(
        slave.into_string().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "odd device name"))?,
    );
    let opened = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    // Opened and closed once: from then on the master hangs up whenever nobody has the slave open. What a fresh terminal
    // does (echo, line editing) would send the guest's own output back to it.
    let first = rustix::fs::open(&slave, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    terminal::set_raw(first.as_fd())?;
    drop(first);
    inotify::add_watch(&opened, &slave, inotify::WatchFlags::OPEN)?;
    Ok((master, slave, opened))
}

impl Link for NullModem {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.readable.then(|| self.master.as_fd())
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.attached.then(|| self.master.as_fd())
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.opened.as_fd())
    }

    /// Somebody has opened the slave, and may have closed it again; reading finds out.
    fn on_event(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 512];
        let mut events = inotify::Reader::new(&self.opened, &mut buffer);
        while events.next().is_ok() {}
        self.attached = true;
        self.readable = true;
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.master, buffer)?)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What is written after the last user has left would be lost; it is kept for the next one.
        if poll::is_hung_up(&self.master) {
            self.attached = false;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(rustix::io::write(&self.master, bytes)?)
    }

    /// The last user has left.
    fn input_ended(&mut self) {
        self.attached = false;
        self.readable = false;
        // It may have left the terminal with echo and line editing on.
        let _ = terminal::set_raw(self.master.as_fd());
    }

    fn output_failed(&mut self) {
        self.input_ended();
    }
}

/// The exclusive right to a null modem's number.
struct UnitLock {
    path: PathBuf,
    file: File,
}

impl UnitLock {
    /// `None` if another process has it.
    fn take(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Its owner may have removed the file between our open and our lock; then the lock is on nothing.
            let ours = file.metadata()?;
            match fs::symlink_metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                    return Ok(Some(UnitLock { path: path.to_owned(), file }));
                }
                _ => continue,
            }
        }
    }
}

impl Drop for UnitLock {
    fn drop(&mut self) {
        // Under the lock, which ends when `file` is closed.
        let _ = fs::remove_file(&self.path);
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

enum LinkError {
    /// Something is there that we did not make.
    Foreign,
    Host(io::Error),
}

/// A symbolic link to the slave, removed on drop.
struct UserLink {
    path: PathBuf,
    target: PathBuf,
}

impl UserLink {
    /// Makes the link; one that is left over from a dead process is replaced (the lock says that it is dead).
    fn make(path: &Path, target: &Path) -> Result<Self, LinkError> {
        match fs::symlink_metadata(path) {
            Ok(_) => match fs::read_link(path) {
                Ok(old) if old.starts_with("/dev/pts") => fs::remove_file(path).map_err(LinkError::Host)?,
                _ => return Err(LinkError::Foreign),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(LinkError::Host(error)),
        }
        match symlink(target, path) {
            Ok(()) => Ok(UserLink { path: path.to_owned(), target: target.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(LinkError::Foreign),
            Err(error) => Err(LinkError::Host(error)),
        }
    }
}

impl Drop for UserLink {
    fn drop(&mut self) {
        if fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
