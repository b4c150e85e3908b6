//! Terminal modes: raw while a guest has the terminal, and as they were afterwards, however the process ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::io::Errno;
use rustix::termios::{ControlModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// Signals that end a process by default and leave it a moment to clean up. Handlers that are already there are left alone.
const FATAL_SIGNALS: [libc::c_int; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGABRT, libc::SIGILL, libc::SIGFPE];

/// A terminal in raw mode; dropping it puts the old modes back.
pub struct RawMode {
    terminal: OwnedFd,
    saved: Termios,
}

impl RawMode {
    /// Every byte passes as it is, control characters included, and modem lines are ignored.
    pub fn enter(terminal: impl AsFd) -> Result<Self, Errno> {
        let terminal = rustix::io::fcntl_dupfd_cloexec(terminal, 3)?;
        let saved = tcgetattr(&terminal)?;
        set_raw(terminal.as_fd())?;
        Ok(RawMode { terminal, saved })
    }

    fn leave(&self) {
        // The terminal may be gone; there is nothing to put back then.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.saved);
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        while_background_output_is_allowed(|| self.leave());
    }
}

/// Makes a terminal raw without remembering what it was.
pub fn set_raw(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut modes = tcgetattr(terminal)?;
    modes.make_raw();
    modes.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    tcsetattr(terminal, OptionalActions::Now, &modes)
}

/// The process's own terminal, which has to be put back even if nothing is dropped.
static PROCESS_TERMINAL: AtomicPtr<RawMode> = AtomicPtr::new(std::ptr::null_mut());

/// The process's own terminal in raw mode until this is dropped, the process exits, or a signal ends it.
pub struct ProcessTerminal(());

impl ProcessTerminal {
    /// Only one may exist at a time; [`crate::stdio`] sees to that.
    pub fn enter(terminal: impl AsFd) -> Result<Self, Errno> {
        static HOOKS: Once = Once::new();
        HOOKS.call_once(install_hooks);
        let mode = Box::into_raw(Box::new(RawMode::enter(terminal)?));
        let previous = PROCESS_TERMINAL.swap(mode, Ordering::AcqRel);
        debug_assert!(previous.is_null());
        Ok(ProcessTerminal(()))
    }
}

impl Drop for ProcessTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the process's terminal back as it was before a console took it; harmless if none did. May be called from a signal
/// handler and any number of times. For ways out of the process that run neither destructors nor exit handlers.
pub fn restore() {
    let mode = PROCESS_TERMINAL.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if !mode.is_null() {
        // SAFETY: the pointer came from `Box::into_raw` and the swap made us its only owner. The box is leaked rather than
        // freed, because a signal handler must not enter the allocator.
        let mode: &'static RawMode = unsafe { &*mode };
        while_background_output_is_allowed(|| mode.leave());
    }
}

/// Runs `change` with SIGTTOU blocked: a process in the background may put its terminal back without being stopped for it.
fn while_background_output_is_allowed(change: impl FnOnce()) {
    // SAFETY: both sets are plain data that sigemptyset and pthread_sigmask initialise before they are read; the calls are
    // async-signal-safe and change this thread's mask only.
    unsafe {
        let mut block: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut block);
        libc::sigaddset(&mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &block, &mut before);
        change();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
    }
}

extern "C" fn at_exit() {
    restore();
}

extern "C" fn on_fatal_signal(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe; the default action ends the process once the handler has returned.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn install_hooks() {
    // SAFETY: `at_exit` is an `extern "C"` function that does not unwind. The sigaction structures are fully initialised by
    // zeroing and by the kernel; the handler only does what is async-signal-safe (see `restore`).
    unsafe {
        libc::atexit(at_exit);
        for signal in FATAL_SIGNALS {
            let mut present: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut present);
            if present.sa_sigaction == libc::SIG_DFL {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fatal_signal as *const () as libc::sighandler_t;
                action.sa_flags = libc::SA_ONSTACK;
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    }
}
