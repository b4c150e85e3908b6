//! A machine seen from outside: `bhyvectl`, signals, and what is left after a crash.

use guest::{End, Error, Machine, program};
use rustix::process::Signal;

use crate::{assert_status, listed, status};

fn bhyvectl(machine: &str, option: &str) -> std::process::Output {
    program("bhyvectl", &[&format!("--vm={machine}"), option])
}

/// The power button by SIGTERM; meanwhile the list is true, the name is taken and there are statistics.
#[test]
fn sigterm_presses_the_power_button() -> Result<(), Error> {
    let machine = Machine::new("button").end(End::Wait);
    let mut running = machine.start()?;
    running.wait_for("apiary: userspace")?;
    assert!(listed(machine.name()));
    let second = machine.run()?;
    assert_status(&second, status::ERROR);
    assert!(second.stderr.contains(machine.name()), "{}", second.stderr);
    let stats = bhyvectl(machine.name(), "--get-stats");
    assert!(stats.status.success() && !stats.stdout.is_empty(), "{stats:?}");

    running.wait_for("apiary: waiting")?;
    running.signal(Signal::TERM)?;
    running.wait_for("apiary: power button")?;
    assert_status(&running.wait()?, status::POWEROFF);
    assert!(!listed(machine.name()));
    Ok(())
}

/// Kill -9 in the midst of a boot: the list does not show the dead, and the same name starts again at once. The second
/// signal to that one, which does not listen to a power button yet, powers it off. (SIGINT means the same as SIGTERM; of
/// two pending SIGTERMs the kernel makes one.)
#[test]
fn a_killed_machine_leaves_its_name_free() -> Result<(), Error> {
    let machine = Machine::new("killed");
    let mut running = machine.start()?;
    running.wait_for("Linux version")?;
    running.signal(Signal::KILL)?;
    assert_eq!(running.wait()?.signal, Some(Signal::KILL.as_raw()));
    assert!(!listed(machine.name()));

    let mut running = machine.start()?;
    running.wait_for("Linux version")?;
    assert!(listed(machine.name()));
    running.signal(Signal::TERM)?;
    running.signal(Signal::INT)?;
    assert_status(&running.wait()?, status::POWEROFF);
    assert!(!listed(machine.name()));
    Ok(())
}

/// Forced from outside: reset, power-off, destruction.
#[test]
fn bhyvectl_ends_machines() -> Result<(), Error> {
    for (option, expected) in
        [("--force-reset", Some(status::REBOOT)), ("--force-poweroff", Some(status::POWEROFF))]
    {
        let machine = Machine::new("forced");
        let mut running = machine.start()?;
        running.wait_for("Linux version")?;
        let output = bhyvectl(machine.name(), option);
        assert!(output.status.success(), "{option}: {output:?}");
        assert_eq!(running.wait()?.code, expected, "{option}");
        assert!(!listed(machine.name()));
    }

    let machine = Machine::new("destroyed");
    let mut running = machine.start()?;
    running.wait_for("Linux version")?;
    let output = bhyvectl(machine.name(), "--destroy");
    assert!(output.status.success(), "{output:?}");
    running.wait()?;
    assert!(!listed(machine.name()));

    let output = bhyvectl(machine.name(), "--destroy");
    assert!(!output.status.success(), "there is nothing to destroy any more");
    assert!(String::from_utf8_lossy(&output.stderr).contains(machine.name()), "{output:?}");
    Ok(())
}
