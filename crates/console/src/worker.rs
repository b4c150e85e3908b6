//! The thread of a console.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::link::Link;
use crate::output::Shared;
use crate::poll;

/// How long buffered output may take to leave after the console has been dropped.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes carried at a time. At most PIPE_BUF: a pipe that polls writable takes as much without waiting.
const CHUNK_BYTES: usize = 4096;

/// Carries bytes until the console is dropped and its output has left.
pub fn run(mut link: Box<dyn Link>, shared: &Shared, mut receive: impl FnMut(&[u8]) -> usize) {
    let mut chunk = vec![0; CHUNK_BYTES];
    // Input that the device has refused so far.
    let mut pending: Vec<u8> = Vec::new();
    let mut deadline = None;
    loop {
        shared.set_attached(link.output().is_some());
        if shared.is_shutting_down() {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + FAREWELL);
            if link.output().is_none() || !shared.has_output() || Instant::now() >= deadline {
                return;
            }
        }
        let wanted = [
            Some((std::os::fd::AsFd::as_fd(shared.wake_fd()), PollFlags::IN)),
            link.events().map(|fd| (fd, PollFlags::IN)),
            link.input().filter(|_| pending.is_empty() && deadline.is_none()).map(|fd| (fd, PollFlags::IN)),
            link.output().filter(|_| shared.has_output()).map(|fd| (fd, PollFlags::OUT)),
        ];
        let [woken, event, readable, writable] = match poll::wait(wanted, deadline) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::error!("console: poll: {error}");
                shared.set_attached(false);
                return;
            }
        };
        if woken {
            shared.clear_wake();
        }
        // What has been sent comes before who comes next: a client may have left to make room.
        if readable {
            read(&mut *link, &mut chunk, &mut pending);
        }
        if event {
            link.on_event();
        }
        if !pending.is_empty() && (readable || shared.take_input_ready()) {
            // Room that is made from here on is told again.
            shared.take_input_ready();
            let taken = receive(&pending).min(pending.len());
            pending.drain(..taken);
        }
        if writable && link.output().is_some() {
            write(&mut *link, &mut chunk, shared);
        }
    }
}

fn transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn read(link: &mut dyn Link, chunk: &mut [u8], pending: &mut Vec<u8>) {
    match link.read(chunk) {
        Ok(count) if count > 0 => pending.extend_from_slice(&chunk[..count]),
        Err(error) if transient(&error) => {}
        _ => link.input_ended(),
    }
}

fn write(link: &mut dyn Link, chunk: &mut [u8], shared: &Shared) {
    let count = shared.peek(chunk);
    match link.write(&chunk[..count]) {
        Ok(written) => shared.consume(written),
        Err(error) if transient(&error) => {}
        Err(_) => link.output_failed(),
    }
}
