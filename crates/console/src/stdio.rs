//! Standard input and output.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, Mode, OFlags};

use crate::link::Link;
use crate::terminal::ProcessTerminal;
use crate::{ConsoleError, Place};

/// One console at a time can have them.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Holds [`TAKEN`].
struct Claim;

impl Claim {
    fn take() -> Option<Self> {
        (!TAKEN.swap(true, Ordering::AcqRel)).then_some(Claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// See the module. Fields are dropped in order: the terminal is put back before another console may have it.
pub struct Stdio {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    output_is_socket: bool,
    _terminal: Option<ProcessTerminal>,
    _claim: Claim,
}

impl Stdio {
    /// Takes the standard descriptors; a terminal becomes raw, so that control characters reach the guest.
    pub fn open(place: &Place) -> Result<Self, ConsoleError> {
        let claim = Claim::take().ok_or_else(|| ConsoleError::StdioTaken { port: place.name.clone() })?;
        let host = |what: &str| {
            let (port, what) = (place.name.clone(), what.to_owned());
            move |source: rustix::io::Errno| ConsoleError::Host { port, what, source: source.into() }
        };
        let stdin = rustix::stdio::stdin();
        let stdout = rustix::stdio::stdout();
        // A closed descriptor is an empty input or an output to nowhere.
        let input = rustix::io::fcntl_dupfd_cloexec(stdin, 3).ok();
        let (output, output_is_socket) = match rustix::fs::fstat(stdout) {
            Ok(stat) => {
                let kind = FileType::from_raw_mode(stat.st_mode);
                let output = output_descriptor(stdout, kind).map_err(host("duplicate standard output"))?;
                (Some(output), kind == FileType::Socket)
            }
            Err(_) => (None, false),
        };
        let terminal = if rustix::termios::isatty(stdin) {
            Some(ProcessTerminal::enter(stdin).map_err(host("set the terminal to raw mode"))?)
        } else {
            None
        };
        Ok(Stdio { input, output, output_is_socket, _terminal: terminal, _claim: claim })
    }
}

/// A descriptor for standard output that does not block, without making the one we share with other processes so: the
/// terminal or pipe is opened once more. Files and sockets do not need it; where it fails, waiting in write(2) is the worst
/// that can happen.
fn output_descriptor(stdout: BorrowedFd<'_>, kind: FileType) -> Result<OwnedFd, rustix::io::Errno> {
    if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(again) = rustix::fs::open("/proc/self/fd/1", flags, Mode::empty()) {
            return Ok(again);
        }
    }
    rustix::io::fcntl_dupfd_cloexec(stdout, 3)
}

impl Link for Stdio {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(AsFd::as_fd)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.input {
            Some(input) => Ok(rustix::io::read(input, buffer)?),
            None => Ok(0),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.output {
            Some(output) if self.output_is_socket => {
                let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
                Ok(rustix::net::send(output, bytes, flags)?)
            }
            Some(output) => Ok(rustix::io::write(output, bytes)?),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// The user has closed the input (`</dev/null`, end of a pipe); the guest runs on and output goes on.
    fn input_ended(&mut self) {
        self.input = None;
    }

    fn output_failed(&mut self) {
        self.output = None;
    }
}
