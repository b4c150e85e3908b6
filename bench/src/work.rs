//! The workloads, as the program `work` (`bench/guest/work.c`) knows them, and what it prints.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// What a workload's time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Compute,
    System,
}

/// One of the workloads.
#[derive(Clone, Debug)]
pub struct Workload {
    pub kind: Kind,
    pub name: String,
    /// How many passes the whole has.
    pub passes: u32,
}

impl Workload {
    /// What is run, in a guest or on the host.
    pub fn arguments(&self, limit_s: f64) -> [String; 3] {
        [self.name.clone(), "0".into(), limit_s.to_string()]
    }
}

/// Asks the program what workloads there are.
///
/// # Errors
///
/// If it does not run.
pub fn list(root: &Path) -> Result<Vec<Workload>, String> {
    let program = root.join("usr/bin/work");
    let output = Command::new(&program)
        .arg("list")
        .output()
        .map_err(|error| format!("{}: {error} (run lab/debian first)", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .map(|line| {
            let mut words = line.split(' ');
            let kind = match words.next() {
                Some("compute") => Kind::Compute,
                Some("system") => Kind::System,
                _ => return Err(format!("work list: what is {line:?}?")),
            };
            let name = words.next().unwrap_or_default().to_owned();
            let passes = words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
            Ok(Workload { kind, name, passes })
        })
        .collect()
}

/// What one run of a workload gave.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The passes done, fewer than the workload has if time was up.
    pub passes: u32,
    /// The time for these.
    pub seconds: f64,
    /// The time of the quickest pass.
    pub least_s: f64,
    /// The time with all preparation, by the same clock.
    pub whole_s: f64,
    /// The time that the whole took by the host's clock, if the other was a guest's.
    pub outside_s: Option<f64>,
    /// A checksum of the result.
    pub check: String,
}

impl Run {
    /// Reads what `work` printed.
    ///
    /// # Errors
    ///
    /// That which was printed instead.
    pub fn parse(name: &str, output: &str) -> Result<Self, String> {
        let start = format!("work: {name} passes=");
        let line = output.lines().find(|line| line.starts_with(&start));
        let parsed = line.and_then(|line| {
            let value = |key: &str| {
                line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('=')).map(str::trim)
            };
            Some(Self {
                passes: value("passes")?.parse().ok()?,
                seconds: value("seconds")?.parse().ok()?,
                least_s: value("least")?.parse().ok()?,
                whole_s: value("whole")?.parse().ok()?,
                outside_s: None,
                check: value("check")?.to_owned(),
            })
        });
        parsed.ok_or_else(|| format!("instead of a result: {}", output.trim()))
    }

    /// The time that all the workload's passes take.
    pub fn full_s(&self, workload: &Workload) -> f64 {
        self.seconds / f64::from(self.passes) * f64::from(workload.passes)
    }
}
