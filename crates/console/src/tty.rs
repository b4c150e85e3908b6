//! A terminal device of the host: a serial port, or the other end of somebody's null modem.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::link::Link;
use crate::terminal::RawMode;
use crate::{ConsoleError, Place};

/// See the module.
pub struct Tty {
    device: Option<OwnedFd>,
    /// After `device`: the modes are put back by another descriptor, before that is closed.
    _raw: RawMode,
}

impl Tty {
    /// Opens the device and makes it raw.
    pub fn open(path: &Path, place: &Place) -> Result<Self, ConsoleError> {
        let failed = |source: rustix::io::Errno| ConsoleError::Open {
            port: place.name.clone(),
            path: path.to_owned(),
            source: source.into(),
        };
        // Looked at before it is opened: opening a FIFO or a tape has effects of its own.
        let stat = rustix::fs::stat(path).map_err(failed)?;
        let not_a_terminal =
            || ConsoleError::NotATerminal { port: place.name.clone(), path: path.to_owned() };
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::CharacterDevice {
            return Err(not_a_terminal());
        }
        // Without NONBLOCK, open would wait for a modem's carrier.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let device = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        if !rustix::termios::isatty(&device) {
            return Err(not_a_terminal());
        }
        let raw = RawMode::enter(&device).map_err(failed)?;
        Ok(Tty { device: Some(device), _raw: raw })
    }
}

impl Link for Tty {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.device.as_ref().map(AsFd::as_fd)
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.input()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.device {
            Some(device) => Ok(rustix::io::read(device, buffer)?),
            None => Ok(0),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.device {
            Some(device) => Ok(rustix::io::write(device, bytes)?),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// The device is gone (unplugged, or the program behind a pseudo-terminal has ended).
    fn input_ended(&mut self) {
        if self.device.take().is_some() {
            tracing::warn!("the terminal of a serial port is gone; the guest runs on without it");
        }
    }

    fn output_failed(&mut self) {
        self.input_ended();
    }
}
