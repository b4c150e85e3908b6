//! Saving and restoring a device's registers.
//!
//! A device describes its registers as a plain type ([`Persist::State`]) with a version of its own. The machine sees
//! every device through the object-safe [`Snapshot`], which any [`Persist`] gets for nothing, and which is also how a
//! running device is inspected: the state is a tree of named values.
//!
//! States hold no absolute [`crate::host::Clock`] times, only spans from "now", so they can be loaded into a machine whose
//! clock started elsewhere.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Why a device could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state was written by another version of the device.
    #[error("saved device state has version {found}, this build reads version {expected}")]
    Version {
        /// Version in the snapshot.
        found: u32,
        /// Version this build writes and reads.
        expected: u32,
    },
    /// The state does not have the device's shape.
    #[error("saved device state cannot be read: {0}")]
    Format(#[from] serde_json::Error),
    /// The state has the right shape and impossible contents.
    #[error("saved device state is not possible: {0}")]
    Invalid(String),
}

/// A device whose registers can be taken out and put back.
pub trait Persist {
    /// The registers as data.
    type State: Serialize + DeserializeOwned;

    /// Version of [`Persist::State`]; raised whenever its meaning changes.
    const VERSION: u32;

    /// The registers now. Call while no vCPU runs.
    fn save(&self) -> Self::State;

    /// Loads registers into a freshly made device and drives its outputs (interrupt lines, alarms) accordingly.
    ///
    /// # Errors
    /// The state is one the device cannot be in; the device is unchanged then.
    fn restore(&self, state: Self::State) -> Result<(), SnapshotError>;
}

/// A saved device: the version of its state and the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// [`Persist::VERSION`] of the device that wrote it.
    pub version: u32,
    /// [`Persist::State`].
    pub state: serde_json::Value,
}

/// [`Persist`] without its type, for lists of devices.
pub trait Snapshot: Send + Sync {
    /// See [`Persist::save`].
    ///
    /// # Errors
    /// The state cannot be expressed (a bug in the device's state type).
    fn snapshot(&self) -> Result<SavedDevice, SnapshotError>;

    /// See [`Persist::restore`].
    ///
    /// # Errors
    /// Another version, another shape, or impossible contents.
    fn load_snapshot(&self, saved: &SavedDevice) -> Result<(), SnapshotError>;
}

impl<T: Persist + Send + Sync> Snapshot for T {
    fn snapshot(&self) -> Result<SavedDevice, SnapshotError> {
        Ok(SavedDevice { version: T::VERSION, state: serde_json::to_value(self.save())? })
    }

    fn load_snapshot(&self, saved: &SavedDevice) -> Result<(), SnapshotError> {
        if saved.version != T::VERSION {
            return Err(SnapshotError::Version { found: saved.version, expected: T::VERSION });
        }
        self.restore(serde_json::from_value(saved.state.clone())?)
    }
}
