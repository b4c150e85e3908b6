//! Real guests through the real programs, as a user would run them. `make system` makes what is needed and runs these.
//!
//! On the soft engine a boot is a minute of two processors, so each boot here answers several questions at once.

mod boot;
mod control;
mod disks;
mod load;
mod memtest;
mod misuse;
mod powercut;
mod proof;
mod serial;
mod terminal;

use guest::{Ended, Report, program};

/// The exit statuses of bhyve(8).
mod status {
    pub const REBOOT: i32 = 0;
    pub const POWEROFF: i32 = 1;
    pub const HALT: i32 = 2;
    pub const TRIPLE_FAULT: i32 = 3;
    pub const ERROR: i32 = 4;
}

/// Whether `bhyvectl --list` shows a machine.
fn listed(name: &str) -> bool {
    let output = program("bhyvectl", &["--list"]);
    assert!(output.status.success(), "bhyvectl --list: {output:?}");
    String::from_utf8_lossy(&output.stdout).lines().any(|line| line.split_whitespace().next() == Some(name))
}

/// Asserts how a machine ended; what it said is in the message if that is not so.
#[track_caller]
fn assert_status(ended: &Ended, status: i32) {
    assert!(
        ended.code == Some(status),
        "expected exit status {status}, not {:?} (signal {:?})\nstandard error: {}\nconsole: {}",
        ended.code,
        ended.signal,
        ended.stderr,
        ended.console
    );
}

/// Asserts that the guest found a machine of this size: so many processors, and all of the memory but what a kernel
/// keeps for itself.
#[track_caller]
fn assert_size(report: &Report<'_>, processors: u32, memory_mib: u64) {
    assert_eq!(report.processors(), Some(processors), "processors seen by the guest");
    let seen = report.memory_mib().expect("the guest says how much memory it has");
    // The kernel's image, its page array (1/64) and the crash and early allocations are not counted by it.
    let least = memory_mib - memory_mib / 32 - 64;
    assert!((least..=memory_mib).contains(&seen), "the guest sees {seen} MiB of {memory_mib}");
}
