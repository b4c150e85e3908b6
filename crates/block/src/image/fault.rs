//! Why an image is refused, for formats whose readers know no path.

use std::io;
use std::path::Path;

use crate::OpenError;

/// Why an image is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It contradicts the specification of its format.
    Invalid(String),
    /// It is fine, and beyond us: what follows its name in a message.
    Unsupported(String),
    /// The host failed to read it.
    Host(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        let reason = error.to_string();
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Fault::Invalid(reason),
            io::ErrorKind::Unsupported => Fault::Unsupported(reason),
            _ => Fault::Host(reason),
        }
    }
}

impl Fault {
    /// What the user is told.
    pub fn of(self, path: &Path, format: &'static str) -> OpenError {
        let path = path.to_owned();
        match self {
            Fault::Invalid(reason) => OpenError::Format { path, format, reason },
            Fault::Unsupported(reason) => OpenError::Unsupported { path, reason },
            Fault::Host(reason) => OpenError::Open { path, source: io::Error::other(reason) },
        }
    }
}

/// A [`Fault::Invalid`].
pub(crate) fn invalid<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Invalid(reason.into()))
}

/// A [`Fault::Unsupported`].
pub(crate) fn unsupported<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Unsupported(reason.into()))
}
