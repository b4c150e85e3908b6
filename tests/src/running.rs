//! A machine that runs: its console, its process, and waiting for either.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long anything may take before it must be wrong. Far above what it takes (a boot on the interpreter, with all
/// processors of the host busy five times over, has been seen to need more than eight minutes), because it is here to
/// end a hung test, not to measure.
const LIMIT: Duration = Duration::from_secs(900);

/// How much of the console's end an error shows.
const TAIL_BYTES: usize = 3000;

/// What can go wrong while a machine is driven.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not there or cannot be run.
    #[error("{} cannot be started: {source} (run `make build` and `make guests` first)", .program.display())]
    Start {
        /// What was to be run.
        program: OsString,
        /// Why it could not be.
        source: std::io::Error,
    },
    /// The console, the process or the terminal gave an error.
    #[error("the machine's console failed: {0}")]
    Console(std::io::Error),
    /// The time was up.
    #[error("{name}: waited {waited_s} s for {what}; the console ended with:\n{tail}")]
    Late {
        /// The machine's name.
        name: String,
        /// What was waited for.
        what: String,
        /// How long.
        waited_s: u64,
        /// The end of what the console said.
        tail: String,
    },
    /// The program ended first.
    #[error(
        "{name}: ended ({status}) before {what}; standard error: {stderr}\nthe console ended with:\n{tail}"
    )]
    Gone {
        /// The machine's name.
        name: String,
        /// What was waited for.
        what: String,
        /// How it ended.
        status: String,
        /// What it said on standard error.
        stderr: String,
        /// The end of what the console said.
        tail: String,
    },
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Console(errno.into())
    }
}

/// A machine's end.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The exit status, or `None` if a signal ended the program.
    pub code: Option<i32>,
    /// The signal that ended the program.
    pub signal: Option<i32>,
    /// All that came from the console.
    pub console: String,
    /// All that came on standard error.
    pub stderr: String,
}

/// What a command in the guest did; see [`Running::command`].
#[derive(Clone, Debug)]
pub struct Done {
    /// Its exit status, as the guest's shell gives it.
    pub status: i32,
    /// What it printed.
    pub output: String,
    /// How long it took, seen from outside.
    pub elapsed: Duration,
}

/// A machine that was started and not yet waited for.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    console: Vec<u8>,
    stderr: Vec<u8>,
    /// How much of `console` the waits have gone past.
    seen: usize,
    /// How long a wait may last.
    limit: Duration,
}

impl Running {
    pub(crate) fn new(
        mut child: Child,
        name: &str,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        terminal: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let errors = child.stderr.take().map(Into::into);
        Ok(Self {
            name: name.into(),
            child,
            pidfd,
            input,
            output,
            errors,
            terminal,
            console: Vec::new(),
            stderr: Vec::new(),
            seen: 0,
            limit: LIMIT,
        })
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sets how long a wait may last from now on, where the usual (minutes) does not fit.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Has the guest, which was started with [`End::Commands`](crate::End::Commands), run a line of shell commands.
    ///
    /// # Errors
    ///
    /// If the program ends first, or time is up.
    pub fn command(&mut self, line: &str) -> Result<Done, Error> {
        self.seen = self.console.len();
        let started = Instant::now();
        self.send(&format!("{line}\n"))?;
        let (status, output) = self.wait_until(line, |new| {
            let text = String::from_utf8_lossy(new);
            let (output, rest) = text.split_once("apiary: status: ")?;
            let (status, _) = rest.split_once('\n')?;
            Some((status.trim().parse().unwrap_or(-1), output.replace('\r', "")))
        })?;
        self.seen = self.console.len();
        Ok(Done { status, output, elapsed: started.elapsed() })
    }

    /// All that came from the console so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.console).into_owned()
    }

    /// The settings of the machine's terminal, if it has one.
    ///
    /// # Errors
    ///
    /// If the terminal cannot be asked.
    pub fn terminal_settings(&self) -> Result<Option<String>, Error> {
        self.terminal.as_ref().map(|fd| Ok(format!("{:?}", rustix::termios::tcgetattr(fd)?))).transpose()
    }

    /// The processor time that the program has taken so far, its own and the kernel's for it.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn processor_time(&self) -> Result<Duration, Error> {
        // proc(5): after the name, which is in parentheses, fields 14 and 15 of all are utime and stime, in ticks.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).map_err(Error::Console)?;
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 =
            after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    /// Types text into com1.
    ///
    /// # Errors
    ///
    /// If the console does not take it.
    pub fn send(&mut self, text: &str) -> Result<(), Error> {
        let input =
            self.input.as_ref().ok_or_else(|| Error::Console(std::io::ErrorKind::BrokenPipe.into()))?;
        let mut file = std::fs::File::from(input.try_clone().map_err(Error::Console)?);
        file.write_all(text.as_bytes()).map_err(Error::Console)
    }

    /// Closes the console's input, as `</dev/null` does.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    ///
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// Waits until the console says `text`, after all that earlier waits have found.
    ///
    /// # Errors
    ///
    /// If the program ends first, or time is up.
    pub fn wait_for(&mut self, text: &str) -> Result<(), Error> {
        let what = format!("{text:?}");
        let found = self.wait_until(&what, |new| find(new, text.as_bytes()).map(|at| at + text.len()))?;
        self.seen += found;
        Ok(())
    }

    /// Waits until `look` finds something in what the console has said since the last wait.
    ///
    /// # Errors
    ///
    /// If the program ends first, or time is up.
    pub fn wait_until<T>(&mut self, what: &str, look: impl Fn(&[u8]) -> Option<T>) -> Result<T, Error> {
        let started = Instant::now();
        loop {
            if let Some(found) = look(&self.console[self.seen..]) {
                return Ok(found);
            }
            if self.output.is_none() {
                // All it will ever say has been read; its end is near.
                let name = self.name.clone();
                let ended = self.reap()?;
                return Err(Error::Gone {
                    name,
                    what: what.into(),
                    status: status_text(&ended),
                    stderr: ended.stderr,
                    tail: tail(ended.console.as_bytes()),
                });
            }
            if !self.pump(self.limit.saturating_sub(started.elapsed()))? && started.elapsed() >= self.limit {
                return Err(self.late(what, started));
            }
        }
    }

    /// Waits until the program itself has said `text`, on standard error.
    ///
    /// # Errors
    ///
    /// If it ends without, or time is up.
    pub fn wait_for_notice(&mut self, text: &str) -> Result<(), Error> {
        let started = Instant::now();
        while find(&self.stderr, text.as_bytes()).is_none() {
            let left = self.limit.saturating_sub(started.elapsed());
            if self.errors.is_none() || !self.pump(left)? && started.elapsed() >= self.limit {
                return Err(self.late(&format!("the notice {text:?}"), started));
            }
        }
        Ok(())
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    ///
    /// If time is up; the program is then killed.
    pub fn wait(mut self) -> Result<Ended, Error> {
        self.wait_here()
    }

    fn wait_here(&mut self) -> Result<Ended, Error> {
        let started = Instant::now();
        while self.output.is_some() {
            if !self.pump(self.limit.saturating_sub(started.elapsed()))? && started.elapsed() >= self.limit {
                return Err(self.late("the machine's end", started));
            }
        }
        self.reap()
    }

    /// As [`Running::wait`], and gives the terminal's settings after the end.
    ///
    /// # Errors
    ///
    /// As [`Running::wait`] and [`Running::terminal_settings`].
    pub fn wait_with_terminal(mut self) -> Result<(Ended, Option<String>), Error> {
        let ended = self.wait_here()?;
        Ok((ended, self.terminal_settings()?))
    }

    fn late(&self, what: &str, started: Instant) -> Error {
        Error::Late {
            name: self.name.clone(),
            what: what.into(),
            waited_s: started.elapsed().as_secs(),
            tail: tail(&self.console),
        }
    }

    /// Reads what has come from the program. `false` if nothing happened in the time given. When the process has
    /// ended and everything is read, the outputs are closed.
    fn pump(&mut self, limit: Duration) -> Result<bool, Error> {
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let readable = |flags: PollFlags| flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        let (ended, output, errors) = {
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            fds.extend(self.output.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
            let at_errors = fds.len();
            fds.extend(self.errors.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(false),
                Err(rustix::io::Errno::INTR) => return Ok(true),
                result => result?,
            };
            (
                readable(fds[0].revents()),
                self.output.is_some() && readable(fds[1].revents()),
                self.errors.is_some() && readable(fds[at_errors].revents()),
            )
        };
        if output && !read_some(self.output.as_ref(), &mut self.console)? {
            self.output = None;
        }
        if errors && !read_some(self.errors.as_ref(), &mut self.stderr)? {
            self.errors = None;
        }
        if ended && !output && !errors {
            // Ended, and nothing left to read. (A pseudo-terminal that we hold open never says so itself.)
            self.output = None;
            self.errors = None;
        }
        Ok(true)
    }

    fn reap(&mut self) -> Result<Ended, Error> {
        let started = Instant::now();
        while self.errors.is_some() && started.elapsed() < self.limit {
            self.pump(self.limit.saturating_sub(started.elapsed()))?;
        }
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = self.limit.saturating_sub(started.elapsed());
        let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut fds, Some(&timeout))? == 0 {
            return Err(self.late("the process's end (its output is closed)", started));
        }
        let status = self.child.wait().map_err(Error::Console)?;
        Ok(Ended {
            code: status.code(),
            signal: status.signal(),
            console: self.console(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail, harmlessly, if it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads once. `false` at the end of the stream.
fn read_some(fd: Option<&OwnedFd>, to: &mut Vec<u8>) -> Result<bool, Error> {
    let Some(fd) = fd else { return Ok(false) };
    let mut buffer = [0; 4096];
    match rustix::io::read(fd.as_fd(), &mut buffer) {
        Ok(0) => Ok(false),
        Ok(count) => {
            to.extend_from_slice(&buffer[..count]);
            Ok(true)
        }
        // The other end of a pseudo-terminal is closed.
        Err(rustix::io::Errno::IO) => Ok(false),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn tail(console: &[u8]) -> String {
    String::from_utf8_lossy(&console[console.len().saturating_sub(TAIL_BYTES)..]).into_owned()
}

fn status_text(ended: &Ended) -> String {
    match (ended.code, ended.signal) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".into(),
    }
}
