//! com1 on a terminal: a shell for whoever started the machine.

use guest::{Console, End, Error, Machine};

use crate::assert_status;
use crate::status;

/// What is typed arrives, what the guest prints comes back, `poweroff` ends it, and the terminal is as it was before.
#[test]
fn shell_on_com1() -> Result<(), Error> {
    let mut machine = Machine::new("shell").console(Console::Terminal).end(End::Shell).start()?;
    machine.wait_for("guest# ")?;
    let during = machine.terminal_settings()?;
    machine.send("echo product $((6 * 7))\r")?;
    machine.wait_for("product 42")?;
    // Ctrl-C is the guest's: it ends what runs in there, not the machine. It goes to the terminal's foreground process
    // group, so it is typed when a word from within that group has come: before, the shell itself would take it.
    machine.wait_for("guest# ")?;
    machine.send("sh -c 'echo run $((6 * 8)); exec sleep 1000000'\r")?;
    machine.wait_for("run 48")?;
    machine.send("\x03")?;
    machine.wait_for("guest# ")?;
    machine.send("poweroff\r")?;
    let (ended, after) = machine.wait_with_terminal()?;
    assert_status(&ended, status::POWEROFF);
    assert_ne!(during, after, "the terminal is raw while the machine runs, and not afterwards");
    assert!(after.is_some_and(|settings| settings.contains("ICANON")), "the terminal is as it was before");
    Ok(())
}
