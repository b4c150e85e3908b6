//! `bhyvectl` against machines that only claim a name and answer: processes of this same test program.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use control::{ErrorCode, Failure, Handler, MachineState, Runtime, Server, Stats, Status, VcpuStats};
use serde_json::{Value, json};
use tempfile::TempDir;

const ROLE: &str = "APIARY_TEST_MACHINE";

/// Sends on the exit status it is told to end with.
struct Machine(Mutex<Sender<i32>>);

impl Handler for Machine {
    fn handle(&self, command: control::Command) -> Result<Value, Failure> {
        let exit = |status: i32| {
            self.0.lock().unwrap().send(status).unwrap();
            Ok(json!({}))
        };
        match command {
            control::Command::Status => Ok(serde_json::to_value(Status {
                name: "g1".into(),
                pid: std::process::id(),
                engine: "soft".into(),
                state: MachineState::Paused,
                vcpus: 1,
                memory_bytes: 1 << 30,
                guest_ns: 5,
            })
            .unwrap()),
            control::Command::Stats => Ok(serde_json::to_value(Stats {
                vm: BTreeMap::from([("port reads".into(), 3)]),
                vcpus: vec![VcpuStats { id: 0, counters: BTreeMap::from([("exits by HLT".into(), 42)]) }],
            })
            .unwrap()),
            control::Command::Destroy => exit(4),
            control::Command::ForcePoweroff => exit(1),
            control::Command::ForceReset => exit(0),
            _ => Err(Failure::new(ErrorCode::WrongState, "the machine is paused")),
        }
    }
}

/// Not a test of its own: the machine that the others start.
#[test]
fn machine_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let directory = Runtime::for_user().unwrap().claim("g1").unwrap();
    directory.set_engine("soft").unwrap();
    let (exit, status) = channel();
    let machine = Machine(Mutex::new(exit));
    let server =
        (role == "answers").then(|| Server::start(&directory.socket(), "g1", Arc::new(machine)).unwrap());
    println!("\nready");
    let Ok(status) = status.recv() else {
        // Nobody can tell a machine without a server to end.
        loop {
            thread::park();
        }
    };
    drop(server);
    drop(directory);
    std::process::exit(status);
}

struct Bed(TempDir);

#[derive(Debug)]
struct Outcome {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Bed {
    fn new() -> Self {
        Bed(tempfile::tempdir().unwrap())
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("vmm")
    }

    fn machine(&self, role: &str) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "machine_process", "--nocapture"])
            .env("APIARY_RUN", self.root())
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
        child
    }

    fn bhyvectl(&self, arguments: &str) -> Outcome {
        let output = Command::new(env!("CARGO_BIN_EXE_bhyvectl"))
            .args(arguments.split_whitespace())
            .env("APIARY_RUN", self.root())
            .output()
            .unwrap();
        Outcome {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Status 1 and one line that says these words.
fn assert_refused(outcome: &Outcome, words: &[&str]) {
    assert_eq!((outcome.status, outcome.stdout.as_str()), (Some(1), ""), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{outcome:?} does not say {word:?}");
    }
}

#[test]
fn a_machine_is_listed_while_it_runs() {
    let bed = Bed::new();
    let empty = bed.bhyvectl("--list");
    assert_eq!((empty.status, empty.stdout.lines().count()), (Some(0), 1), "{empty:?}");
    let mut machine = bed.machine("answers");
    let list = bed.bhyvectl("--list");
    let row: Vec<_> = list.stdout.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["g1", &machine.id().to_string(), "soft", "paused"]);
    let list: Value = serde_json::from_str(&bed.bhyvectl("--list --json").stdout).unwrap();
    assert_eq!(list, json!([{ "name": "g1", "pid": machine.id(), "engine": "soft", "state": "paused" }]));
    for form in ["--vm=g1", "--vm g1", "g1"] {
        let outcome = bed.bhyvectl(form);
        assert_eq!(
            (outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (Some(0), "", ""),
            "{form}"
        );
    }
    machine.kill().unwrap();
    machine.wait().unwrap();
    assert_eq!(bed.bhyvectl("--list").stdout.lines().count(), 1, "a killed machine is gone from the list");
    assert_refused(&bed.bhyvectl("--vm=g1"), &["g1", "not running"]);
}

#[test]
fn commands_end_it_and_wait_until_it_is_gone() {
    for (option, status) in
        [("--destroy", 4), ("--force-destroy", 4), ("--force-poweroff", 1), ("--force-reset", 0)]
    {
        let bed = Bed::new();
        let mut machine = bed.machine("answers");
        let outcome = bed.bhyvectl(&format!("{option} --vm=g1"));
        assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""), "{option}");
        assert_eq!(bed.bhyvectl("--list").stdout.lines().count(), 1, "{option}: already gone");
        assert_eq!(machine.wait().unwrap().code(), Some(status), "{option}");
        assert!(!bed.root().join("g1").exists(), "{option}: nothing is left");
    }
}

#[test]
fn a_machine_that_does_not_answer_is_killed() {
    let bed = Bed::new();
    let mut deaf = bed.machine("deaf");
    let list = bed.bhyvectl("--list");
    assert!(list.stdout.contains("unresponsive"), "{list:?}");
    assert_refused(&bed.bhyvectl("--force-poweroff g1"), &["g1"]);
    assert_eq!(bed.bhyvectl("--destroy g1").status, Some(0));
    assert_eq!(deaf.wait().unwrap().code(), None, "by a signal");

    let mut stopped = bed.machine("answers");
    let pid = libc::pid_t::try_from(stopped.id()).unwrap();
    // SAFETY: stops a child that has not been waited for, so the number is still its own.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    let outcome = bed.bhyvectl("--force-destroy g1");
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""));
    assert_eq!(stopped.wait().unwrap().code(), None);
    assert!(!bed.root().join("g1").exists());
}

#[test]
fn counters_are_shown_for_people_and_programs() {
    let bed = Bed::new();
    let mut machine = bed.machine("answers");
    let text = bed.bhyvectl("--get-stats --vm=g1").stdout;
    let expected = format!("vcpu0 stats:\n{:<40}\t42\nvm stats:\n{:<40}\t3\n", "exits by HLT", "port reads");
    assert_eq!(text, expected);
    let value: Value = serde_json::from_str(&bed.bhyvectl("--get-stats --json g1").stdout).unwrap();
    assert_eq!(value["vcpus"][0]["counters"]["exits by HLT"], 42);
    assert_refused(&bed.bhyvectl("--inject-nmi g1"), &["g1", "the machine is paused"]);
    machine.kill().unwrap();
    machine.wait().unwrap();
}

#[test]
fn wrong_uses_say_what_is_right() {
    let bed = Bed::new();
    assert_refused(&bed.bhyvectl("--destroy --vm=nobody"), &["nobody", "not running", "--list"]);
    assert_refused(&bed.bhyvectl("--destroy --vm=a/b"), &["a/b"]);
    assert_refused(&bed.bhyvectl("--destroy"), &["--vm=NAME"]);
    assert_refused(&bed.bhyvectl(""), &["--vm=NAME", "--help"]);
    assert_refused(&bed.bhyvectl("--suspend=file g1"), &["--suspend", "not available in this build"]);
    let unknown = bed.bhyvectl("--explode g1");
    assert_eq!(unknown.status, Some(1));
    assert!(unknown.stderr.starts_with("bhyvectl: unknown option --explode\nusage: "), "{unknown:?}");
    let help = bed.bhyvectl("--help");
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    assert!(help.stdout.starts_with("usage: bhyvectl"));
}
