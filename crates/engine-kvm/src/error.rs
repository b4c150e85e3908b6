//! Turning the kernel's answers into [`EngineError`]s.

use engine::EngineError;

/// Names the operation that an ioctl was part of.
pub(crate) fn host(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |error| EngineError::Host { what, source: std::io::Error::from_raw_os_error(error.errno()) }
}

/// The error of the system call that just failed on this thread.
pub(crate) fn last_os_error(what: &'static str) -> EngineError {
    EngineError::Host { what, source: std::io::Error::last_os_error() }
}
