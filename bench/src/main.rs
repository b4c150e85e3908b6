//! The benchmarks, each side by side with a peer; see `docs/performance.md`.
//!
//! `boot` is the time from starting the program to the guest's first line from user space; `suite` runs the workloads of
//! `bench/guest` in a Debian guest and on the bare host. What is compared takes turns within one run, so that what else
//! the host does falls on all. `make bench` runs both.

#![forbid(unsafe_code)]

mod boot;
mod engine;
mod host;
mod idle;
mod numbers;
mod options;
mod report;
mod suite;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use options::Options;

/// Where the results go.
fn directory() -> std::io::Result<PathBuf> {
    let build = PathBuf::from(std::env::var_os("APIARY_BUILD").unwrap_or_else(|| "build".into()));
    let directory = build.join("bench");
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// `false` if there are results and something in them is wrong.
fn run(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    if let Some(engine) = options.command {
        let names: Vec<&str> = options.workloads.iter().map(String::as_str).collect();
        println!("{}", suite::command_line(engine, options, &names));
        return Ok(true);
    }
    let mut right = true;
    if options.boot {
        boot::run(options.rounds, &directory()?)?;
    }
    if options.suite {
        right = suite::run(options, &directory()?)?;
    }
    Ok(right)
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("bench: {problem}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    if options.help {
        println!("{}", options::USAGE);
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
