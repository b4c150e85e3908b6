//! `bhyvectl`: looks at running virtual machines and tells them what to do (bhyvectl(8)).

mod options;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use control::{ActionError, Command, Runtime, Stats, actions};
use options::{Action, OptionError, Options};

const USAGE: &str = "\
usage: bhyvectl --list [--json]
       bhyvectl --vm=NAME [ACTION ...] [--json]

NAME may also be given bare. Without ACTION the exit status tells whether the VM runs.

  --destroy         end the VM at once
  --force-destroy   the same, and kill its process if it does not answer within a second
  --force-poweroff  cut its power (bhyve exits with status 1)
  --force-reset     press its reset button (bhyve exits with status 0: start it again)
  --get-stats       show its counters
  --inject-nmi      send it a non-maskable interrupt
  --list            show every running VM
  --json            show lists and counters as JSON
  --help, --version

Examples:
  bhyvectl --list
  bhyvectl --vm=g1 --get-stats
  bhyvectl --destroy --vm=g1

The exit status is 0 on success and 1 on failure.
";

/// How long `--destroy` lets a machine end by itself before its process is killed.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for `--force-destroy`.
const LITTLE_PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    match options::parse(arguments) {
        Ok(options) if options.help => print(USAGE),
        Ok(options) if options.version => {
            print(&format!("bhyvectl (Apiary) {}\n", env!("CARGO_PKG_VERSION")))
        }
        Ok(options) => match run(&options) {
            Ok(text) => print(&text),
            Err(message) => fail(&message),
        },
        Err(OptionError::Usage(message)) => {
            eprint!("bhyvectl: {message}\n{USAGE}");
            ExitCode::FAILURE
        }
        Err(OptionError::Unavailable(message)) => fail(&message),
    }
}

/// A reader that has had enough (`bhyvectl --list | head -1`) is no failure.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => fail(&format!("standard output: {e}")),
        _ => ExitCode::SUCCESS,
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("bhyvectl: {message}");
    ExitCode::FAILURE
}

/// Carries the command line out; returns what is to be printed.
fn run(options: &Options) -> Result<String, String> {
    let runtime = Runtime::for_user().map_err(|e| e.to_string())?;
    if options.vm.is_none() && options.actions == [Action::List] {
        return list(&runtime, options.json);
    }
    let Some(name) = &options.vm else {
        return Err("which VM? (--vm=NAME; --list shows those that run, --help the options)".into());
    };
    if options.actions.is_empty() {
        runtime.find(name).map_err(|e| e.to_string())?;
    }
    let mut output = String::new();
    for action in &options.actions {
        let end = |command| actions::end(&runtime, name, command).map(|()| String::new());
        let text = match action {
            Action::List => list(&runtime, options.json)?,
            Action::GetStats => show_stats(&runtime, name, options.json)?,
            Action::Destroy => destroy(&runtime, name, PATIENCE)?,
            Action::ForceDestroy => destroy(&runtime, name, LITTLE_PATIENCE)?,
            Action::ForcePoweroff => end(Command::ForcePoweroff).map_err(|e| e.to_string())?,
            Action::ForceReset => end(Command::ForceReset).map_err(|e| e.to_string())?,
            Action::InjectNmi => {
                actions::call(&runtime, name, Command::InjectNmi).map_err(|e| e.to_string())?;
                String::new()
            }
        };
        output.push_str(&text);
    }
    Ok(output)
}

fn destroy(runtime: &Runtime, name: &str, patience: Duration) -> Result<String, String> {
    actions::destroy(runtime, name, patience).map(|()| String::new()).map_err(|e| e.to_string())
}

fn list(runtime: &Runtime, json: bool) -> Result<String, String> {
    let entries = runtime.list().map_err(|e| e.to_string())?;
    let rows = entries.into_iter().map(|entry| {
        let state = actions::look(&entry).map_or_else(|| "unresponsive".to_owned(), |s| s.state.to_string());
        (entry, state)
    });
    if json {
        let rows = rows.map(|(entry, state)| {
            serde_json::json!({ "name": entry.name, "pid": entry.pid, "engine": entry.engine, "state": state })
        });
        return Ok(format!("{}\n", serde_json::Value::from_iter(rows)));
    }
    let mut text = format!("{:<24} {:>8} {:<6} {}\n", "NAME", "PID", "ENGINE", "STATE");
    for (entry, state) in rows {
        let pid = entry.pid.map_or("-".into(), |p| p.to_string());
        let engine = entry.engine.as_deref().unwrap_or("-");
        text.push_str(&format!("{:<24} {pid:>8} {engine:<6} {state}\n", entry.name));
    }
    Ok(text)
}

fn show_stats(runtime: &Runtime, name: &str, json: bool) -> Result<String, String> {
    let value = actions::call(runtime, name, Command::Stats).map_err(|e: ActionError| e.to_string())?;
    if json {
        return Ok(format!("{value}\n"));
    }
    let stats: Stats =
        serde_json::from_value(value).map_err(|e| format!("VM {name}: strange counters: {e}"))?;
    let mut text = String::new();
    let line = |(name, value): (&String, &u64)| format!("{name:<40}\t{value}\n");
    for vcpu in &stats.vcpus {
        text.push_str(&format!("vcpu{} stats:\n", vcpu.id));
        text.extend(vcpu.counters.iter().map(line));
    }
    text.push_str("vm stats:\n");
    text.extend(stats.vm.iter().map(line));
    Ok(text)
}
