//! The control protocol, version 1: JSON objects, one a line (`docs/control-protocol.md`).
//!
//! The server speaks first, with a [`Hello`]. Then each [`Request`] line is answered by one [`Response`] line with the
//! same `id`, in order. Unknown fields are ignored on both sides, so fields can be added without a new version.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the protocol: changes only when an old client would misunderstand a new server.
pub const VERSION: u32 = 1;
/// Longest line in bytes, its end included, that either side accepts from the other as a request.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Longest line in bytes that a client accepts: statistics of many vCPUs are long.
pub const MAX_RESPONSE_BYTES: usize = 16 * 1024 * 1024;

/// What the server says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub apiary_control: u32,
    /// Version of the program, for people.
    pub program: String,
    /// The VM's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
}

/// What a client wants done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Tell the machine's [`Status`].
    Status,
    /// Tell the machine's [`Stats`].
    Stats,
    /// End the VM at once; its process exits.
    Destroy,
    /// Cut the power: the process exits as after a guest's power-off.
    ForcePoweroff,
    /// Press the reset button: the process exits as after a guest's reboot.
    ForceReset,
    /// Press the ACPI power button.
    PowerButton,
    /// Stop the vCPUs and the guest's clock.
    Pause,
    /// Go on.
    Resume,
    /// Send a non-maskable interrupt to every vCPU.
    InjectNmi,
}

impl Command {
    /// The word that stands for it on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Status => "status",
            Command::Stats => "stats",
            Command::Destroy => "destroy",
            Command::ForcePoweroff => "force-poweroff",
            Command::ForceReset => "force-reset",
            Command::PowerButton => "power-button",
            Command::Pause => "pause",
            Command::Resume => "resume",
            Command::InjectNmi => "inject-nmi",
        }
    }

    /// Every command of this version, in the order of the document.
    pub const ALL: [Command; 9] = [
        Command::Status,
        Command::Stats,
        Command::Destroy,
        Command::ForcePoweroff,
        Command::ForceReset,
        Command::PowerButton,
        Command::Pause,
        Command::Resume,
        Command::InjectNmi,
    ];
}

/// One line from client to server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the response.
    #[serde(default)]
    pub id: u64,
    /// What is to be done.
    #[serde(flatten)]
    pub command: Command,
}

/// One line from server to client, after the [`Hello`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// That of the request; 0 where the request could not be read.
    pub id: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Exactly one of the two.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The command was carried out (or has irrevocably begun, for those that end the VM).
    Ok(Value),
    /// It was not.
    Error(Failure),
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: ErrorCode,
    /// For people: one line.
    pub message: String,
}

impl Failure {
    /// A failure with its message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Failure { code, message: message.into() }
    }
}

/// Kinds of [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The line is not a request. The connection ends.
    BadRequest,
    /// The line is longer than [`MAX_REQUEST_BYTES`]. The connection ends.
    TooLong,
    /// No such command in this version.
    UnknownCommand,
    /// The machine is in no state for it (say, resume while running).
    WrongState,
    /// The machine could not do it.
    Failed,
    /// Too many connections are open. The connection ends.
    Busy,
    /// Something that this version does not know.
    #[serde(other)]
    Other,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Being put together.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and clock stand still.
    Paused,
    /// Its process is about to exit.
    Stopping,
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MachineState::Starting => "starting",
            MachineState::Running => "running",
            MachineState::Paused => "paused",
            MachineState::Stopping => "stopping",
        })
    }
}

/// Answer to [`Command::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What runs its processors: `kvm` or `soft`.
    pub engine: String,
    /// What it is doing.
    pub state: MachineState,
    /// Number of virtual processors.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The guest's clock: nanoseconds since power-on without pauses.
    pub guest_ns: u64,
}

/// Answer to [`Command::Stats`]: counters by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Of the machine as a whole.
    pub vm: BTreeMap<String, u64>,
    /// Of each vCPU.
    pub vcpus: Vec<VcpuStats>,
}

/// Counters of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Its number.
    pub id: u32,
    /// Exits by reason; instructions where the engine counts them.
    pub counters: BTreeMap<String, u64>,
}

/// Reads one request line. On failure the id is that of the request as far as it could be read.
///
/// # Errors
/// It is not a JSON object, or names no command of this version.
pub fn parse_request(line: &[u8]) -> Result<Request, (u64, Failure)> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|e| (0, Failure::new(ErrorCode::BadRequest, format!("not a JSON line: {e}"))))?;
    let id = value.get("id").and_then(Value::as_u64).unwrap_or(0);
    let Some(name) = value.get("command").and_then(Value::as_str) else {
        let message = "a request is an object with `command`, a string, and `id`, a number";
        return Err((id, Failure::new(ErrorCode::BadRequest, message)));
    };
    if !Command::ALL.iter().any(|c| c.name() == name) {
        let known = Command::ALL.map(|c| c.name()).join(", ");
        let shown: String = name.chars().take(40).collect();
        let message = format!("unknown command {shown:?}; this machine knows {known}");
        return Err((id, Failure::new(ErrorCode::UnknownCommand, message)));
    }
    serde_json::from_value(value)
        .map_err(|e| (id, Failure::new(ErrorCode::BadRequest, format!("bad request: {e}"))))
}

/// Writes `message` as one line.
pub fn to_line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

/// What [`read_line`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A whole line, without its end.
    Whole(Vec<u8>),
    /// The other side closed the connection between lines.
    End,
    /// The other side closed the connection within a line.
    Torn,
    /// More than `max_bytes` without an end of line.
    TooLong,
}

/// Reads one line of at most `max_bytes`, end included; never holds more than that.
///
/// # Errors
/// The connection fails or times out.
pub fn read_line(input: &mut impl BufRead, max_bytes: usize) -> io::Result<Line> {
    let mut line = Vec::new();
    loop {
        let available = match input.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if available.is_empty() {
            return Ok(if line.is_empty() { Line::End } else { Line::Torn });
        }
        let end = available.iter().position(|b| *b == b'\n');
        let taken = end.map_or(available.len(), |e| e + 1);
        if line.len() + taken > max_bytes {
            return Ok(Line::TooLong);
        }
        line.extend_from_slice(&available[..end.unwrap_or(taken)]);
        input.consume(taken);
        if end.is_some() {
            return Ok(Line::Whole(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_spelled_as_its_name() {
        for command in Command::ALL {
            let line = to_line(&Request { id: 7, command: command.clone() }).unwrap();
            assert_eq!(line, format!("{{\"id\":7,\"command\":\"{}\"}}\n", command.name()).into_bytes());
            assert_eq!(parse_request(&line), Ok(Request { id: 7, command }));
        }
    }

    #[test]
    fn bad_requests_are_told_apart() {
        let code = |line: &[u8]| parse_request(line).map_err(|(id, f)| (id, f.code)).unwrap_err();
        assert_eq!(code(b""), (0, ErrorCode::BadRequest));
        assert_eq!(code(b"\xff\xfe{"), (0, ErrorCode::BadRequest));
        assert_eq!(code(b"[1]"), (0, ErrorCode::BadRequest));
        assert_eq!(code(b"{\"id\":3}"), (3, ErrorCode::BadRequest));
        assert_eq!(code(b"{\"id\":3,\"command\":5}"), (3, ErrorCode::BadRequest));
        assert_eq!(code(b"{\"id\":3,\"command\":\"explode\"}"), (3, ErrorCode::UnknownCommand));
        assert_eq!(code(b"{\"id\":\"x\",\"command\":\"status\"}"), (0, ErrorCode::BadRequest));
        let deep = "[".repeat(30_000);
        assert_eq!(code(deep.as_bytes()), (0, ErrorCode::BadRequest));
    }

    #[test]
    fn outcomes_have_the_documented_form() {
        let ok = Response { id: 1, outcome: Outcome::Ok(serde_json::json!({})) };
        assert_eq!(to_line(&ok).unwrap(), b"{\"id\":1,\"ok\":{}}\n");
        let failure = Failure::new(ErrorCode::WrongState, "no");
        let error = Response { id: 1, outcome: Outcome::Error(failure) };
        assert_eq!(
            to_line(&error).unwrap(),
            b"{\"id\":1,\"error\":{\"code\":\"wrong-state\",\"message\":\"no\"}}\n"
        );
        let newer: Response =
            serde_json::from_str(r#"{"id":1,"error":{"code":"from-the-future","message":"m"}}"#).unwrap();
        assert!(matches!(newer.outcome, Outcome::Error(Failure { code: ErrorCode::Other, .. })));
    }

    #[test]
    fn lines_are_bounded() {
        let read = |mut bytes: &[u8]| read_line(&mut bytes, 4).unwrap();
        assert_eq!(read(b"abc\nd"), Line::Whole(b"abc".to_vec()));
        assert_eq!(read(b"abcd\n"), Line::TooLong);
        assert_eq!(read(b"ab"), Line::Torn);
        assert_eq!(read(b""), Line::End);
    }
}
