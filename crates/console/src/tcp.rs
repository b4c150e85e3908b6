//! A TCP port: one client at a time, bytes as they are; when it leaves, the next may come, at once.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use crate::link::Link;
use crate::{ConsoleError, Place, poll};

/// What a second client is told.
const BUSY: &[u8] = b"This console is in use by another client.\r\n";

/// See the module.
pub struct Tcp {
    listener: TcpListener,
    client: Option<TcpStream>,
    /// A descriptor to give up when the process has no other left: a connection that cannot be accepted would keep the
    /// listener ready for ever.
    spare: Option<File>,
}

impl Tcp {
    /// Listens on `address`.
    pub fn listen(address: SocketAddr, place: &Place) -> Result<Self, ConsoleError> {
        let failed = |source| ConsoleError::Listen { port: place.name.clone(), address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Tcp { listener, client: None, spare: spare() })
    }

    /// The address with the real port.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    fn admit(&mut self, mut client: TcpStream) -> io::Result<()> {
        client.set_nonblocking(true)?;
        // The one before may have left, while a guest that takes no input keeps us from reading the end of its stream.
        let present = self.client.as_ref().is_some_and(|before| !poll::has_left(before));
        if present {
            client.write_all(BUSY)?;
        } else {
            // Keystrokes are small and should not wait for more.
            client.set_nodelay(true)?;
            self.client = Some(client);
        }
        Ok(())
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

impl Link for Tcp {
    fn input(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    fn output(&self) -> Option<BorrowedFd<'_>> {
        self.input()
    }

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.listener.as_fd())
    }

    fn on_event(&mut self) {
        match self.listener.accept() {
            // A client that fails already is one that has left.
            Ok((client, _)) => drop(self.admit(client)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::warn!("a client of a serial port was turned away: {error}");
                self.spare = None;
                drop(self.listener.accept());
                self.spare = spare();
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.client.as_mut().map_or(Ok(0), |client| client.read(buffer))
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.client {
            Some(client) => client.write(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn input_ended(&mut self) {
        self.client = None;
    }

    fn output_failed(&mut self) {
        self.client = None;
    }
}
