//! The command line of bhyvectl(8): long options, which may be shortened as long as they stay unambiguous
//! (getopt_long(3)), and the VM's name as `--vm=NAME`, `--vm NAME` or bare.

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Show every running VM.
    List,
    /// End the VM at once.
    Destroy,
    /// End the VM at once, without asking it for long.
    ForceDestroy,
    /// Cut its power.
    ForcePoweroff,
    /// Press its reset button.
    ForceReset,
    /// Send an NMI.
    InjectNmi,
    /// Show its counters.
    GetStats,
}

/// A command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `--vm=NAME`.
    pub vm: Option<String>,
    /// In the order given.
    pub actions: Vec<Action>,
    /// `--json`.
    pub json: bool,
    /// `--help`, `-h`.
    pub help: bool,
    /// `--version`.
    pub version: bool,
}

/// Why a command line is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionError {
    /// It is not understood: the usage helps.
    Usage(String),
    /// It is understood and cannot be done.
    Unavailable(String),
}

/// What an option takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vm,
    Json,
    Help,
    Version,
    Do(Action),
    /// In bhyvectl(8), not yet here.
    Later,
}

const OPTIONS: [(&str, Kind); 11] = [
    ("vm", Kind::Vm),
    ("list", Kind::Do(Action::List)),
    ("destroy", Kind::Do(Action::Destroy)),
    ("force-destroy", Kind::Do(Action::ForceDestroy)),
    ("force-poweroff", Kind::Do(Action::ForcePoweroff)),
    ("force-reset", Kind::Do(Action::ForceReset)),
    ("inject-nmi", Kind::Do(Action::InjectNmi)),
    ("get-stats", Kind::Do(Action::GetStats)),
    ("json", Kind::Json),
    ("help", Kind::Help),
    ("version", Kind::Version),
];

/// Options of FreeBSD's bhyvectl that this build does not have.
const LATER: &str = "checkpoint create suspend run cpu capname setcap getcap unassign-pptdev desc-base desc-limit \
    desc-access assert-lapic-lvt rtc-nvram-offset get-all get-memmap get-memseg get-gpa-pmap get-lowmem get-highmem \
    get-rtc-time set-rtc-time get-rtc-nvram set-rtc-nvram get-active-cpus get-debug-cpus get-suspended-cpus \
    get-intinfo get-cpu-topology get-x2apic-state set-x2apic-state get-efer get-cr0 get-cr2 get-cr3 get-cr4 get-dr0 \
    get-dr1 get-dr2 get-dr3 get-dr6 get-dr7 get-rsp get-rip get-rax get-rbx get-rcx get-rdx get-rsi get-rdi get-rbp \
    get-r8 get-r9 get-r10 get-r11 get-r12 get-r13 get-r14 get-r15 get-rflags get-cs get-ds get-es get-fs get-gs \
    get-ss get-tr get-ldtr get-desc-cs get-desc-ds get-desc-es get-desc-fs get-desc-gs get-desc-ss get-desc-tr \
    get-desc-ldtr get-desc-gdtr get-desc-idtr set-mem set-efer set-cr0 set-cr2 set-cr3 set-cr4 set-dr0 set-dr1 \
    set-dr2 set-dr3 set-dr6 set-dr7 set-rsp set-rip set-rax set-rflags set-cs set-ds set-es set-fs set-gs set-ss \
    set-tr set-ldtr set-desc-cs set-desc-ds set-desc-es set-desc-fs set-desc-gs set-desc-ss set-desc-tr set-desc-ldtr \
    set-desc-gdtr set-desc-idtr";

/// Finds the option that `given` names or abbreviates.
fn find(given: &str) -> Result<(&'static str, Kind), OptionError> {
    let later = LATER.split_ascii_whitespace().map(|name| (name, Kind::Later));
    let all = || OPTIONS.into_iter().chain(later.clone());
    if let Some(exact) = all().find(|(name, _)| *name == given) {
        return Ok(exact);
    }
    let matches: Vec<_> = all().filter(|(name, _)| !given.is_empty() && name.starts_with(given)).collect();
    match matches[..] {
        [one] => Ok(one),
        [] => Err(OptionError::Usage(format!("unknown option --{given}"))),
        _ => {
            let names = matches.iter().take(5).map(|(n, _)| format!("--{n}")).collect::<Vec<_>>().join(", ");
            Err(OptionError::Usage(format!("option --{given} is ambiguous: {names}")))
        }
    }
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// See [`OptionError`].
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Options, OptionError> {
    let mut options = Options::default();
    let mut arguments = arguments.into_iter();
    let mut only_names = false;
    while let Some(argument) = arguments.next() {
        if argument == "--" && !only_names {
            only_names = true;
        } else if let Some(long) = argument.strip_prefix("--").filter(|_| !only_names) {
            let (given, value) = match long.split_once('=') {
                Some((given, value)) => (given, Some(value.to_owned())),
                None => (long, None),
            };
            let (name, kind) = find(given)?;
            if value.is_some() && !matches!(kind, Kind::Vm | Kind::Later) {
                return Err(OptionError::Usage(format!("option --{name} takes no value")));
            }
            match kind {
                Kind::Vm => {
                    let value = value.or_else(|| arguments.next());
                    let value = value.ok_or_else(|| OptionError::Usage("option --vm needs a name".into()))?;
                    set_vm(&mut options, value)?;
                }
                Kind::Json => options.json = true,
                Kind::Help => options.help = true,
                Kind::Version => options.version = true,
                Kind::Do(action) if options.actions.contains(&action) => {}
                Kind::Do(action) => options.actions.push(action),
                Kind::Later => {
                    return Err(OptionError::Unavailable(format!(
                        "option --{name} is not available in this build"
                    )));
                }
            }
        } else if argument == "-h" && !only_names {
            options.help = true;
        } else if argument.starts_with('-') && !only_names {
            return Err(OptionError::Usage(format!("unknown option {argument}")));
        } else {
            set_vm(&mut options, argument)?;
        }
    }
    Ok(options)
}

fn set_vm(options: &mut Options, name: String) -> Result<(), OptionError> {
    match options.vm.replace(name.clone()) {
        Some(before) if before != name => {
            Err(OptionError::Usage(format!("one VM at a time, not both {before} and {name}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options, OptionError> {
        parse(line.split_ascii_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_name_comes_in_three_ways() {
        for line in
            ["--vm=g1 --destroy", "--destroy --vm g1", "g1 --destroy", "--destroy -- g1", "--v=g1 --des g1"]
        {
            if line.starts_with("--v=") {
                assert!(matches!(parsed(line), Err(OptionError::Usage(m)) if m.contains("ambiguous")));
                continue;
            }
            let expected =
                Options { vm: Some("g1".into()), actions: vec![Action::Destroy], ..Options::default() };
            assert_eq!(parsed(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn options_may_be_shortened_while_unambiguous() {
        assert_eq!(parsed("--get-st g").unwrap().actions, [Action::GetStats]);
        assert_eq!(parsed("--force-p g").unwrap().actions, [Action::ForcePoweroff]);
        assert!(matches!(parsed("--force g"), Err(OptionError::Usage(m)) if m.contains("--force-reset")));
    }

    #[test]
    fn what_is_refused_says_why() {
        let message = |line: &str| match parsed(line) {
            Err(OptionError::Usage(m)) => format!("usage: {m}"),
            Err(OptionError::Unavailable(m)) => m,
            Ok(options) => panic!("{options:?}"),
        };
        assert_eq!(message("--explode g"), "usage: unknown option --explode");
        assert_eq!(message("-x"), "usage: unknown option -x");
        assert_eq!(message("--vm"), "usage: option --vm needs a name");
        assert_eq!(message("--destroy=yes g"), "usage: option --destroy takes no value");
        assert_eq!(message("a b"), "usage: one VM at a time, not both a and b");
        assert_eq!(message("--vm=g --suspend=f"), "option --suspend is not available in this build");
        assert_eq!(message("--get-rip --vm=g"), "option --get-rip is not available in this build");
    }
}
