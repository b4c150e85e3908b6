//! `bhyve`: runs a guest operating system inside a virtual machine (bhyve(8)).
//!
//! The exit status tells how it ended: 0 rebooted, 1 powered off, 2 halted, 3 triple fault, 4 error.

mod log;

use std::io::{self, Write};
use std::process::ExitCode;

use config::{Action, CommandLine};
use control::Runtime;
use machine::{Ending, Environment};

/// Exit status of everything that goes wrong (bhyve(8), "EXIT STATUS").
const ERROR: u8 = 4;

fn main() -> ExitCode {
    log::start();
    match config::parse(std::env::args_os().skip(1)) {
        Ok(command_line) => obey(&command_line),
        Err(error) => fail(&error.to_string()),
    }
}

fn obey(command_line: &CommandLine) -> ExitCode {
    match &command_line.action {
        Action::Help => print(&config::usage::text()),
        Action::Version => print(&format!("bhyve (Apiary) {}\n", env!("CARGO_PKG_VERSION"))),
        Action::ListPciDevices => print(&config::pci::device_list()),
        Action::ListLpcDevices => print(&config::lpc::device_list()),
        Action::Dump => print(&command_line.tree.dump()),
        Action::Resume(_) => fail("option -r is not available in this build"),
        Action::Run => {
            command_line.notes.iter().for_each(|note| tell(note));
            match run(command_line) {
                Ok(ending) => end(&ending),
                Err(message) => fail(&message),
            }
        }
    }
}

fn run(command_line: &CommandLine) -> Result<Ending, String> {
    let runtime = Runtime::for_user().map_err(|e| e.to_string())?;
    let environment = Environment { runtime, engines: machine::engines(), notice: &mut tell };
    machine::run(&command_line.tree, environment).map_err(|e| e.to_string())
}

fn end(ending: &Ending) -> ExitCode {
    match ending {
        Ending::Failed(why) => tell(why),
        Ending::Destroyed => tell("the virtual machine was destroyed"),
        Ending::TripleFault => tell("a processor of the guest shut down after a triple fault"),
        Ending::Reset | Ending::PowerOff | Ending::Halt => {}
    }
    ExitCode::from(ending.exit_status())
}

fn tell(line: &str) {
    // Nobody may be listening any more; that changes nothing about the guest.
    let _ = write!(io::stderr(), "bhyve: {line}{}", log::end_of_line());
}

fn fail(message: &str) -> ExitCode {
    tell(message);
    ExitCode::from(ERROR)
}

/// A reader that has had enough (`bhyve -h | head`) is no failure.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => fail(&format!("standard output: {e}")),
        _ => ExitCode::SUCCESS,
    }
}
