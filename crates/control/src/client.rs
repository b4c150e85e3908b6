//! The client half of the control protocol.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::protocol::{
    self, Command, Failure, Hello, Line, MAX_RESPONSE_BYTES, Outcome, Request, Response, Stats, Status,
};
use crate::sys;

/// How long a machine may take to answer before the client gives up.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a command got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection could not be made or broke.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// Nothing came within the time.
    #[error("the machine's process does not answer (stopped, or its host overloaded?)")]
    Timeout,
    /// The other side speaks another version.
    #[error("the machine speaks version {0} of the control protocol, this program version {ours}; use its own version's programs", ours = protocol::VERSION)]
    Version(u32),
    /// What came is not the protocol.
    #[error("the control socket answers with something that is not the control protocol: {0}")]
    Nonsense(String),
    /// The machine refused or failed.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// A connection to one machine.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    hello: Hello,
    next_id: u64,
}

impl Client {
    /// Connects to a control socket and reads its [`Hello`].
    ///
    /// # Errors
    /// Nobody listens there, or it is not a control socket of a version that this program speaks.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        Self::connect_with_timeout(socket, DEFAULT_TIMEOUT)
    }

    /// As [`Client::connect`], giving up on each answer after `timeout`.
    ///
    /// # Errors
    /// As for [`Client::connect`].
    pub fn connect_with_timeout(socket: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream = sys::with_socket_path(socket, |path| UnixStream::connect(path))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut stream = BufReader::new(stream);
        let line = receive(&mut stream)?;
        // A server that refuses the connection says why instead of saying hello.
        if let Ok(Response { outcome: Outcome::Error(failure), .. }) = serde_json::from_slice(&line) {
            return Err(failure.into());
        }
        let value: Value = parse(&line)?;
        let version = value.get("apiary_control").and_then(Value::as_u64);
        match version.map(u32::try_from) {
            Some(Ok(protocol::VERSION)) => {}
            Some(other) => return Err(ClientError::Version(other.unwrap_or(u32::MAX))),
            None => return Err(ClientError::Nonsense("no greeting".into())),
        }
        Ok(Client { stream, hello: parse(&line)?, next_id: 1 })
    }

    /// What the machine said first.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Sends one command and waits for its answer.
    ///
    /// # Errors
    /// The connection fails, or the machine refuses ([`ClientError::Refused`]).
    pub fn call(&mut self, command: Command) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = protocol::to_line(&Request { id, command })?;
        self.stream.get_mut().write_all(&line).map_err(map_timeout)?;
        let response: Response = parse(&receive(&mut self.stream)?)?;
        match response.outcome {
            Outcome::Error(failure) => Err(failure.into()),
            Outcome::Ok(_) if response.id != id => {
                Err(ClientError::Nonsense(format!("answer to request {} instead of {id}", response.id)))
            }
            Outcome::Ok(value) => Ok(value),
        }
    }

    /// The machine's [`Status`].
    ///
    /// # Errors
    /// As for [`Client::call`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.typed(Command::Status)
    }

    /// The machine's [`Stats`].
    ///
    /// # Errors
    /// As for [`Client::call`].
    pub fn stats(&mut self) -> Result<Stats, ClientError> {
        self.typed(Command::Stats)
    }

    fn typed<T: DeserializeOwned>(&mut self, command: Command) -> Result<T, ClientError> {
        let value = self.call(command)?;
        serde_json::from_value(value).map_err(|e| ClientError::Nonsense(e.to_string()))
    }
}

fn receive(stream: &mut BufReader<UnixStream>) -> Result<Vec<u8>, ClientError> {
    match protocol::read_line(stream, MAX_RESPONSE_BYTES).map_err(map_timeout)? {
        Line::Whole(line) => Ok(line),
        Line::End | Line::Torn => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Line::TooLong => Err(ClientError::Nonsense("an endless line".into())),
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(line).map_err(|e| ClientError::Nonsense(e.to_string()))
}

fn map_timeout(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout,
        _ => ClientError::Io(error),
    }
}
