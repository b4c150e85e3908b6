//! Programs that try the software CPU in the ways that are hard for it, inside a Debian guest: code that rewrites itself,
//! pages that are absent, single steps and breakpoints, a just-in-time compiler, 32-bit programs beside 64-bit ones,
//! stress-ng. They are in `tests/guest`, judge themselves, and say so.
//!
//! Each test gives its programs a few seconds; with `APIARY_PROOF_SECONDS` in the environment that many, shared among
//! them (`make stress`: ten minutes). `APIARY_PROOF_OPTIONS` has more options for bhyve, with spaces between.

use std::time::Duration;

use guest::{Error, Machine, Root};

use crate::{assert_status, status};

/// What starting a guest and its programs may take, however busy the host is.
const OVERHEAD: Duration = Duration::from_secs(480);
/// Programs that run once may take that much longer on a slow engine than the time they are given.
const STRETCH: u32 = 4;

fn seconds() -> u32 {
    std::env::var("APIARY_PROOF_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Runs programs of /proof, one after the other, and looks for the verdict of each.
fn prove(name: &str, cpus: u32, programs: &[&str]) -> Result<(), Error> {
    let options = std::env::var("APIARY_PROOF_OPTIONS").unwrap_or_default();
    let options: Vec<_> = options.split_whitespace().collect();
    let machine = Machine::new(name)
        .root(Root::Debian)
        .cpus(&cpus.to_string())
        .memory("2G")
        .options(&["--engine", "soft"])
        .options(&options);
    let each = (seconds() / programs.len() as u32).to_string();
    let machine = programs
        .iter()
        .fold(machine, |machine, program| machine.program(&[&format!("/proof/{program}"), &each]));
    let mut running = machine.start()?;
    running.set_limit(OVERHEAD + STRETCH * Duration::from_secs(seconds().into()));
    let ended = running.wait()?;
    assert_status(&ended, status::POWEROFF);
    let said = ended.console.split_once("apiary: userspace").map_or(&*ended.console, |(_, said)| said);
    let lines = || said.lines().map(str::trim_end);
    let well = lines().filter(|line| *line == "apiary: status: 0").count();
    assert_eq!(well, programs.len(), "programs that ended well; the guest said: {said}");
    for program in programs {
        // As the program calls itself: without `.sh` for a script, without `-32` for the 32-bit form.
        let called = program.trim_end_matches(".sh").trim_end_matches("-32");
        let verdict = format!("{called}: passed");
        assert!(lines().any(|line| line.starts_with(&verdict)), "{program} has said nothing: {said}");
    }
    Ok(())
}

#[test]
fn code_that_rewrites_itself() -> Result<(), Error> {
    prove("selfmod", 2, &["selfmod", "selfmod-32"])
}

#[test]
fn pages_that_are_absent() -> Result<(), Error> {
    prove("absent", 1, &["absent", "absent-32"])
}

#[test]
fn single_steps_and_breakpoints() -> Result<(), Error> {
    prove("steps", 2, &["step", "step-32", "breakpoints", "breakpoints-32"])
}

#[test]
fn a_just_in_time_compiler() -> Result<(), Error> {
    prove("jit", 2, &["jit.sh"])
}

#[test]
fn programs_of_32_bits_beside_64() -> Result<(), Error> {
    prove("i386", 2, &["i386.sh"])
}

#[test]
fn stress_on_one_processor() -> Result<(), Error> {
    prove("stress1", 1, &["stress.sh"])
}

#[test]
fn stress_on_two_processors() -> Result<(), Error> {
    prove("stress2", 2, &["stress.sh"])
}

#[test]
fn stress_on_four_processors() -> Result<(), Error> {
    prove("stress4", 4, &["stress.sh"])
}
