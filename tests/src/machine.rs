//! What to start: a machine's size, its guest, and the program that runs it.

use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::running::{Error, Running};
use crate::{Kernel, Places, Root};

/// The program that runs the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// Our `bhyve`.
    Bhyve,
    /// QEMU's emulator with its q35 board: the peer that guests' messages are compared with.
    Qemu,
}

/// How the guest ends, when its initramfs is the lab's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// ACPI S5.
    Poweroff,
    /// The kernel's usual way to reset the machine.
    Reboot,
    /// Stops with every processor halted and interrupts off.
    Halt,
    /// A reset by triple fault.
    TripleFault,
    /// Waits for the power button.
    Wait,
    /// Gives a shell on com1.
    Shell,
    /// Runs the commands that [`Running::command`] gives it.
    Commands,
}

/// What com1 is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Two pipes.
    Pipes,
    /// A terminal.
    Terminal,
}

/// A machine to be started. Made by [`Machine::new`], changed by the methods that say how.
#[derive(Clone, Debug)]
pub struct Machine {
    vmm: Vmm,
    name: String,
    cpus: String,
    memory: String,
    kernel: Kernel,
    root: Root,
    show: Vec<&'static str>,
    end: End,
    words: String,
    options: Vec<OsString>,
    console: Console,
}

impl Machine {
    /// A machine of the demo's size with the cloud kernel, whose name begins with `name` and is like no other's.
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            vmm: Vmm::Bhyve,
            name: format!("{name}-{}-{count}", std::process::id()),
            cpus: "2".into(),
            memory: "512M".into(),
            kernel: Kernel::Cloud,
            root: Root::Small,
            show: Vec::new(),
            end: End::Poweroff,
            words: String::new(),
            options: Vec::new(),
            console: Console::Pipes,
        }
    }

    /// The machine's name, as `bhyvectl --vm` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The program that runs it; our `bhyve` if nothing is said.
    pub fn on(mut self, vmm: Vmm) -> Self {
        self.vmm = vmm;
        self
    }

    /// The processors, in the words of bhyve's `-c`.
    pub fn cpus(mut self, cpus: &str) -> Self {
        self.cpus = cpus.into();
        self
    }

    /// The memory, in the words of bhyve's `-m`.
    pub fn memory(mut self, memory: &str) -> Self {
        self.memory = memory.into();
        self
    }

    /// The guest's kernel.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// The guest's root file system; the small one if nothing is said.
    pub fn root(mut self, root: Root) -> Self {
        self.root = root;
        self
    }

    /// A program that the guest runs before it ends; may be said several times. No word can have a space or a comma.
    pub fn program(self, words: &[&str]) -> Self {
        self.words(&format!("apiary.run={}", words.join(",")))
    }

    /// What the guest also prints; see `lab/guest/lab/boot`.
    pub fn show(mut self, what: &[&'static str]) -> Self {
        self.show.extend(what);
        self
    }

    /// How the guest ends.
    pub fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }

    /// More words for the kernel's command line.
    pub fn words(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }

    /// More options for bhyve.
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(OsString::from));
        self
    }

    /// What com1 is connected to; pipes if nothing is said.
    pub fn console(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    fn cmdline(&self) -> String {
        let (end, kernel) = match self.end {
            End::Poweroff => ("poweroff", ""),
            End::Reboot => ("reboot", ""),
            End::Halt => ("halt", ""),
            // reboot=t: an empty interrupt table and an INT3.
            End::TripleFault => ("reboot", " reboot=t"),
            End::Wait => ("wait", ""),
            End::Shell => ("shell", ""),
            End::Commands => ("commands", ""),
        };
        let show = if self.show.is_empty() {
            String::new()
        } else {
            format!(" apiary.show={}", self.show.join(","))
        };
        format!("console=ttyS0,115200{kernel}{}{show} apiary.end={end}", self.words)
    }

    /// The command that starts it, as a shell takes it.
    pub fn command_line(&self) -> String {
        let command = self.command();
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let quoted = words.map(|word| {
            let word = word.to_string_lossy();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
            if word.chars().all(plain) { word.into_owned() } else { format!("'{word}'") }
        });
        quoted.collect::<Vec<_>>().join(" ")
    }

    fn command(&self) -> Command {
        let places = Places::default();
        let mut command = match self.vmm {
            Vmm::Bhyve => {
                // Tests may run where some signals are ignored, as under nohup(1), and programs inherit that.
                let mut command = Command::new("env");
                command
                    .arg("--default-signal=HUP,INT,QUIT,TERM")
                    .arg(places.program("bhyve"))
                    .args(["-A", "-H", "-P", "-c", &self.cpus, "-m", &self.memory])
                    .args(["-s", "0:0,hostbridge", "-s", "1:0,lpc", "-l", "com1,stdio"])
                    .arg("--kernel")
                    .arg(places.kernel(self.kernel));
                if self.kernel != Kernel::Memtest {
                    command.arg("--initrd").arg(places.initramfs(self.root));
                }
                command.arg("--cmdline").arg(self.cmdline()).args(&self.options).arg(&self.name);
                command
            }
            Vmm::Qemu => {
                let mut command = Command::new("qemu-system-x86_64");
                command
                    .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-no-reboot"])
                    .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
                    .args(["-smp", &self.cpus, "-m", &self.memory])
                    .arg("-kernel")
                    .arg(places.kernel(self.kernel));
                if self.kernel != Kernel::Memtest {
                    command.arg("-initrd").arg(places.initramfs(self.root));
                }
                command.arg("-append").arg(self.cmdline());
                command
            }
        };
        command.env_remove("RUST_LOG");
        command
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// If the program, or the terminal for it, cannot be had.
    pub fn start(&self) -> Result<Running, Error> {
        let mut command = self.command();
        match self.console {
            Console::Pipes => {
                let mut child = command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .map_err(|source| Error::Start { program: command.get_program().to_owned(), source })?;
                let input = child.stdin.take().map(Into::into);
                let output = child.stdout.take().map(Into::into);
                Running::new(child, &self.name, input, output, None)
            }
            Console::Terminal => {
                let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
                grantpt(&ours)?;
                unlockpt(&ours)?;
                let path = ptsname(&ours, Vec::new())?;
                let theirs = rustix::fs::open(
                    path.as_c_str(),
                    rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
                    rustix::fs::Mode::empty(),
                )?;
                let child = command
                    .stdin(theirs.try_clone().map_err(Error::Console)?)
                    .stdout(theirs.try_clone().map_err(Error::Console)?)
                    .stderr(Stdio::piped())
                    .spawn()
                    .map_err(|source| Error::Start { program: command.get_program().to_owned(), source })?;
                let input = ours.try_clone().map_err(Error::Console)?;
                // `theirs` stays open here: its settings are looked at after the program's end.
                Running::new(child, &self.name, Some(input), Some(ours), Some(theirs))
            }
        }
    }

    /// Starts it, waits for its end, and gives that and all it printed.
    ///
    /// # Errors
    ///
    /// As [`Machine::start`] and [`Running::wait`].
    pub fn run(&self) -> Result<crate::Ended, Error> {
        self.start()?.wait()
    }
}
