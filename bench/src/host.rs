//! The bare host's side: the same root file system, by chroot, with a /tmp in memory as in the guests.

use std::path::Path;
use std::process::Command;

use rustix::process::geteuid;

use crate::work::{Run, Workload};

/// Runs a workload on the first `cpus` processors of this machine.
///
/// # Errors
///
/// What went wrong, in words.
pub fn run(root: &Path, workload: &Workload, cpus: u32) -> Result<Run, String> {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !geteuid().is_root() {
        command.arg("--map-root-user");
    }
    let output = command
        .args(["sh", "-c", "mount -t tmpfs tmpfs \"$0/tmp\" && exec chroot \"$0\" /usr/bin/work \"$@\""])
        .arg(root)
        .args(workload.arguments(1e6))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("WORK_CPUS", cpus.to_string())
        .output()
        .map_err(|error| format!("unshare: {error}"))?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Run::parse(&workload.name, &text)
}

/// The first line that a program prints.
pub fn first_line(command: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(command).args(arguments).output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

/// This machine, in a few words.
pub fn description() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} × {model}")
}
