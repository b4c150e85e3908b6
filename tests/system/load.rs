//! A host that has other things to do: what a guest makes of its clocks then.

use std::process::{Child, Command, Stdio};
use std::thread::available_parallelism;

use guest::{Error, Machine, Report};

use crate::status;
use crate::{assert_size, assert_status};

/// As many busy loops as the host has processors. They end with this value.
struct Load(Vec<Child>);

impl Load {
    fn start() -> Self {
        let count = available_parallelism().map_or(2, usize::from).max(2);
        let busy = |_| {
            Command::new("sh")
                .args(["-c", "while :; do :; done"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("a shell")
        };
        Load((0..count).map(busy).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Only one that is gone already cannot be killed or waited for.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The kernel finds its timer ("IO-APIC + timer doesn't work!" is a panic), although the processors wait for theirs, and
/// goes by the TSC, which it trusts.
#[test]
fn clocks_are_trusted_on_a_busy_host() -> Result<(), Error> {
    let load = Load::start();
    let ended = Machine::new("load").show(&["dmesg", "clock", "cpuinfo"]).run()?;
    drop(load);
    assert_status(&ended, status::POWEROFF);
    let report = Report::new(&ended.console);
    assert_size(&report, 2, 512);
    let flags: Vec<&str> =
        report.cpuinfo("flags").first().map_or(Vec::new(), |flags| flags.split(' ').collect());
    assert!(flags.contains(&"tsc_adjust"), "{flags:?}");
    if !flags.contains(&"nonstop_tsc") {
        // The host's TSC is not invariant, so the guest's is not, and the kernel is right to watch it.
        return Ok(());
    }
    assert_eq!(report.section("clock"), ["tsc"]);
    let doubts: Vec<_> = report
        .section("dmesg")
        .into_iter()
        .filter(|line| line.contains("unstable") || line.contains("watchdog on CPU"))
        .collect();
    assert!(doubts.is_empty(), "the kernel doubts its clocks: {doubts:#?}");
    Ok(())
}
