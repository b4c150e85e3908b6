//! Every way in which a guest, or somebody outside, ends a machine, and the exit status that tells it.

mod common;

use common::guest::{COM1, obey_power_button, out8, power_off, print, spin};
use common::{Bed, Outcome, Running, connect};
use control::{Command, MachineState};
use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, ecx};

fn run(arguments: &str, program: impl FnOnce(&mut CodeAssembler)) -> Option<Outcome> {
    let bed = Bed::new();
    let outcome = bed.guest(arguments, program)?.output().unwrap().into();
    bed.assert_clean();
    Some(outcome)
}

#[test]
fn power_off_is_1() {
    let program = |code: &mut CodeAssembler| {
        print(code, "hello from the guest\n");
        power_off(code);
    };
    let Some(outcome) = run("", program) else { return };
    assert_eq!((outcome.status, outcome.stdout.as_str()), (Some(1), "hello from the guest\n"), "{outcome:?}");
    assert_eq!(outcome.stderr, "");
}

#[test]
fn reboot_is_0_by_every_reset_line() {
    for (port, value) in [(0xcf9u16, 0x06u8), (0x64, 0xfe), (0x92, 0x01)] {
        let program = |code: &mut CodeAssembler| {
            out8(code, port, value);
            spin(code);
        };
        let Some(outcome) = run("", program) else { return };
        assert_eq!(outcome.status, Some(0), "port {port:#x}: {outcome:?}");
    }
}

#[test]
fn halt_is_2() {
    let program = |code: &mut CodeAssembler| {
        code.cli().unwrap();
        code.hlt().unwrap();
    };
    let Some(outcome) = run("", program) else { return };
    assert_eq!(outcome.status, Some(2), "{outcome:?}");
}

#[test]
fn triple_fault_is_3() {
    let program = |code: &mut CodeAssembler| {
        // PVH hands over with an IDT limit of zero: any exception is the first of three.
        code.ud2().unwrap();
    };
    let Some(outcome) = run("", program) else { return };
    assert_eq!(outcome.status, Some(3), "{outcome:?}");
    assert!(outcome.stderr.contains("triple fault"), "{outcome:?}");
}

#[test]
fn strict_io_is_4_and_names_the_port() {
    let program = |code: &mut CodeAssembler| {
        out8(code, 0x1234, 7);
        power_off(code);
    };
    let Some(outcome) = run("-e", program) else { return };
    assert_eq!(outcome.status, Some(4), "{outcome:?}");
    assert!(outcome.stderr.contains("0x1234") && outcome.stderr.lines().count() == 1, "{outcome:?}");
    let Some(outcome) = run("", program) else { return };
    assert_eq!(outcome.status, Some(1), "without -e the write goes nowhere: {outcome:?}");
}

#[test]
fn unknown_msrs_fault_unless_w_says_otherwise() {
    let program = |code: &mut CodeAssembler| {
        code.mov(ecx, 0x1234).unwrap();
        code.rdmsr().unwrap();
        code.wrmsr().unwrap();
        power_off(code);
    };
    for (arguments, status) in
        [("", 3), ("-o x86.strictmsr=true", 3), ("-w", 1), ("-o x86.strictmsr=false", 1)]
    {
        let Some(outcome) = run(arguments, program) else { return };
        assert_eq!(outcome.status, Some(status), "{arguments}: {outcome:?}");
    }
}

#[test]
fn memory_above_four_gib_is_there() {
    let program = |code: &mut CodeAssembler| {
        // With paging off the guest cannot reach it; the RTC's NVRAM tells its size in 64 KiB at 5Bh to 5Dh.
        for index in [0x5bu8, 0x5c, 0x5d] {
            out8(code, 0x70, index);
            code.mov(dx, 0x71).unwrap();
            code.in_(al, dx).unwrap();
            code.mov(dx, u32::from(COM1)).unwrap();
            code.out(dx, al).unwrap();
        }
        // And the last word of low RAM can be written and read back.
        code.mov(dword_ptr(0xbfff_fffcu32), 0x6f6b_6f6b).unwrap();
        code.mov(eax, dword_ptr(0xbfff_fffcu32)).unwrap();
        code.mov(dx, u32::from(COM1)).unwrap();
        code.out(dx, al).unwrap();
        power_off(code);
    };
    let Some(outcome) = run("-m 6G", program) else { return };
    assert_eq!((outcome.status, outcome.stdout.as_str()), (Some(1), "\0\u{c0}\0k"), "{outcome:?}");
}

#[test]
fn sigterm_presses_the_power_button() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let bed = Bed::new();
        let Some(command) = bed.guest("", obey_power_button) else { return };
        let mut running = Running::start(command);
        running.wait_for("ready");
        running.signal(signal);
        running.wait_for("button");
        assert_eq!(running.finish().status, Some(1));
        bed.assert_clean();
    }
}

fn deaf(code: &mut CodeAssembler) {
    print(code, "ready\n");
    spin(code);
}

#[test]
fn a_second_sigterm_powers_off() {
    let bed = Bed::new();
    let Some(command) = bed.guest("", deaf) else { return };
    let mut running = Running::start(command);
    running.wait_for("ready");
    running.signal(libc::SIGTERM);
    // Another signal that means the same: two pending signals of one number would be one.
    running.signal(libc::SIGINT);
    let outcome = running.finish();
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
    bed.assert_clean();
}

#[test]
fn the_control_socket_ends_it_in_each_way() {
    for (command, status) in [(Command::Destroy, 4), (Command::ForcePoweroff, 1), (Command::ForceReset, 0)] {
        let bed = Bed::new();
        let Some(start) = bed.guest("", deaf) else { return };
        let mut running = Running::start(start);
        running.wait_for("ready");
        let mut client = connect(&bed, "g1");
        client.call(command.clone()).unwrap();
        drop(client);
        let outcome = running.finish();
        assert_eq!(outcome.status, Some(status), "{command:?}: {outcome:?}");
        bed.assert_clean();
    }
}

#[test]
fn the_control_socket_presses_the_power_button() {
    let bed = Bed::new();
    let Some(command) = bed.guest("", obey_power_button) else { return };
    let mut running = Running::start(command);
    running.wait_for("ready");
    connect(&bed, "g1").call(Command::PowerButton).unwrap();
    running.wait_for("button");
    assert_eq!(running.finish().status, Some(1));
}

#[test]
fn pause_stops_the_guest_and_its_clock() {
    let bed = Bed::new();
    let Some(command) = bed.guest("-c 2", deaf) else { return };
    let mut running = Running::start(command);
    running.wait_for("ready");
    let mut client = connect(&bed, "g1");
    assert!(client.call(Command::Resume).is_err());
    client.call(Command::Pause).unwrap();
    let paused = client.status().unwrap();
    assert_eq!((paused.state, paused.vcpus, paused.memory_bytes), (MachineState::Paused, 2, 32 << 20));
    let before = client.stats().unwrap();
    assert_eq!(before.vcpus.len(), 2);
    assert_eq!(client.status().unwrap().guest_ns, paused.guest_ns);
    assert_eq!(client.stats().unwrap(), before, "a paused guest does nothing");
    client.call(Command::Resume).unwrap();
    while client.stats().unwrap() == before {}
    assert!(client.status().unwrap().guest_ns > paused.guest_ns);
    client.call(Command::Pause).unwrap();
    client.call(Command::Destroy).unwrap();
    assert_eq!(running.finish().status, Some(4), "a paused machine can be ended");
}

#[test]
fn an_output_that_nobody_reads_does_not_hold_the_machine() {
    let bed = Bed::new();
    let program = |code: &mut CodeAssembler| {
        print(code, "x");
        power_off(code);
    };
    let Some(mut command) = bed.guest("", program) else { return };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let outcome: Outcome = command.stdout(writer).output().unwrap().into();
    assert_eq!(outcome.status, Some(1), "{outcome:?}");
}
