//! Drives virtual machines the way a user does: starts the program, reads its console, types into it, waits for it to
//! end. Nothing here looks inside the programs.
//!
//! A [`Machine`] says what to start (our `bhyve`, or QEMU's emulator as the peer to compare with); [`Machine::start`]
//! gives a [`Running`], whose methods wait for what the guest prints or for its end, each with a limit. Waiting is by
//! `poll(2)` on the console and on the process, never by sleeping. A `Running` that goes out of scope is killed.
//!
//! Where the programs and the guests are: `target/release` and `build/guests` of the work tree, which `make build` and
//! `make guests` fill; `APIARY_BIN` and `APIARY_BUILD` name other directories.

#![forbid(unsafe_code)]

mod machine;
mod places;
mod report;
mod running;

pub use machine::{Console, End, Machine, Vmm};
pub use places::{Kernel, Places, Root, program};
pub use report::Report;
pub use running::{Done, Ended, Error, Running};
