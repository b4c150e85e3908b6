//! Signals: SIGTERM presses the ACPI power button, a second one turns the power off (bhyve(8), "SIGNAL HANDLING").
//! SIGINT and SIGHUP do the same: where standard input is a console in raw mode, Ctrl-C goes to the guest and
//! never becomes a signal.
//!
//! They are taken by a thread through a signalfd, so nothing runs in a signal handler. [`block`] must be called
//! before the first thread is made, so that every thread inherits the mask.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

const TAKEN: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

fn taken() -> libc::sigset_t {
    // SAFETY: a signal set is plain bits; sigemptyset initialises it, and the signals added are valid.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in TAKEN {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Blocks the signals taken here in this thread and all that it makes.
///
/// # Errors
/// The host refuses.
pub fn block() -> io::Result<()> {
    let set = taken();
    // SAFETY: the set is valid and a null old set is allowed.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The thread that takes signals. Dropping it ends the thread.
pub struct Signals {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Calls `pressed` with 1 for the first signal, 2 for the second, and so on.
    ///
    /// # Errors
    /// The host refuses the descriptors or the thread.
    pub fn watch(pressed: impl Fn(u32) + Send + 'static) -> io::Result<Self> {
        let set = taken();
        // SAFETY: the set is valid; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and is owned by nobody else.
        let signals = unsafe { OwnedFd::from_raw_fd(fd) };
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let stopping = stop.try_clone()?;
        let thread = thread::Builder::new().name("signals".into()).spawn(move || {
            let mut count = 0;
            while wait_for_first(signals.as_raw_fd(), stopping.as_raw_fd()) {
                if take(signals.as_raw_fd()) {
                    count += 1;
                    pressed(count);
                }
            }
        })?;
        Ok(Signals { stop, thread: Some(thread) })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits; true for a signal, false for the stop event or trouble.
fn wait_for_first(signals: RawFd, stop: RawFd) -> bool {
    let mut polls = [signals, stop].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: the array is valid for its length across the call.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) };
        if ready > 0 {
            return polls[1].revents == 0 && polls[0].revents & libc::POLLIN != 0;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return false;
        }
    }
}

/// Takes one pending signal.
fn take(signals: RawFd) -> bool {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    // SAFETY: the buffer is valid for writes of its length.
    let read = unsafe { libc::read(signals, info.as_mut_ptr().cast(), info.len()) };
    read == info.len() as isize
}
