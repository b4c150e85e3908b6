//! Runs `bhyve` on guests of a few instructions.
#![allow(dead_code)]

#[path = "../../../machine/tests/common/guest.rs"]
pub mod guest;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;

use engine::EngineKind;
use iced_x86::code_asm::CodeAssembler;
use tempfile::TempDir;

/// A runtime directory and guests of one test.
pub struct Bed {
    directory: TempDir,
}

/// What a finished run left. Standard output is the guest's, which may be any bytes: one character each.
#[derive(Debug)]
pub struct Outcome {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Outcome {
            status: output.status.code(),
            stdout: output.stdout.iter().map(|byte| char::from(*byte)).collect(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Bed {
    pub fn new() -> Self {
        Bed { directory: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where this test's machines live.
    pub fn runtime(&self) -> PathBuf {
        self.path("vmm")
    }

    /// `bhyve` with arguments separated by spaces, in this test's runtime directory.
    pub fn bhyve(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bhyve"));
        command
            .args(arguments.split_whitespace())
            .env("APIARY_RUN", self.runtime())
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        // Tests may run where some signals are ignored, as under nohup(1), and programs inherit that.
        // SAFETY: signal(2) is async-signal-safe, as what runs between fork and exec has to be.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        command
    }

    pub fn run(&self, arguments: &str) -> Outcome {
        self.bhyve(arguments).output().unwrap().into()
    }

    /// `bhyve` on a guest of this program, with com1 on standard output; `None` where this host has no engine for it.
    pub fn guest(&self, arguments: &str, program: impl FnOnce(&mut CodeAssembler)) -> Option<Command> {
        let kernel = self.path("kernel");
        fs::write(&kernel, guest::kernel(program)).unwrap();
        let mut command =
            self.bhyve("-s 0,hostbridge -s 31,lpc -l com1,stdio -m 32M --kernel kernel --engine");
        command.arg(usable_engine()?.to_string()).args(arguments.split_whitespace()).arg("g1");
        Some(command)
    }

    /// Nothing of any machine is left.
    pub fn assert_clean(&self) {
        let left: Vec<_> = match fs::read_dir(self.runtime()) {
            Ok(files) => files.map(|f| f.unwrap().file_name()).filter(|name| name != ".lock").collect(),
            Err(_) => Vec::new(),
        };
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// The engine that runs tests' guests: the software CPU, or KVM where the build has only that.
fn usable_engine() -> Option<EngineKind> {
    static ENGINE: OnceLock<Option<EngineKind>> = OnceLock::new();
    *ENGINE.get_or_init(|| {
        let engines = machine::engines();
        let works = engines.iter().filter(|e| e.supported_cpuid().is_ok()).map(|e| e.kind());
        let chosen = works.max_by_key(|kind| *kind == EngineKind::Soft);
        if chosen.is_none() {
            eprintln!("no engine of this build runs here: guests are not tried");
        }
        chosen
    })
}

/// A machine that runs.
pub struct Running {
    pub child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: ChildStderr,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = child.stderr.take().unwrap();
        Running { child, stdout, stderr }
    }

    /// Waits for a line from the guest.
    pub fn wait_for(&mut self, wanted: &str) {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).unwrap() > 0 {
            if line.trim_end() == wanted {
                return;
            }
            line.clear();
        }
        let mut why = String::new();
        self.stderr.read_to_string(&mut why).unwrap();
        panic!("the guest never said {wanted:?}: {why}");
    }

    pub fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: sends a signal to a child that has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    pub fn finish(mut self) -> Outcome {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut stderr).unwrap();
        Outcome { status: self.child.wait().unwrap().code(), stdout, stderr }
    }
}

/// A control connection by hand, past its greeting.
pub fn connect(bed: &Bed, name: &str) -> control::Client {
    control::Client::connect(&bed.runtime().join(name).join("control.sock")).unwrap()
}

/// Whether somebody listens there.
pub fn listens(bed: &Bed, name: &str) -> bool {
    UnixStream::connect(bed.runtime().join(name).join("control.sock")).is_ok()
}
