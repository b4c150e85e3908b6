//! What tools do with a machine as a whole, on top of its directory and its socket.

use std::time::Duration;

use crate::client::{Client, ClientError};
use crate::protocol::{Command, Status};
use crate::runtime::{Runtime, RuntimeError, VmEntry};

/// How long a machine may take to be gone once it has agreed to end.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a look at a machine waits for its answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Why an action on a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// The machine does not run, or its directory cannot be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The machine did not do it.
    #[error("VM {name}: {source}")]
    Client {
        /// Which machine.
        name: String,
        /// Why.
        source: ClientError,
    },
    /// The machine agreed to end and still runs.
    #[error(
        "VM {name} agreed to end and still runs; `bhyvectl --force-destroy --vm={name}` kills its process"
    )]
    Lingers {
        /// Which machine.
        name: String,
    },
}

/// Sends one command to the machine of this name and returns the answer.
///
/// # Errors
/// No such machine, or it refuses or does not answer.
pub fn call(runtime: &Runtime, name: &str, command: Command) -> Result<serde_json::Value, ActionError> {
    let entry = runtime.find(name)?;
    Client::connect(&entry.socket()).and_then(|mut c| c.call(command)).map_err(in_vm(name))
}

/// Sends a command that ends the machine, and waits until its process is gone and the name is free.
///
/// # Errors
/// No such machine, it refuses or does not answer, or it does not end.
pub fn end(runtime: &Runtime, name: &str, command: Command) -> Result<(), ActionError> {
    let entry = runtime.find(name)?;
    ask_to_end(&entry, command, crate::client::DEFAULT_TIMEOUT)?;
    cleared(runtime, &entry)
}

/// Destroys the machine: asks it to end, and where it does not within `patience`, kills its process. Nothing of it
/// is left afterwards.
///
/// # Errors
/// No such machine, or the host does not let this user end its process.
pub fn destroy(runtime: &Runtime, name: &str, patience: Duration) -> Result<(), ActionError> {
    let entry = runtime.find(name)?;
    if ask_to_end(&entry, Command::Destroy, patience).is_err() {
        match runtime.kill(name) {
            // It ended by itself in the end.
            Err(RuntimeError::NotRunning { .. }) => {}
            result => result?,
        }
    }
    cleared(runtime, &entry)
}

/// The status of a machine; `None` if it does not answer within a second.
pub fn look(entry: &VmEntry) -> Option<Status> {
    Client::connect_with_timeout(&entry.socket(), LOOK_TIMEOUT).and_then(|mut c| c.status()).ok()
}

fn in_vm(name: &str) -> impl FnOnce(ClientError) -> ActionError + '_ {
    move |source| ActionError::Client { name: name.to_owned(), source }
}

fn ask_to_end(entry: &VmEntry, command: Command, timeout: Duration) -> Result<(), ActionError> {
    Client::connect_with_timeout(&entry.socket(), timeout)
        .and_then(|mut c| c.call(command))
        .map_err(in_vm(&entry.name))?;
    match entry.wait_gone(timeout.min(END_TIMEOUT)) {
        Ok(true) => Ok(()),
        _ => Err(ActionError::Lingers { name: entry.name.clone() }),
    }
}

/// Looks once more, which also removes what a killed process left. Another machine may have taken the name meanwhile.
fn cleared(runtime: &Runtime, ended: &VmEntry) -> Result<(), ActionError> {
    match runtime.find(&ended.name) {
        Ok(now) if now.pid == ended.pid => Err(ActionError::Lingers { name: now.name }),
        Ok(_) | Err(RuntimeError::NotRunning { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
