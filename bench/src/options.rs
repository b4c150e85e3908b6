//! The command line.

use crate::engine::Engine;

/// What `--help` says.
pub const USAGE: &str = "\
usage: bench/run [boot|suite] [--quick] [--rounds N] [--cpus N[,N]] [--engines NAME[,NAME]...] [--limit SECONDS]
                 [--least] [WORKLOAD]...
       bench/run command ENGINE WORKLOAD...

  boot, suite   only this part; a WORKLOAD means suite
  --quick       the suite once, two processors, short runs: a first impression in a few minutes
  --rounds N    how often everything is measured (boot 5, suite 3 if not said)
  --cpus        the guests' processors, one run of the suite for each (1,2 if not said)
  --engines     of host, soft, interp, qemu; (host,soft,qemu if not said)
                soft    bhyve --engine soft
                interp  the same with -o soft.translate=off
                qemu    QEMU's emulator, -accel tcg,thread=multi -cpu max
                host    the same programs on this machine itself, without a guest
  --limit       how many seconds of a workload are enough, where an engine is too slow for all its passes (5)
  --least       the quickest pass counts, of all runs, instead of the mean pass of the median run: what is left to compare
                on a busy machine; leaves out what a translating engine pays once
  command       prints a command line that boots a guest on that engine, runs each workload in it for the limit (with
                --cpus the guest's processors, 1 if not said), and ends

examples:
  bench/run --quick
  bench/run --engines host,soft --cpus 1 --rounds 1 hash float
  eval \"perf record $(bench/run command soft hash)\"";

/// What is to be measured, and how.
#[derive(Debug)]
pub struct Options {
    pub help: bool,
    pub boot: bool,
    pub suite: bool,
    pub rounds: Option<usize>,
    pub cpus: Vec<u32>,
    pub engines: Vec<Engine>,
    pub limit_s: f64,
    pub least: bool,
    /// Only these, or all if there is none.
    pub workloads: Vec<String>,
    /// Not to measure, only to print how this engine would be started.
    pub command: Option<Engine>,
}

impl Options {
    /// Reads the arguments.
    ///
    /// # Errors
    ///
    /// What is wrong, in words.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            help: false,
            boot: true,
            suite: true,
            rounds: None,
            cpus: vec![1, 2],
            engines: vec![Engine::Host, Engine::Soft, Engine::Qemu],
            limit_s: 5.0,
            least: false,
            workloads: Vec::new(),
            command: None,
        };
        let mut arguments = arguments.peekable();
        match arguments.peek().map(String::as_str) {
            Some("boot") => options.suite = false,
            Some("suite") => options.boot = false,
            Some("command") => {
                arguments.next();
                options.cpus = vec![1];
                options.command = Some(arguments.next().ok_or("command of which engine?")?.parse()?);
            }
            _ => {}
        }
        if !options.suite || !options.boot {
            arguments.next();
        }
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} wants a value"));
            match argument.as_str() {
                "-h" | "--help" => options.help = true,
                "--quick" => {
                    options.boot = false;
                    options.rounds = Some(1);
                    options.cpus = vec![2];
                    options.limit_s = 1.5;
                }
                "--rounds" => options.rounds = Some(number(&value()?)?),
                "--cpus" => options.cpus = list(&value()?, number)?,
                "--engines" => options.engines = list(&value()?, str::parse)?,
                "--least" => options.least = true,
                "--limit" => options.limit_s = number(&value()?)?,
                _ if argument.starts_with('-') => return Err(format!("no option {argument}")),
                // A number alone is how often to boot, as it has always been.
                _ if !options.suite => options.rounds = Some(number(&argument)?),
                _ => {
                    options.boot = false;
                    options.workloads.push(argument);
                }
            }
        }
        if options.rounds == Some(0) || options.cpus.contains(&0) {
            return Err("nothing can be done zero times".into());
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text} is not a number"))
}

fn list<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(read).collect()
}
