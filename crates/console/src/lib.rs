//! The host's end of a serial port (bhyve(8), "TTY device backends"): the process's own terminal, a terminal device, a TCP
//! port, or one end of a null modem (nmdm(4)).
//!
//! A [`Console`] owns one thread, which sleeps in poll(2) until there is something to carry. Towards the guest it hands
//! bytes to a callback that says how many it took, and holds the rest back (and with them the sender) until the device has
//! room again. From the guest it takes bytes through a [`ByteSink`] into a bounded buffer: while somebody listens but is slow, the
//! vCPU waits a little before bytes are lost; while nobody does, the newest bytes are kept for whoever comes first.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # fn uart(_: Arc<dyn devices::host::ByteSink>) -> Arc<dyn Fn(&[u8]) -> usize + Send + Sync> { unimplemented!() }
//! # fn main() -> Result<(), console::ConsoleError> {
//! let place = console::Place::new("com1", "/run/apiary/vmm/guest", "/run/apiary");
//! let console = console::Console::open(&console::Backend::Stdio, &place)?;
//! let receive = uart(console.sink());
//! console.start(move |bytes| receive(bytes))?;
//! # Ok(())
//! # }
//! ```

mod link;
mod null_modem;
mod output;
mod poll;
mod stdio;
mod tcp;
mod terminal;
mod tty;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use devices::host::ByteSink;

use crate::link::Link;
use crate::output::Shared;

pub use null_modem::NullModemEnd;
pub use terminal::restore as restore_terminal;

/// Where the bytes of a serial port go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Standard input and output.
    Stdio,
    /// A terminal device of the host.
    Tty(PathBuf),
    /// A TCP port to listen on; one client at a time.
    Tcp(SocketAddr),
    /// One end of the null modem `/dev/nmdmUNIT`; the other end is for the user.
    NullModem {
        /// What stands between `nmdm` and the letter.
        unit: String,
        /// The end that the guest holds.
        end: NullModemEnd,
    },
}

/// Where a console leaves its traces on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the port, `com1`; also the name of the link in `runtime_dir`.
    pub name: String,
    /// Directory of this VM, which nobody else uses.
    pub runtime_dir: PathBuf,
    /// Directory that all VMs of this user share; holds locks and links of null modems. Made if missing.
    pub shared_dir: PathBuf,
    /// Where device names are, `/dev`.
    pub device_dir: PathBuf,
}

impl Place {
    /// With device names in `/dev`.
    pub fn new(name: &str, runtime_dir: impl Into<PathBuf>, shared_dir: impl Into<PathBuf>) -> Self {
        Place {
            name: name.to_owned(),
            runtime_dir: runtime_dir.into(),
            shared_dir: shared_dir.into(),
            device_dir: PathBuf::from("/dev"),
        }
    }
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Two ports want standard input.
    #[error("{port}: stdio is in use by another serial port; give this one /dev/nmdmNA or tcp=IP:PORT")]
    StdioTaken {
        /// The second port.
        port: String,
    },
    /// The path is no terminal.
    #[error(
        "{port}: {path} is not a terminal device; give a tty such as /dev/ttyS0, or use stdio, tcp=IP:PORT or /dev/nmdmNA"
    )]
    NotATerminal {
        /// Which port.
        port: String,
        /// The path as given.
        path: PathBuf,
    },
    /// The path cannot be opened.
    #[error("{port}: cannot open {path}: {source}{}", advice(.source))]
    Open {
        /// Which port.
        port: String,
        /// The path as given.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("{port}: cannot listen on tcp={address}: {source}{}", advice(.source))]
    Listen {
        /// Which port.
        port: String,
        /// The address as given.
        address: SocketAddr,
        /// The host's answer.
        source: io::Error,
    },
    /// Another VM holds this end of the null modem.
    #[error("{port}: /dev/nmdm{unit}{end:?} is in use by another virtual machine; choose another number")]
    NullModemTaken {
        /// Which port.
        port: String,
        /// The null modem.
        unit: String,
        /// The end asked for.
        end: NullModemEnd,
    },
    /// Something that is not ours is where a link belongs.
    #[error(
        "{port}: {path} exists and is not a link to a null modem of Apiary; move it away or choose another number"
    )]
    Foreign {
        /// Which port.
        port: String,
        /// What is in the way.
        path: PathBuf,
    },
    /// The host refused something else.
    #[error("{port}: cannot {what}: {source}")]
    Host {
        /// Which port.
        port: String,
        /// What was attempted.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
}

/// What to do about an error of the host.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; run as a user that may, or change its permissions",
        io::ErrorKind::AddrInUse => "; another program has it, choose another port",
        io::ErrorKind::AddrNotAvailable => "; the address must be one of this host, or 0.0.0.0",
        _ => "",
    }
}

/// The host's end of one serial port. Dropping it sends what is still buffered (for at most a second), ends the thread, and
/// puts everything on the host back as it was.
pub struct Console {
    shared: Arc<Shared>,
    viewer_paths: Vec<PathBuf>,
    local_address: Option<SocketAddr>,
    port: String,
    /// The backend, until the thread has it.
    link: Mutex<Option<Box<dyn Link>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Console {
    /// Opens a backend. Output is buffered from now on; it is carried once [`Console::start`] has been called.
    ///
    /// # Errors
    /// The backend cannot be had; the message says why and what to do.
    pub fn open(backend: &Backend, place: &Place) -> Result<Self, ConsoleError> {
        let host = |what: &str| {
            let (port, what) = (place.name.clone(), what.to_owned());
            move |source| ConsoleError::Host { port, what, source }
        };
        let shared = Arc::new(Shared::new().map_err(host("make an event descriptor"))?);
        let mut viewer_paths = Vec::new();
        let mut local_address = None;
        let link: Box<dyn Link> = match backend {
            Backend::Stdio => Box::new(stdio::Stdio::open(place)?),
            Backend::Tty(path) => Box::new(tty::Tty::open(path, place)?),
            Backend::Tcp(address) => {
                let tcp = tcp::Tcp::listen(*address, place)?;
                local_address = tcp.local_address();
                Box::new(tcp)
            }
            Backend::NullModem { unit, end } => match null_modem::NullModem::open(unit, *end, place)? {
                null_modem::Opened::Made(modem) => {
                    viewer_paths = modem.viewer_paths();
                    Box::new(modem)
                }
                null_modem::Opened::Peer(path) => Box::new(tty::Tty::open(&path, place)?),
            },
        };
        Ok(Console {
            shared,
            viewer_paths,
            local_address,
            port: place.name.clone(),
            link: Mutex::new(Some(link)),
            thread: Mutex::default(),
        })
    }

    /// Where the device sends its output.
    pub fn sink(&self) -> Arc<dyn ByteSink> {
        self.shared.clone()
    }

    /// Starts carrying bytes; `receive` gets input and returns how many bytes it took from the front. Refused bytes are
    /// offered again after [`ByteSink::input_ready`]. A second call does nothing.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(&self, receive: impl FnMut(&[u8]) -> usize + Send + 'static) -> Result<(), ConsoleError> {
        let Some(link) = self.link.lock().unwrap_or_else(|e| e.into_inner()).take() else { return Ok(()) };
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("console-{}", self.port))
            .spawn(move || worker::run(link, &shared, receive))
            .map_err(|source| ConsoleError::Host {
                port: self.port.clone(),
                what: "start a thread".to_owned(),
                source,
            })?;
        *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(thread);
        Ok(())
    }

    /// Terminal devices at which the user can attach (`cu -l PATH`): the link in the runtime directory first.
    pub fn viewer_paths(&self) -> &[PathBuf] {
        &self.viewer_paths
    }

    /// The address that is listened on, with the port the host chose if 0 was asked for.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.local_address
    }

    /// Bytes of output that were lost because nobody took them.
    pub fn lost_bytes(&self) -> u64 {
        self.shared.lost_bytes()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.shut_down();
        if let Some(thread) = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take() {
            // A panic there has been reported already.
            let _ = thread.join();
        }
    }
}
