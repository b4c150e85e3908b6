//! `make bench`: the time from starting the program to the guest's first line from user space, for the same kernel,
//! initramfs, processors and memory, on our soft engine and on QEMU's emulator (`-accel tcg -cpu max`).
//!
//! The two take turns within one run, so that what else the host does falls on both. Elapsed time and processor time are
//! taken at the moment the line is read. The result is printed and written to `build/bench/boot.md` and `boot.json`.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use guest::{End, Error, Machine, Vmm};
use serde::Serialize;

/// How often each boots when nothing else is said.
const ROUNDS: usize = 5;
const USAGE: &str = "usage: bench [ROUNDS]    boots each engine ROUNDS times (5 if not said)";

/// One side of the comparison.
#[derive(Serialize)]
struct Side {
    name: &'static str,
    elapsed_s: Vec<f64>,
    processor_s: Vec<f64>,
}

impl Side {
    fn new(name: &'static str) -> Self {
        Self { name, elapsed_s: Vec::new(), processor_s: Vec::new() }
    }

    fn add(&mut self, (elapsed, processor): (Duration, Duration)) {
        self.elapsed_s.push(elapsed.as_secs_f64());
        self.processor_s.push(processor.as_secs_f64());
    }
}

#[derive(Serialize)]
struct Results {
    guest: String,
    cpus: u32,
    memory: &'static str,
    host: String,
    peer: String,
    soft: Side,
    qemu: Side,
    ratio_of_least: f64,
    ratio_of_medians: f64,
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// Boots once.
fn boot(vmm: Vmm) -> Result<(Duration, Duration), Error> {
    let machine = Machine::new("bench").on(vmm).end(End::Wait);
    let machine = if vmm == Vmm::Bhyve { machine.options(&["--engine", "soft"]) } else { machine };
    let started = Instant::now();
    let mut running = machine.start()?;
    running.wait_for("apiary: userspace")?;
    Ok((started.elapsed(), running.processor_time()?))
}

fn first_line(command: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(command).args(arguments).output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

fn host() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} × {model}")
}

fn markdown(results: &Results) -> String {
    let mut text = format!(
        "# Boot to user space\n\n{}, {} processors, {}, on {}; {}\n\n\
         | engine | least s | median s | processor time, median s | runs |\n|---|---|---|---|---|\n",
        results.guest, results.cpus, results.memory, results.host, results.peer
    );
    for side in [&results.soft, &results.qemu] {
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "| {} | {:.2} | {:.2} | {:.2} | {} |",
            side.name,
            least(&side.elapsed_s),
            median(&side.elapsed_s),
            median(&side.processor_s),
            side.elapsed_s.len()
        );
    }
    let _ = writeln!(
        text,
        "\nsoft takes {:.2} times QEMU's time (least), {:.2} times (medians).",
        results.ratio_of_least, results.ratio_of_medians
    );
    text
}

fn run(rounds: usize) -> Result<(), Box<dyn std::error::Error>> {
    let (mut soft, mut qemu) = (Side::new("soft"), Side::new("QEMU TCG"));
    for round in 1..=rounds {
        for (vmm, side) in [(Vmm::Bhyve, &mut soft), (Vmm::Qemu, &mut qemu)] {
            side.add(boot(vmm)?);
            eprintln!("{round}/{rounds} {}: {:.2} s", side.name, side.elapsed_s[round - 1]);
        }
    }
    let build = PathBuf::from(std::env::var_os("APIARY_BUILD").unwrap_or_else(|| "build".into()));
    let package = std::fs::read_to_string(build.join("guests/cloud/package")).unwrap_or_default();
    let results = Results {
        guest: package.trim().into(),
        cpus: 2,
        memory: "512M",
        host: host(),
        peer: first_line("qemu-system-x86_64", &["--version"]),
        ratio_of_least: least(&soft.elapsed_s) / least(&qemu.elapsed_s),
        ratio_of_medians: median(&soft.elapsed_s) / median(&qemu.elapsed_s),
        soft,
        qemu,
    };
    let text = markdown(&results);
    print!("{text}");
    let directory = build.join("bench");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("boot.md"), text)?;
    std::fs::write(directory.join("boot.json"), serde_json::to_string_pretty(&results)?)?;
    Ok(())
}

fn main() -> ExitCode {
    let rounds = match std::env::args().nth(1).map(|argument| argument.parse()) {
        None => ROUNDS,
        Some(Ok(rounds)) if rounds > 0 => rounds,
        Some(_) => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
