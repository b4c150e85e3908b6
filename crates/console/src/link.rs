//! What a backend is to the console's thread.

use std::io;
use std::os::fd::BorrowedFd;

/// A way to the outside. All descriptors may be level-triggered at any time; the thread waits only for those that the
/// link names at that moment.
pub trait Link: Send {
    /// Readable when input has come or the other side has gone; `None` while there is no input to expect.
    fn input(&self) -> Option<BorrowedFd<'_>>;

    /// Writable when output can be carried; `None` while nobody listens.
    fn output(&self) -> Option<BorrowedFd<'_>>;

    /// Readable when something else has happened that [`Link::on_event`] looks at.
    fn events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Looks at [`Link::events`].
    fn on_event(&mut self) {}

    /// Reads without waiting; `Ok(0)` and errors other than `WouldBlock` and `Interrupted` mean that the other side has gone.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes without waiting for long.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// [`Link::read`] has found the end of input.
    fn input_ended(&mut self);

    /// [`Link::write`] has failed for good.
    fn output_failed(&mut self);
}
