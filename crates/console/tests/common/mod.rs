//! A guest's serial port and a user's terminal, for tests.
#![allow(dead_code)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use console::{Backend, Console, Place};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use tempfile::TempDir;

/// Long enough for any machine; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Directories {
    root: TempDir,
}

impl Directories {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["one", "two", "dev"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        Directories { root }
    }

    pub fn place(&self, vm: &str) -> Place {
        Place { device_dir: self.path("dev"), ..Place::new("com1", self.path(vm), self.path("shared")) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

/// A console whose input is collected.
pub struct Guest {
    pub console: Console,
    input: Receiver<u8>,
}

impl Guest {
    pub fn new(backend: &Backend, place: &Place) -> Self {
        let console = Console::open(backend, place).unwrap_or_else(|error| panic!("{error}"));
        let (sender, input) = channel();
        console.start(move |bytes| take_all(&sender, bytes)).unwrap();
        Guest { console, input }
    }

    /// Takes at most `step` bytes at a time, and each time only after saying that there is room again.
    pub fn with_small_steps(backend: &Backend, place: &Place, step: usize) -> Self {
        let console = Console::open(backend, place).unwrap_or_else(|error| panic!("{error}"));
        let (sender, input) = channel();
        let sink = console.sink();
        let refused = Mutex::new(false);
        console
            .start(move |bytes| {
                let mut refused = refused.lock().unwrap();
                if *refused {
                    *refused = false;
                    let sink = sink.clone();
                    std::thread::spawn(move || sink.input_ready());
                    return 0;
                }
                *refused = true;
                let sink = sink.clone();
                std::thread::spawn(move || sink.input_ready());
                take_all(&sender, &bytes[..step.min(bytes.len())])
            })
            .unwrap();
        Guest { console, input }
    }

    /// Takes one byte, then nothing any more.
    pub fn deaf(backend: &Backend, place: &Place) -> Self {
        let console = Console::open(backend, place).unwrap_or_else(|error| panic!("{error}"));
        let (sender, input) = channel();
        let taken = AtomicBool::new(false);
        let take = move |bytes: &[u8]| match taken.swap(true, Ordering::Relaxed) {
            false => take_all(&sender, &bytes[..1]),
            true => 0,
        };
        console.start(take).unwrap();
        Guest { console, input }
    }

    pub fn print(&self, text: &str) {
        self.console.sink().write(text.as_bytes());
    }

    pub fn expect_input(&self, text: &str) {
        let mut got = Vec::new();
        while got.len() < text.len() {
            match self.input.recv_timeout(PATIENCE) {
                Ok(byte) => got.push(byte),
                Err(_) => panic!("expected {text:?}, got {:?}", String::from_utf8_lossy(&got)),
            }
        }
        assert_eq!(String::from_utf8_lossy(&got), text);
    }

    pub fn expect_no_input(&self) {
        assert!(self.input.try_recv().is_err());
    }
}

fn take_all(sender: &Sender<u8>, bytes: &[u8]) -> usize {
    for byte in bytes {
        let _ = sender.send(*byte);
    }
    bytes.len()
}

/// Reads until `text` has come, and nothing else.
pub fn expect(source: &mut (impl Read + AsFd), text: &str) {
    let mut got = Vec::new();
    while got.len() < text.len() {
        let mut fds = [PollFd::new(&*source, PollFlags::IN)];
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(
            poll(&mut fds, Some(&timeout)),
            Ok(1),
            "expected {text:?}, got {}",
            String::from_utf8_lossy(&got)
        );
        let mut chunk = vec![0; text.len() - got.len()];
        let count = source.read(&mut chunk).unwrap();
        assert_ne!(count, 0, "expected {text:?}, the other side has gone");
        got.extend_from_slice(&chunk[..count]);
    }
    assert_eq!(String::from_utf8_lossy(&got), text);
}

/// Reads until `text` appears somewhere.
pub fn expect_somewhere(source: &mut (impl Read + AsFd), text: &str) {
    let mut got = String::new();
    while !got.contains(text) {
        let mut byte = [' '; 1].map(|c| c as u8);
        let mut fds = [PollFd::new(&*source, PollFlags::IN)];
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "expected {text:?}, got {got:?}");
        source.read_exact(&mut byte).unwrap();
        got.push(byte[0] as char);
    }
}

/// Opens a terminal as `cu` does.
pub fn attach(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
}

pub fn send(target: &mut impl Write, text: &str) {
    target.write_all(text.as_bytes()).unwrap();
}

/// A pseudo-terminal that stands for a terminal of the host.
pub struct HostTerminal {
    pub master: File,
    pub slave: File,
    pub path: PathBuf,
}

impl HostTerminal {
    pub fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = PathBuf::from(ptsname(&master, Vec::new()).unwrap().into_string().unwrap());
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        HostTerminal { master: File::from(master), slave: File::from(slave), path }
    }

    /// Line editing and echo are on, as a shell leaves it.
    pub fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

pub fn shared<T>(value: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(value))
}
