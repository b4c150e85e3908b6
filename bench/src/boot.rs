//! The time from starting the program to the guest's first line from user space, for the same kernel, initramfs,
//! processors and memory, on our soft engine and on QEMU's emulator.
//!
//! The two take turns. Elapsed time and processor time are taken at the moment the line is read. The result is printed
//! and written to `boot.md` and `boot.json`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{End, Error};
use serde::Serialize;

use crate::engine::Engine;
use crate::host;
use crate::numbers::{least, median};

/// How often each boots when nothing else is said.
const ROUNDS: usize = 5;

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

/// Boots once; elapsed time and processor time. Nothing is to be booted on the host.
pub fn boot(engine: Engine, cpus: u32) -> Result<(Duration, Duration), Error> {
    let Some(machine) = engine.machine("bench") else { return Ok((Duration::ZERO, Duration::ZERO)) };
    let started = Instant::now();
    let mut running = machine.cpus(&cpus.to_string()).end(End::Wait).start()?;
    running.wait_for("apiary: userspace")?;
    Ok((started.elapsed(), running.processor_time()?))
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

/// Boots each `rounds` times.
///
/// # Errors
///
/// If a machine does not boot, or the results cannot be written.
pub fn run(rounds: Option<usize>, directory: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let rounds = rounds.unwrap_or(ROUNDS);
    let (mut soft, mut qemu) = (Side::new("soft"), Side::new("QEMU TCG"));
    for round in 1..=rounds {
        for (engine, side) in [(Engine::Soft, &mut soft), (Engine::Qemu, &mut qemu)] {
            side.add(boot(engine, 2)?);
            eprintln!("{round}/{rounds} boot, {}: {:.2} s", side.name, side.elapsed_s[round - 1]);
        }
    }
    let package = std::fs::read_to_string(directory.join("../guests/cloud/package")).unwrap_or_default();
    let results = Results {
        guest: package.trim().into(),
        cpus: 2,
        memory: "512M",
        host: host::description(),
        peer: host::first_line("qemu-system-x86_64", &["--version"]),
        ratio_of_least: least(&soft.elapsed_s) / least(&qemu.elapsed_s),
        ratio_of_medians: median(&soft.elapsed_s) / median(&qemu.elapsed_s),
        soft,
        qemu,
    };
    let text = markdown(&results);
    println!("{text}");
    std::fs::write(directory.join("boot.md"), text)?;
    std::fs::write(directory.join("boot.json"), serde_json::to_string_pretty(&results)?)?;
    Ok(())
}
