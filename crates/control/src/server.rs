//! The server half of the control protocol: a thread that accepts, one thread per connection, a [`Handler`] that
//! does the work.
//!
//! A client may be slow, silent, or mad without harm to the machine or to other clients: lines are bounded, a line
//! once begun must end within [`LINE_TIMEOUT`], answers must be taken within [`WRITE_TIMEOUT`], at most
//! [`MAX_CONNECTIONS`] are open, and a connection on which nothing happens for [`IDLE_TIMEOUT`] ends. Only the user who
//! runs the machine, and root, get in: the socket is mode 0600 in a directory of mode 0700, and the peer's user id
//! is checked.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::protocol::{
    self, Command, ErrorCode, Failure, Hello, Line, MAX_REQUEST_BYTES, Outcome, Response, parse_request,
};
use crate::sys;

/// Connections open at the same time.
pub const MAX_CONNECTIONS: usize = 16;
/// From the first byte of a request to its last.
pub const LINE_TIMEOUT: Duration = Duration::from_secs(5);
/// For a client to take an answer.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between requests.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// What carries commands out. Called from several threads; a call may take its time, only its client waits.
pub trait Handler: Send + Sync {
    /// Carries out one command.
    ///
    /// # Errors
    /// What the client is to be told.
    fn handle(&self, command: Command) -> Result<Value, Failure>;
}

/// A running control server. Dropping it lets commands in progress be answered, then closes every connection and the
/// socket.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    hello: Vec<u8>,
    connections: Mutex<Connections>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    stopping: bool,
    next: u64,
    open: HashMap<u64, UnixStream>,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Server {
    /// Listens on `socket`, which must not exist, and serves `handler` under `name`.
    ///
    /// # Errors
    /// The host refuses the socket or the thread.
    pub fn start(socket: &Path, name: &str, handler: Arc<dyn Handler>) -> io::Result<Self> {
        let listener = Arc::new(sys::with_socket_path(socket, |path| UnixListener::bind(path))?);
        std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600))?;
        let hello = Hello {
            apiary_control: protocol::VERSION,
            program: format!("apiary {}", env!("CARGO_PKG_VERSION")),
            name: name.to_owned(),
            pid: std::process::id(),
        };
        let shared = Arc::new(Shared {
            hello: protocol::to_line(&hello)?,
            connections: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = {
            let (listener, shared) = (listener.clone(), shared.clone());
            thread::Builder::new()
                .name("control".into())
                .spawn(move || accept(&listener, &shared, &handler))?
        };
        Ok(Server { shared, listener, accepting: Some(accepting) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.connections().stopping = true;
        // SAFETY: the descriptor is open; shutting a listening socket down makes accept(2) return.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
        let connections = self.shared.connections();
        for stream in connections.open.values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let done = |c: &mut Connections| !c.open.is_empty();
        let _ = self.shared.changed.wait_timeout_while(connections, 2 * WRITE_TIMEOUT, done);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, handler: &Arc<dyn Handler>) {
    loop {
        let accepted = listener.accept();
        if shared.connections().stopping {
            return;
        }
        match accepted {
            Ok((stream, _)) => admit(stream, shared, handler),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ECONNABORTED) => {}
                // Out of descriptors or memory: wait for a connection to end rather than spin.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    let connections = shared.connections();
                    drop(shared.changed.wait_timeout(connections, Duration::from_secs(1)));
                }
                _ => return,
            },
        }
    }
}

/// Gives a new connection its thread, or turns it away.
fn admit(stream: UnixStream, shared: &Arc<Shared>, handler: &Arc<dyn Handler>) {
    let allowed = sys::peer_uid(&stream).is_ok_and(|uid| uid == 0 || uid == sys::effective_uid());
    let timeouts = stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let (true, Ok(()), Ok(registered)) = (allowed, timeouts, stream.try_clone()) else { return };
    let id = {
        let mut connections = shared.connections();
        if connections.open.len() >= MAX_CONNECTIONS {
            drop(connections);
            let failure = Failure::new(ErrorCode::Busy, "too many connections; close some and try again");
            let response = Response { id: 0, outcome: Outcome::Error(failure) };
            // A fresh socket's buffer takes one line without blocking.
            let _ = protocol::to_line(&response).and_then(|line| (&stream).write_all(&line));
            return;
        }
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, registered);
        id
    };
    let open = Registration { shared: shared.clone(), id };
    let handler = handler.clone();
    // A failed spawn drops the closure, and with it the registration and the connection.
    let _ = thread::Builder::new().name("control client".into()).spawn(move || {
        let _ = converse(stream, &open.shared.hello, &*handler);
    });
}

/// Removes a connection from the list of open ones when its thread ends, however it ends.
struct Registration {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared.connections().open.remove(&self.id);
        self.shared.changed.notify_all();
    }
}

/// Serves one connection until it ends or misbehaves.
fn converse(stream: UnixStream, hello: &[u8], handler: &dyn Handler) -> io::Result<()> {
    let mut output = stream.try_clone()?;
    let mut input = BufReader::new(TimedReader { stream, deadline: None });
    output.write_all(hello)?;
    loop {
        input.get_mut().deadline = None;
        if input.fill_buf()?.is_empty() {
            return Ok(());
        }
        input.get_mut().deadline = Some(Instant::now() + LINE_TIMEOUT);
        let (id, result, last) = match protocol::read_line(&mut input, MAX_REQUEST_BYTES)? {
            Line::End | Line::Torn => return Ok(()),
            Line::TooLong => {
                let message = format!("request longer than {MAX_REQUEST_BYTES} bytes");
                (0, Err(Failure::new(ErrorCode::TooLong, message)), true)
            }
            Line::Whole(line) => match parse_request(&line) {
                Ok(request) => (request.id, handler.handle(request.command), false),
                Err((id, failure)) => {
                    let last = failure.code == ErrorCode::BadRequest;
                    (id, Err(failure), last)
                }
            },
        };
        let outcome = match result {
            Ok(value) => Outcome::Ok(value),
            Err(failure) => Outcome::Error(failure),
        };
        output.write_all(&protocol::to_line(&Response { id, outcome })?)?;
        if last {
            return Ok(());
        }
    }
}

/// Reads from a stream until a deadline; without one, for [`IDLE_TIMEOUT`].
struct TimedReader {
    stream: UnixStream,
    deadline: Option<Instant>,
}

impl Read for TimedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = match self.deadline {
            None => IDLE_TIMEOUT,
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        };
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}
