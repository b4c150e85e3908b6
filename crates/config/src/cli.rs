//! The command line of bhyve(8).
//!
//! Options are read as getopt(3) reads them: single letters, several behind one dash, an argument in the same word
//! or the next, `--` for the end. Apiary adds long options and a list of CPU features (`+avx2,-x2apic`), which may
//! stand wherever an option may. One table of options serves for reading arguments and for writing the usage text.

mod error;
mod options;

use std::ffi::OsString;
use std::path::PathBuf;

pub use error::{ArgumentError, CliError};
use options::{Effect, OptionSpec};
pub(crate) use options::{Group, OPTIONS};

use crate::error::nearest;
use crate::file::{self, FileError};
use crate::settings::{CpuFeatures, VmName};
use crate::tree::Tree;
use crate::value::{MAX_HOST_CPUS, ValueError, parse_integer};
use crate::{lpc, pci};

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run the virtual machine that the tree describes.
    Run,
    /// Resume the virtual machine from the snapshot in this file (`-r`).
    Resume(PathBuf),
    /// Print [`crate::usage::text`] and succeed.
    Help,
    /// Print the program's version and succeed.
    Version,
    /// Print [`Tree::dump`] and succeed.
    Dump,
    /// Print [`pci::device_list`] and succeed.
    ListPciDevices,
    /// Print [`lpc::device_list`] and succeed.
    ListLpcDevices,
}

/// A command line that was understood.
#[derive(Clone, Debug)]
pub struct CommandLine {
    /// All variables.
    pub tree: Tree,
    /// What to do with them.
    pub action: Action,
    /// One-line remarks for the user about what is accepted but has no effect.
    pub notes: Vec<String>,
}

/// Reads the arguments of bhyve, without the program's own name. Configuration files are read as `-k` names them.
pub fn parse<I>(arguments: I) -> Result<CommandLine, CliError>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let mut words = arguments.into_iter().map(|argument| one_line(argument.into()));
    let mut reader = Reader::new();
    let mut name: Option<String> = None;
    let mut only_operands = false;
    while let Some(word) = words.next() {
        let word = word?;
        if let Some(name) = name {
            return Err(CliError::AfterName { extra: word, name });
        }
        if only_operands || !word.starts_with(['-', '+']) || word == "-" {
            let features = only_operands && word.starts_with(['+', '-']);
            if features { reader.features(&word)? } else { name = Some(word) }
        } else if word == "--" {
            only_operands = true;
        } else if word.starts_with('+') {
            reader.features(&word)?;
        } else if let Some(option) = word.strip_prefix("--") {
            reader.long(option, &mut words)?;
        } else {
            reader.cluster(&word[1..], &mut words)?;
        }
        if let Some(action) = reader.stop {
            return Ok(CommandLine { tree: reader.tree, action, notes: reader.notes });
        }
    }
    reader.finish(name)
}

/// The state of reading a command line.
struct Reader {
    tree: Tree,
    notes: Vec<String>,
    resume: Option<PathBuf>,
    stop: Option<Action>,
}

type Words<'w> = &'w mut dyn Iterator<Item = Result<String, CliError>>;

impl Reader {
    fn new() -> Self {
        Self { tree: Tree::with_defaults(), notes: Vec::new(), resume: None, stop: None }
    }

    /// The letters behind one dash. The first that takes an argument takes the rest of the word, or the next word.
    fn cluster(&mut self, letters: &str, words: Words<'_>) -> Result<(), CliError> {
        for (at, letter) in letters.char_indices() {
            let spelt = format!("-{letter}");
            let Some(spec) = OPTIONS.iter().find(|spec| spec.short == Some(letter)) else {
                return Err(CliError::UnknownOption { option: spelt, suggestion: None });
            };
            if !spec.takes_argument() {
                self.apply(spec, spelt, String::new())?;
                if self.stop.is_some() {
                    break;
                }
                continue;
            }
            let rest = &letters[at + letter.len_utf8()..];
            let argument = if rest.is_empty() { next_word(spec, &spelt, words)? } else { rest.to_owned() };
            return self.apply(spec, spelt, argument);
        }
        Ok(())
    }

    /// `name`, `name=value`, or `name` with its value in the next word.
    fn long(&mut self, option: &str, words: Words<'_>) -> Result<(), CliError> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (option, None),
        };
        let spelt = format!("--{name}");
        let Some(spec) = OPTIONS.iter().find(|spec| spec.long == Some(name)) else {
            let suggestion = nearest(name, OPTIONS.iter().filter_map(|spec| spec.long));
            return Err(CliError::UnknownOption { option: spelt, suggestion });
        };
        let argument = match (spec.takes_argument(), value) {
            (true, Some(value)) => value,
            (true, None) => next_word(spec, &spelt, words)?,
            (false, Some(argument)) => return Err(CliError::UnwantedArgument { option: spelt, argument }),
            (false, None) => String::new(),
        };
        self.apply(spec, spelt, argument)
    }

    fn apply(&mut self, spec: &OptionSpec, option: String, argument: String) -> Result<(), CliError> {
        let result = match &spec.effect {
            Effect::Flag(variable, value) => self.tree.set_bool(variable, *value).map_err(Into::into),
            Effect::Store(variable, check) => self.store(variable, &argument, *check),
            Effect::Read(read) => {
                let notes = self.notes.len();
                let result = read(self, &argument);
                for note in &mut self.notes[notes..] {
                    *note = format!("{option} {argument}: {note}");
                }
                result
            }
            Effect::Stop(action) => {
                self.stop.get_or_insert(action.clone());
                Ok(())
            }
            Effect::Obsolete(note) => {
                self.notes.push((*note).to_owned());
                Ok(())
            }
        };
        result.map_err(|problem| CliError::Argument {
            option,
            argument,
            form: (!problem.is_complete()).then(|| spec.form()),
            problem: Box::new(problem),
        })
    }

    fn store(
        &mut self,
        variable: &str,
        argument: &str,
        check: fn(&str) -> Result<(), ValueError>,
    ) -> Result<(), ArgumentError> {
        if !argument.is_empty() {
            check(argument)?;
        }
        Ok(self.tree.set(variable, argument)?)
    }

    /// What remains to be checked once every option has been read.
    fn finish(mut self, name: Option<String>) -> Result<CommandLine, CliError> {
        if let Some(name) = name {
            name.parse::<VmName>().map_err(CliError::Name)?;
            self.tree.set("name", name).map_err(|_| CliError::NoName)?;
        }
        let dump = self.tree.root().boolean("config.dump", false).map_err(CliError::Dump)?;
        let action = match self.resume {
            _ if dump => Action::Dump,
            Some(file) => Action::Resume(file),
            None if self.tree.raw("name").is_none() => return Err(CliError::NoName),
            None => Action::Run,
        };
        Ok(CommandLine { tree: self.tree, action, notes: self.notes })
    }

    /// `+feature,-feature`; several lists add up.
    fn features(&mut self, list: &str) -> Result<(), CliError> {
        let error = |problem| CliError::Features { list: list.to_owned(), problem };
        list.parse::<CpuFeatures>().map_err(error)?;
        let all = match self.tree.raw("cpu.features") {
            Some(earlier) => format!("{earlier},{list}"),
            None => list.to_owned(),
        };
        self.tree.set("cpu.features", all).map_err(|problem| CliError::Argument {
            option: "CPU features".to_owned(),
            argument: list.to_owned(),
            problem: Box::new(problem.into()),
            form: None,
        })
    }

    /// `-c`; a bare number is the CPUs, and an empty argument is one CPU.
    fn topology(&mut self, argument: &str) -> Result<(), ArgumentError> {
        if argument.is_empty() {
            for variable in ["cpus", "sockets", "cores", "threads"] {
                self.tree.set(variable, "1")?;
            }
        }
        for item in argument.split(',').filter(|item| !item.is_empty()) {
            let (key, value) = item.split_once('=').unwrap_or(("cpus", item));
            if !matches!(key, "cpus" | "sockets" | "cores" | "threads") {
                return Err(ArgumentError::TopologyKey { key: key.to_owned() });
            }
            const MAX: i64 = u16::MAX as i64;
            if !value.contains('%') && !value.is_empty() {
                let in_range = (1..=MAX).contains(&parse_integer(value)?);
                if !in_range {
                    let problem = ValueError::OutOfRange { value: value.to_owned(), min: 1, max: MAX };
                    return Err(ArgumentError::Option { option: key.to_owned(), problem });
                }
            }
            self.tree.set(key, value)?;
        }
        Ok(())
    }

    /// `-p`; every further host CPU joins the set of the virtual one.
    fn pin(&mut self, argument: &str) -> Result<(), ArgumentError> {
        let error = || ArgumentError::Pin { text: argument.to_owned() };
        let (vcpu, host) = argument.split_once(':').ok_or_else(error)?;
        let vcpu: u16 = vcpu.parse().map_err(|_| error())?;
        let host: u32 = host.parse().map_err(|_| error())?;
        if host >= MAX_HOST_CPUS {
            let max = i64::from(MAX_HOST_CPUS) - 1;
            return Err(ValueError::OutOfRange { value: host.to_string(), min: 0, max }.into());
        }
        let variable = format!("vcpu.{vcpu}.cpuset");
        let set = match self.tree.raw(&variable) {
            Some(earlier) => format!("{earlier},{host}"),
            None => host.to_string(),
        };
        Ok(self.tree.set(&variable, set)?)
    }

    fn kernel_command_line(&mut self, argument: &str) -> Result<(), ArgumentError> {
        // An empty one is what a script passes when it has nothing to add.
        if argument.is_empty() {
            self.tree.remove("boot.cmdline");
            return Ok(());
        }
        Ok(self.tree.set("boot.cmdline", argument)?)
    }

    fn resume(&mut self, argument: &str) -> Result<(), ArgumentError> {
        if argument.is_empty() {
            return Err(ArgumentError::NoValue { option: "FILE".to_owned() });
        }
        self.resume = Some(PathBuf::from(argument));
        Ok(())
    }

    fn pci_device(&mut self, argument: &str) -> Result<(), ArgumentError> {
        if argument == "help" {
            self.stop = Some(Action::ListPciDevices);
            return Ok(());
        }
        pci::add_device(&mut self.tree, &mut self.notes, argument)
    }

    fn lpc_device(&mut self, argument: &str) -> Result<(), ArgumentError> {
        if argument == "help" {
            self.stop = Some(Action::ListLpcDevices);
            return Ok(());
        }
        lpc::add_device(&mut self.tree, &mut self.notes, argument)
    }

    /// `-f [name=]NAME,string=TEXT` or `,file=FILE`: numbered nodes below `fw_cfg`.
    fn fw_cfg(&mut self, argument: &str) -> Result<(), ArgumentError> {
        /// QEMU's interface has 56 bytes for a name, the last of them NUL.
        const MAX_NAME: usize = 55;
        let error = || ArgumentError::FwCfg { text: argument.to_owned() };
        let (name, data) =
            argument.strip_prefix("name=").unwrap_or(argument).split_once(',').ok_or_else(error)?;
        let (kind, data) = data.split_once('=').ok_or_else(error)?;
        if name.is_empty() || !matches!(kind, "string" | "file") {
            return Err(error());
        }
        if name.len() > MAX_NAME {
            return Err(ArgumentError::FwCfgName { name: name.to_owned(), max: MAX_NAME });
        }
        let taken = self.tree.children("fw_cfg");
        let number = (0..).find(|n: &usize| !taken.contains(&n.to_string())).unwrap_or_default();
        self.tree.set(&format!("fw_cfg.{number}.{kind}"), data)?;
        Ok(self.tree.set(&format!("fw_cfg.{number}.name"), name)?)
    }

    /// `-G`; the port is what follows the last colon.
    fn debug_server(&mut self, argument: &str) -> Result<(), ArgumentError> {
        let (wait, place) = match argument.strip_prefix('w') {
            Some(place) => (true, place),
            None => (false, argument),
        };
        let (address, port) = match place.rsplit_once(':') {
            Some((address, port)) => (Some(address), port),
            None => (None, place),
        };
        if !matches!(port.parse::<u16>(), Ok(1..)) {
            return Err(ArgumentError::Port { port: port.to_owned() });
        }
        if wait {
            self.tree.set_bool("gdb.wait", true)?;
        }
        if let Some(address) = address {
            self.tree.set("gdb.address", address)?;
        }
        Ok(self.tree.set("gdb.port", port)?)
    }

    fn assignment(&mut self, argument: &str) -> Result<(), ArgumentError> {
        Ok(file::assign(&mut self.tree, argument)?)
    }

    fn configuration_file(&mut self, argument: &str) -> Result<(), ArgumentError> {
        let text = std::fs::read_to_string(argument)
            .map_err(|source| FileError::Read { file: argument.to_owned(), source })?;
        Ok(file::load(&mut self.tree, argument, &text)?)
    }
}

fn next_word(spec: &OptionSpec, spelt: &str, words: Words<'_>) -> Result<String, CliError> {
    match words.next() {
        Some(word) => word,
        None => Err(CliError::MissingArgument { option: spelt.to_owned(), form: spec.form() }),
    }
}

/// An argument as text that fits a variable, and an error message.
fn one_line(argument: OsString) -> Result<String, CliError> {
    let argument = argument
        .into_string()
        .map_err(|argument| CliError::NotUtf8 { argument: argument.to_string_lossy().into_owned() })?;
    if argument.contains(['\n', '\r']) {
        return Err(CliError::LineBreak { argument: argument.escape_debug().to_string() });
    }
    Ok(argument)
}
