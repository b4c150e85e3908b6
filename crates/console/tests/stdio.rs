//! Standard input and output, in a process of their own: this test program runs itself with a terminal, a pipe or nothing
//! at the other end.

mod common;

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use common::{Directories, HostTerminal, expect_somewhere, send};
use console::{Backend, Console, ConsoleError};

const ENDING: &str = "APIARY_TEST_ENDING";

/// Not a test of its own: what the others start. Answers each byte in capitals; at `q` it ends as told.
#[test]
#[ignore = "run by the other tests"]
fn child() {
    let dirs = Directories::new();
    let ending = std::env::var(ENDING).unwrap();
    let console = Console::open(&Backend::Stdio, &dirs.place("one")).unwrap();
    assert!(matches!(
        Console::open(&Backend::Stdio, &dirs.place("two")),
        Err(ConsoleError::StdioTaken { .. })
    ));
    let (sender, input) = channel();
    console
        .start(move |bytes| {
            for byte in bytes {
                let _ = sender.send(*byte);
            }
            bytes.len()
        })
        .unwrap();
    console.sink().write(b"<ready>");
    if ending == "input-ends" {
        // The sender goes with the thread, so nothing but a byte would end this wait.
        assert!(input.recv_timeout(std::time::Duration::from_millis(100)).is_err());
        console.sink().write(b"<output goes on>");
        drop(console);
        return;
    }
    while let Ok(byte) = input.recv() {
        if byte == b'q' {
            match ending.as_str() {
                "drop" => {
                    console.sink().write(b"<farewell>");
                    drop(console);
                    return;
                }
                "exit" => std::process::exit(3),
                "background" => {
                    // Another process group takes the terminal over, as after `bg` in a shell.
                    let mut other =
                        Command::new("cat").stdin(Stdio::piped()).process_group(0).spawn().unwrap();
                    let group = rustix::process::Pid::from_child(&other);
                    rustix::termios::tcsetpgrp(rustix::stdio::stdin(), group).unwrap();
                    drop(console);
                    drop(other.stdin.take());
                    other.wait().unwrap();
                    return;
                }
                "panic" => panic!("as told"),
                _ => unreachable!(),
            }
        }
        console.sink().write(&[b'<', byte.to_ascii_uppercase(), b'>']);
    }
}

fn child_command(ending: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "child", "--nocapture"]).env(ENDING, ending);
    // Tests may run where some signals are ignored, as under nohup(1), and programs inherit that.
    // SAFETY: signal(2) is async-signal-safe, as what runs between fork and exec has to be.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        });
    }
    command
}

fn on(terminal: &HostTerminal, ending: &str) -> Command {
    let mut command = child_command(ending);
    command
        .stdin(terminal.slave.try_clone().unwrap())
        .stdout(terminal.slave.try_clone().unwrap())
        .stderr(Stdio::null());
    command
}

#[test]
fn the_terminal_is_raw_for_the_guest_and_put_back_at_every_end() {
    for ending in ["drop", "exit", "panic"] {
        let mut terminal = HostTerminal::new();
        let mut child = on(&terminal, ending).spawn().unwrap();
        expect_somewhere(&mut terminal.master, "<ready>");
        assert!(terminal.is_raw(), "{ending}");
        send(&mut terminal.master, "\x03a");
        expect_somewhere(&mut terminal.master, "<\x03><A>");
        send(&mut terminal.master, "q");
        if ending == "drop" {
            expect_somewhere(&mut terminal.master, "<farewell>");
        }
        child.wait().unwrap();
        assert!(terminal.is_cooked(), "{ending}");
    }
}

#[test]
fn a_signal_puts_the_terminal_back_and_still_ends_the_process() {
    for signal in
        [rustix::process::Signal::TERM, rustix::process::Signal::HUP, rustix::process::Signal::ABORT]
    {
        let mut terminal = HostTerminal::new();
        let mut child = on(&terminal, "drop").spawn().unwrap();
        expect_somewhere(&mut terminal.master, "<ready>");
        assert!(terminal.is_raw());
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal.as_raw()));
        assert!(terminal.is_cooked());
    }
}

#[test]
fn a_background_job_puts_its_terminal_back_all_the_same() {
    let mut terminal = HostTerminal::new();
    let mut command = on(&terminal, "background");
    // SAFETY: setsid and ioctl are async-signal-safe, as what runs between fork and exec has to be.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    expect_somewhere(&mut terminal.master, "<ready>");
    assert!(terminal.is_raw());
    send(&mut terminal.master, "q");
    child.wait().unwrap();
    assert!(terminal.is_cooked());
}

#[test]
fn pipes_and_closed_input_are_fine() {
    let mut child = child_command("drop")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    expect_somewhere(&mut output, "<ready>");
    input.write_all(b"abcq").unwrap();
    expect_somewhere(&mut output, "<A><B><C><farewell>");
    assert!(child.wait().unwrap().success());

    let output = child_command("input-ends").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("<output goes on>"));
}

#[test]
fn a_file_is_appended_where_it_stands() {
    let dirs = Directories::new();
    let path = dirs.path("log");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(b"before\n").unwrap();
    let status =
        child_command("input-ends").stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).status().unwrap();
    assert!(status.success());
    let mut text = String::new();
    std::fs::File::open(&path).unwrap().read_to_string(&mut text).unwrap();
    assert!(text.starts_with("before\n") && text.contains("<ready><output goes on>"), "{text:?}");
}

#[test]
fn a_reader_that_leaves_does_not_end_the_guest() {
    let mut child = child_command("drop")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    expect_somewhere(&mut output, "<ready>");
    drop(output);
    input.write_all(b"aaaaq").unwrap();
    // It has ended by itself, after reading the q, not by SIGPIPE. (The test harness itself minds its lost output.)
    assert_eq!(child.wait().unwrap().signal(), None);
}
