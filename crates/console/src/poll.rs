//! poll(2) on a few descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Waits until one of `wanted` is ready (or has an error or hang-up), or until `deadline`. Returns which are.
pub fn wait<const N: usize>(
    wanted: [Option<(BorrowedFd<'_>, PollFlags)>; N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    let mut fds: Vec<PollFd<'_>> =
        wanted.iter().flatten().map(|(fd, events)| PollFd::from_borrowed_fd(*fd, *events)).collect();
    let timeout = deadline.map(|at| timespec(at.saturating_duration_since(Instant::now())));
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok([false; N]),
        Err(error) => return Err(error.into()),
    }
    let mut results = fds.iter().map(|fd| !fd.revents().is_empty());
    Ok(wanted.map(|entry| entry.is_some() && results.next().unwrap_or(false)))
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}

/// Whether the other side of a connection sends no more, even if there is still something of it to be read.
pub fn has_left(fd: impl AsFd) -> bool {
    let now = Some(Instant::now());
    wait([Some((fd.as_fd(), PollFlags::RDHUP))], now).is_ok_and(|[left]| left)
}

/// Whether the other side of a descriptor has gone.
pub fn is_hung_up(fd: impl AsFd) -> bool {
    // Hang-ups and errors are told without being asked for.
    let now = Some(Instant::now());
    wait([Some((fd.as_fd(), PollFlags::empty()))], now).is_ok_and(|[ready]| ready)
}
