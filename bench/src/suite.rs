//! The suite: every workload on every engine and on the host, in rounds.
//!
//! For each number of processors all guests are booted once and stay up; in each round each workload goes to one after
//! the other of them, beginning with another each time. Those that wait are idle. A guest that fails a workload is booted
//! anew for the next.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{End, Error, Machine, Places, Root, Running};
use serde::Serialize;

use crate::engine::Engine;
use crate::idle::{self, Idle};
use crate::numbers::{least, median};
use crate::options::Options;
use crate::report;
use crate::work::{self, Kind, Run, Workload};
use crate::{boot, host};

/// How often everything is measured when nothing else is said.
const ROUNDS: usize = 3;
/// The guests' memory.
pub const MEMORY: &str = "2G";
/// What a workload may take beyond the limit that it is given, before its guest must be hung: the slowest single pass on
/// a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often the host runs what a guest runs once: it takes a moment, and a moment is easily disturbed.
const HOST_RUNS: usize = 3;
/// How far a guest's clock may be from the host's over the whole run: this part of the time, and this many seconds for the
/// questions themselves.
const CLOCK_TOLERANCE: (f64, f64) = (0.002, 1.0);

/// What one engine did in one run of the suite.
#[derive(Debug, Serialize)]
pub struct Side {
    pub engine: Engine,
    /// Seconds from start to user space of the small guest, per round.
    pub boot_s: Vec<f64>,
    /// The runs of each workload.
    pub runs: BTreeMap<String, Vec<Run>>,
    pub idle: Option<Idle>,
    /// Whether the quickest pass counts.
    #[serde(skip)]
    least: bool,
}

impl Side {
    /// The time for a whole workload: the median over the rounds, or by the quickest pass.
    pub fn seconds(&self, workload: &Workload) -> Option<f64> {
        let runs = self.runs.get(&workload.name)?;
        Some(if self.least {
            let passes: Vec<_> = runs.iter().map(|run| run.least_s).collect();
            least(&passes) * f64::from(workload.passes)
        } else {
            median(&runs.iter().map(|run| run.full_s(workload)).collect::<Vec<_>>())
        })
    }
}

/// One run of the suite.
#[derive(Debug, Serialize)]
pub struct Configuration {
    pub cpus: u32,
    pub sides: Vec<Side>,
}

impl Configuration {
    /// What this engine did, if it was there.
    pub fn side(&self, engine: Engine) -> Option<&Side> {
        self.sides.iter().find(|side| side.engine == engine)
    }
}

/// A side while it is measured.
struct Contender {
    side: Side,
    cpus: u32,
    running: Option<Running>,
    /// What the host's clock and the guest's said when the guest was there.
    booted: Option<(Instant, f64)>,
}

/// The guest's clock.
fn uptime_s(running: &mut Running) -> Result<f64, Error> {
    let done = running.command("cat /proc/uptime")?;
    Ok(done.output.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN))
}

impl Contender {
    /// The machine, booted if it is not there.
    fn running(&mut self) -> Result<Option<&mut Running>, Error> {
        if self.running.is_none() {
            let Some(machine) = machine(self.side.engine, self.cpus) else { return Ok(None) };
            let mut running = machine.end(End::Commands).start()?;
            running.wait_for("apiary: commands")?;
            let uptime_s = uptime_s(&mut running)?;
            self.booted = Some((Instant::now(), uptime_s));
            self.running = Some(running);
        }
        Ok(self.running.as_mut())
    }

    /// Whether the guest's clock and the host's agree on how long it has been up.
    fn clock_problem(&mut self) -> Result<Option<String>, Error> {
        let (Some(running), Some((then, then_s))) = (&mut self.running, self.booted) else { return Ok(None) };
        let inside_s = uptime_s(running)? - then_s;
        let outside_s = then.elapsed().as_secs_f64();
        let (part, fixed_s) = CLOCK_TOLERANCE;
        let right = (outside_s - inside_s).abs() <= outside_s * part + fixed_s;
        Ok((!right).then(|| format!("of {outside_s:.2} s the guest's clock has seen {inside_s:.2} s")))
    }

    fn run(&mut self, root: &Path, workload: &Workload, limit_s: f64) -> Result<Run, String> {
        let cpus = self.cpus;
        let result = match self.running() {
            Ok(None) => host::run(root, workload, cpus),
            Ok(Some(running)) => {
                running.set_limit(PATIENCE + Duration::from_secs_f64(limit_s));
                let command = format!("work {}", workload.arguments(limit_s).join(" "));
                running.command(&command).map_err(|error| error.to_string()).and_then(|done| {
                    let mut run = Run::parse(&workload.name, &done.output)?;
                    run.outside_s = Some(done.elapsed.as_secs_f64());
                    Ok(run)
                })
            }
            Err(error) => Err(error.to_string()),
        };
        if result.is_err() {
            self.running = None;
        }
        result
    }
}

fn machine(engine: Engine, cpus: u32) -> Option<Machine> {
    Some(engine.machine("suite")?.root(Root::Debian).cpus(&cpus.to_string()).memory(MEMORY))
}

/// A command line that boots a guest, runs these workloads in it for a while, and ends.
pub fn command_line(engine: Engine, options: &Options, workloads: &[&str]) -> String {
    // More passes than there is time for.
    let endless = u32::MAX.to_string();
    let limit_s = options.limit_s.to_string();
    match machine(engine, options.cpus[0]) {
        Some(machine) => {
            let machine = machine.end(End::Poweroff);
            let run = |machine: Machine, name: &&str| machine.program(&["work", name, &endless, &limit_s]);
            workloads.iter().fold(machine, run).command_line()
        }
        None => {
            let program = Places::default().debian_root().join("usr/bin/work").display().to_string();
            let run = |name: &&str| format!("{program} {name} {endless} {limit_s}");
            workloads.iter().map(run).collect::<Vec<_>>().join("; ")
        }
    }
}

/// Everything that is known afterwards.
#[derive(Serialize)]
pub struct Results {
    pub guest: String,
    pub memory: &'static str,
    pub host: String,
    pub peer: String,
    pub rounds: usize,
    pub limit_s: f64,
    /// Whether the tables are of the quickest passes.
    pub least: bool,
    pub configurations: Vec<Configuration>,
    /// What went wrong: workloads that did not end, results that differ, clocks that are off.
    pub problems: Vec<String>,
    #[serde(skip)]
    pub workloads: Vec<Workload>,
}

/// Runs the suite; `false` if something in it went wrong.
///
/// # Errors
///
/// If there is nothing to run, or the results cannot be written.
pub fn run(options: &Options, directory: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let root = Places::default().debian_root();
    let mut workloads = work::list(&root)?;
    for name in &options.workloads {
        if !workloads.iter().any(|workload| workload.name == *name) {
            let names: Vec<_> = workloads.iter().map(|workload| workload.name.as_str()).collect();
            return Err(format!("no workload {name}; there are: {}", names.join(" ")).into());
        }
    }
    workloads.retain(|workload| options.workloads.is_empty() || options.workloads.contains(&workload.name));

    let package = std::fs::read_to_string(directory.join("../guests/cloud/package")).unwrap_or_default();
    let mut results = Results {
        guest: package.trim().into(),
        memory: MEMORY,
        host: host::description(),
        peer: host::first_line("qemu-system-x86_64", &["--version"]),
        rounds: options.rounds.unwrap_or(ROUNDS),
        limit_s: options.limit_s,
        least: options.least,
        configurations: Vec::new(),
        problems: Vec::new(),
        workloads,
    };
    for cpus in &options.cpus {
        configuration(options, *cpus, &root, &mut results);
        // Written each time: a long run that is ended early has left something.
        std::fs::write(directory.join("suite.md"), report::markdown(&results))?;
        std::fs::write(directory.join("suite.json"), serde_json::to_string_pretty(&results)?)?;
    }
    println!("{}", report::markdown(&results));
    Ok(results.problems.is_empty())
}

fn configuration(options: &Options, cpus: u32, root: &Path, results: &mut Results) {
    let new_side = |engine: &Engine| Contender {
        side: Side {
            engine: *engine,
            boot_s: Vec::new(),
            runs: BTreeMap::new(),
            idle: None,
            least: options.least,
        },
        cpus,
        running: None,
        booted: None,
    };
    let mut contenders: Vec<_> = options.engines.iter().map(new_side).collect();
    let mut checks = BTreeMap::new();
    let mut problems = Vec::new();
    // Of single workloads nobody wants to know how the guest boots and rests.
    let whole = options.workloads.is_empty();
    for round in 0..results.rounds {
        if whole {
            for contender in contenders.iter_mut().filter(|contender| contender.side.engine != Engine::Host) {
                let engine = contender.side.engine;
                match boot::boot(engine, cpus) {
                    Ok((elapsed, _)) => contender.side.boot_s.push(elapsed.as_secs_f64()),
                    Err(error) => problems.push(format!("{engine}, {cpus} processors, boot: {error}")),
                }
            }
        }
        for (index, workload) in results.workloads.iter().enumerate() {
            let mut said =
                format!("{cpus} cpu, round {}/{}: {:10}", round + 1, results.rounds, workload.name);
            let count = contenders.len();
            for turn in 0..count {
                let contender = &mut contenders[(turn + round + index) % count];
                let engine = contender.side.engine;
                let place = format!("{engine}, {cpus} processors, {}", workload.name);
                for _ in 0..if engine == Engine::Host { HOST_RUNS } else { 1 } {
                    match contender.run(root, workload, options.limit_s) {
                        Ok(run) => {
                            let check = &run.check;
                            let expected =
                                checks.entry(workload.name.clone()).or_insert_with(|| check.clone());
                            if expected != check {
                                problems.push(format!("{place}: the result is {check}, not {expected}"));
                            }
                            contender.side.runs.entry(workload.name.clone()).or_default().push(run);
                        }
                        Err(problem) => {
                            eprintln!("{place}: {problem}");
                            problems.push(format!("{place}: {problem}"));
                        }
                    }
                }
                // Of all rounds so far.
                said += &match contender.side.seconds(workload) {
                    Some(seconds) => format!("  {engine} {seconds:.3} s"),
                    None => format!("  {engine} failed"),
                };
            }
            eprintln!("{said}");
        }
    }
    for contender in &mut contenders {
        let engine = contender.side.engine;
        let clock = contender.clock_problem().unwrap_or_else(|error| Some(error.to_string()));
        problems.extend(clock.map(|problem| format!("{engine}, {cpus} processors: {problem}")));
    }
    if whole {
        for contender in &mut contenders {
            if let Some(running) = &mut contender.running {
                match idle::measure(running) {
                    Ok(idle) => contender.side.idle = Some(idle),
                    Err(error) => problems.push(format!("{}, idle: {error}", contender.side.engine)),
                }
            }
        }
    }
    let sides = contenders.into_iter().map(|contender| contender.side).collect();
    results.problems.extend(problems);
    results.configurations.push(Configuration { cpus, sides });
}

/// The workloads of one kind.
pub fn of_kind(workloads: &[Workload], kind: Kind) -> impl Iterator<Item = &Workload> {
    workloads.iter().filter(move |workload| workload.kind == kind)
}
