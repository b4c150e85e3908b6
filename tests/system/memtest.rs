//! memtest86+: no operating system, every memory access its own, and a screen on the serial line.

use guest::{Error, Kernel, Machine};
use rustix::process::Signal;

/// The number of the test that the screen shows last: `#4  [Moving inversions, 8 bit pattern]`.
fn test_number(screen: &[u8]) -> Option<u32> {
    let screen = String::from_utf8_lossy(screen);
    let (before, _) = screen.rsplit_once("  [")?;
    before.rsplit_once('#').and_then(|(_, number)| number.trim().parse().ok())
}

/// The screen comes up, and one test after the other is done, without an error found.
#[test]
fn memtest_goes_through_its_tests() -> Result<(), Error> {
    let mut machine = Machine::new("memtest").kernel(Kernel::Memtest).memory("64M").start()?;
    machine.wait_for("Memtest86+")?;
    let first = machine.wait_until("a test's number", test_number)?;
    let next = machine
        .wait_until("the test after the next", |screen| test_number(screen).filter(|n| *n >= first + 2))?;
    assert!(next <= 10, "memtest86+ has tests up to 10, the screen says {next}");
    let screen = machine.console();
    assert!(screen.contains("Errors: 0"), "{screen}");
    assert!(!screen.contains("Failing Address"), "{screen}");
    machine.signal(Signal::KILL)?;
    let ended = machine.wait()?;
    assert_eq!(ended.signal, Some(Signal::KILL.as_raw()));
    Ok(())
}
