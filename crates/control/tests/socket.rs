//! The control socket against good, slow and mad clients.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use control::protocol::MAX_REQUEST_BYTES;
use control::server::MAX_CONNECTIONS;
use control::{Client, ClientError, Command, ErrorCode, Failure, Handler, Server};
use serde_json::{Value, json};

struct Echo;

impl Handler for Echo {
    fn handle(&self, command: Command) -> Result<Value, Failure> {
        match command {
            Command::Resume => Err(Failure::new(ErrorCode::WrongState, "it runs")),
            Command::Pause => panic!("a handler's bug"),
            other => Ok(json!({ "did": other.name() })),
        }
    }
}

struct Bed {
    socket: PathBuf,
    _server: Server,
}

fn bed(test: &str, handler: impl Handler + 'static) -> Bed {
    let socket = std::env::temp_dir().join(format!("apiary-{test}-{}.sock", std::process::id()));
    let _ = fs::remove_file(&socket);
    let server = Server::start(&socket, "g1", Arc::new(handler)).unwrap();
    Bed { socket, _server: server }
}

impl Bed {
    /// Connects by hand and reads the greeting.
    fn raw(&self) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(UnixStream::connect(&self.socket).unwrap());
        let hello = line(&mut stream);
        assert_eq!((&hello["apiary_control"], &hello["name"]), (&json!(1), &json!("g1")), "{hello}");
        stream
    }

    fn still_serves(&self) {
        let mut client = Client::connect(&self.socket).unwrap();
        assert_eq!(client.call(Command::Status).unwrap(), json!({ "did": "status" }));
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

fn line(stream: &mut BufReader<UnixStream>) -> Value {
    let mut text = String::new();
    stream.read_line(&mut text).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
}

fn at_end(stream: &mut BufReader<UnixStream>) -> bool {
    let mut rest = Vec::new();
    // A reset is an end too: the server closed with our bytes unread.
    stream.read_to_end(&mut rest).is_err() || rest.is_empty()
}

#[test]
fn commands_are_answered_in_order() {
    let bed = bed("order", Echo);
    assert_eq!(fs::metadata(&bed.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut client = Client::connect(&bed.socket).unwrap();
    assert_eq!(client.hello().pid, std::process::id());
    assert_eq!(client.call(Command::Destroy).unwrap(), json!({ "did": "destroy" }));
    let refused = client.call(Command::Resume).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(Failure { code: ErrorCode::WrongState, .. })));
    assert_eq!(refused.to_string(), "it runs");

    let mut raw = bed.raw();
    let both = b"{\"id\":8,\"command\":\"status\"}\n{\"command\":\"stats\",\"extra\":[1],\"id\":9}\n";
    raw.get_mut().write_all(both).unwrap();
    assert_eq!(line(&mut raw), json!({ "id": 8, "ok": { "did": "status" } }));
    assert_eq!(line(&mut raw), json!({ "id": 9, "ok": { "did": "stats" } }));
}

#[test]
fn garbage_ends_its_connection_only() {
    let bed = bed("garbage", Echo);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..200 {
        let mut bytes: Vec<u8> = (0..round * 3 + 1)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                (seed >> 32) as u8
            })
            .collect();
        bytes.push(b'\n');
        let mut raw = bed.raw();
        let _ = raw.get_mut().write_all(&bytes);
        assert_eq!(line(&mut raw)["error"]["code"], "bad-request");
        assert!(at_end(&mut raw));
    }
    // An unknown command is no reason to hang up: the client may be newer than the server.
    let mut raw = bed.raw();
    raw.get_mut().write_all(b"{\"id\":1,\"command\":\"fly\"}\n{\"id\":2,\"command\":\"status\"}\n").unwrap();
    assert_eq!(line(&mut raw)["error"]["code"], "unknown-command");
    assert_eq!(line(&mut raw)["id"], 2);
    bed.still_serves();
}

#[test]
fn oversized_and_torn_lines_are_cut_off() {
    let bed = bed("oversized", Echo);
    let mut raw = bed.raw();
    let _ = raw.get_mut().write_all(&vec![b' '; MAX_REQUEST_BYTES + 1]);
    assert_eq!(line(&mut raw)["error"]["code"], "too-long");
    assert!(at_end(&mut raw));

    let mut raw = bed.raw();
    raw.get_mut().write_all(b"{\"id\":1,\"command\":\"destroy\"").unwrap();
    raw.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(at_end(&mut raw), "half a command is not carried out");
    bed.still_serves();
}

#[test]
fn a_panicking_handler_costs_one_connection() {
    let bed = bed("panic", Echo);
    let mut client = Client::connect(&bed.socket).unwrap();
    assert!(matches!(client.call(Command::Pause), Err(ClientError::Io(_))));
    bed.still_serves();
}

#[test]
fn silent_clients_cannot_lock_others_out_for_good() {
    let bed = bed("crowd", Echo);
    let mut crowd: Vec<_> = (0..MAX_CONNECTIONS).map(|_| bed.raw()).collect();
    let refused = Client::connect(&bed.socket).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(Failure { code: ErrorCode::Busy, .. })), "{refused}");
    let mut leaver = crowd.pop().unwrap();
    leaver.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(at_end(&mut leaver), "the server lets go");
    drop(leaver);
    // Its place is free once its thread has ended, shortly after the connection has.
    while let Err(error) = Client::connect(&bed.socket) {
        assert!(matches!(error, ClientError::Refused(_)), "{error}");
        thread::yield_now();
    }
}

/// Waits for a word before it answers.
struct Slow {
    entered: Sender<()>,
    go: Mutex<Receiver<()>>,
}

impl Handler for Slow {
    fn handle(&self, _: Command) -> Result<Value, Failure> {
        let _ = self.entered.send(());
        let _ = self.go.lock().unwrap().recv();
        Ok(json!("late"))
    }
}

#[test]
fn stopping_answers_what_was_begun_and_ends_the_rest() {
    let (entered, has_entered) = channel();
    let (go, gate) = channel();
    let bed = bed("stop", Slow { entered, go: Mutex::new(gate) });
    let mut idle = bed.raw();
    let mut client = Client::connect(&bed.socket).unwrap();
    let waiting = thread::spawn(move || client.call(Command::Destroy));
    has_entered.recv().unwrap();
    let dropping = thread::spawn(move || drop(bed));
    assert!(at_end(&mut idle));
    go.send(()).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), json!("late"));
    dropping.join().unwrap();
}

#[test]
fn clients_survive_strange_servers() {
    let socket = std::env::temp_dir().join(format!("apiary-strange-{}.sock", std::process::id()));
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let (answer, answers) = channel::<&'static [u8]>();
    let server = thread::spawn(move || {
        for bytes in answers {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(bytes).unwrap();
        }
    });
    let connect = |bytes: &'static [u8]| {
        answer.send(bytes).unwrap();
        Client::connect_with_timeout(&socket, Duration::from_secs(5)).unwrap_err()
    };
    assert!(matches!(connect(b""), ClientError::Io(_)));
    assert!(matches!(connect(b"SSH-2.0\r\n"), ClientError::Nonsense(_)));
    assert!(matches!(connect(b"{}\n"), ClientError::Nonsense(_)));
    assert!(matches!(connect(b"{\"apiary_control\":99}\n"), ClientError::Version(99)));
    drop(answer);
    server.join().unwrap();
    fs::remove_file(&socket).unwrap();
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let socket = std::env::temp_dir().join(format!("apiary-mute-{}.sock", std::process::id()));
    let _ = fs::remove_file(&socket);
    let _listener = UnixListener::bind(&socket).unwrap();
    let error = Client::connect_with_timeout(&socket, Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, ClientError::Timeout), "{error}");
    fs::remove_file(&socket).unwrap();
}

#[test]
fn a_path_too_long_for_a_socket_address_works() {
    let directory =
        std::env::temp_dir().join(format!("apiary-long-{}", std::process::id())).join("d".repeat(150));
    fs::create_dir_all(&directory).unwrap();
    let socket = directory.join("control.sock");
    let server = Server::start(&socket, "g1", Arc::new(Echo)).unwrap();
    Client::connect(&socket).unwrap().call(Command::Status).unwrap();
    drop(server);
    fs::remove_dir_all(directory.parent().unwrap()).unwrap();
}
