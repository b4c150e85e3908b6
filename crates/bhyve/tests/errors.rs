//! What is wrong with a command line or its files is told in one helpful line, with exit status 4 and nothing left.

mod common;

use std::fs;

use common::guest;
use common::{Bed, Outcome, Running};

/// Status 4, one line on standard error that begins like the program, nothing on standard output.
fn assert_one_line(arguments: &str, outcome: &Outcome, words: &[&str]) {
    assert_eq!(outcome.status, Some(4), "{arguments}: {outcome:?}");
    assert!(outcome.stdout.is_empty(), "{arguments}: {outcome:?}");
    let line = outcome.stderr.strip_suffix('\n').unwrap_or(&outcome.stderr);
    assert!(line.starts_with("bhyve: ") && !line.contains('\n'), "{arguments}: {outcome:?}");
    assert!(!line.contains("panicked"), "{arguments}: {outcome:?}");
    for word in words {
        assert!(line.contains(word), "{arguments}: {line:?} does not say {word:?}");
    }
}

#[test]
fn wrong_uses_are_told_in_one_line() {
    let bed = Bed::new();
    fs::write(bed.path("ok"), guest::kernel(guest::power_off)).unwrap();
    fs::write(bed.path("empty"), "").unwrap();
    fs::write(bed.path("text"), "not a kernel").unwrap();
    let mut bzimage = vec![0u8; 0x400];
    bzimage[0x1f1] = 4;
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    fs::write(bed.path("truncated"), bzimage).unwrap();
    for (arguments, words) in [
        ("-m 100T --kernel ok g", &["100 TiB", "this host has", "-m"][..]),
        ("-m 1M --kernel ok g", &["-m", "2 MiB"]),
        ("-m much --kernel ok g", &["-m", "much"]),
        ("-c 0 --kernel ok g", &["-c", "0"]),
        ("-c 2,sockets=3 --kernel ok g", &["sockets", "3"]),
        ("-s 32,lpc --kernel ok g", &["32", "0 to 31"]),
        ("-s 3,nosuch --kernel ok g", &["nosuch"]),
        ("-s 3,virtio-blk,disk.img --kernel ok g", &["disk.img", "does not exist"]),
        ("-s 3:0,e1000,tap0 --kernel ok g", &["e1000", "not available in this build"]),
        ("-s 1:0:0,hostbridge --kernel ok g", &["bus 1", "not available in this build"]),
        ("-l bootrom,OVMF.fd --kernel ok g", &["bootrom", "not available in this build"]),
        ("-G 1234 --kernel ok g", &["-G", "not available in this build"]),
        ("-r snapshot g", &["-r", "not available in this build"]),
        ("-s 31,lpc -l com1,/nosuch/tty --kernel ok g", &["com1", "/nosuch/tty"]),
        ("-s 31,lpc -l com1,./text --kernel ok g", &["com1", "not a terminal"]),
        ("-s 31,lpc -l com1,tcp=203.0.113.1:1 --kernel ok g", &["com1", "203.0.113.1"]),
        ("-s 0,hostbridge g", &["nothing to boot", "--kernel"]),
        ("--kernel nosuch g", &["--kernel", "nosuch", "check the path"]),
        ("--kernel . g", &["not a file"]),
        ("--kernel empty g", &["empty"]),
        ("--kernel text g", &["text", "bzImage"]),
        ("--kernel ok --initrd nosuch g", &["--initrd", "nosuch"]),
        ("--engine turbo --kernel ok g", &["turbo", "kvm", "soft"]),
        ("--kernel ok +nosuchfeature g", &["nosuchfeature"]),
        ("-o x86.strictio=maybe --kernel ok g", &["x86.strictio", "maybe"]),
        ("--kernel ok a/b", &["a/b"]),
        ("--kernel ok", &["name"]),
        ("-Z g", &["-Z"]),
    ] {
        assert_one_line(arguments, &bed.run(arguments), words);
        bed.assert_clean();
    }
    // What fails last: a good deal has to be taken down again.
    let Some(mut command) = bed.guest("-p 0:1023", guest::power_off) else { return };
    let outcome = Outcome::from(command.output().unwrap());
    assert_one_line("-p 0:1023", &outcome, &["-p 0:1023", "of this host are 0"]);
    bed.assert_clean();
    let Some(mut command) = bed.guest("--kernel truncated", guest::power_off) else { return };
    let outcome = Outcome::from(command.output().unwrap());
    assert_one_line("--kernel truncated", &outcome, &["truncated"]);
    bed.assert_clean();
}

#[test]
fn a_name_runs_once() {
    let bed = Bed::new();
    let deaf = |code: &mut _| {
        guest::print(code, "ready\n");
        guest::spin(code);
    };
    let Some(command) = bed.guest("", deaf) else { return };
    let mut running = Running::start(command);
    running.wait_for("ready");
    let second = bed.run("--kernel kernel g1");
    let pid = running.child.id().to_string();
    assert_one_line("g1 again", &second, &["g1", "already running", &pid, "--destroy"]);
    // The first is not harmed, and ends without leaving anything.
    common::connect(&bed, "g1").call(control::Command::Destroy).unwrap();
    assert_eq!(running.finish().status, Some(4));
    bed.assert_clean();
}

#[test]
fn a_killed_machine_does_not_keep_its_name() {
    let bed = Bed::new();
    let deaf = |code: &mut _| {
        guest::print(code, "ready\n");
        guest::spin(code);
    };
    for _ in 0..5 {
        let Some(command) = bed.guest("", deaf) else { return };
        let mut running = Running::start(command);
        running.wait_for("ready");
        running.signal(libc::SIGKILL);
        // At once: the killed process may not even be gone yet.
    }
    let off = bed.guest("", guest::power_off).unwrap().output().unwrap();
    assert_eq!(off.status.code(), Some(1), "{}", String::from_utf8_lossy(&off.stderr));
    bed.assert_clean();
}

#[test]
fn help_version_lists_and_dump_succeed() {
    let bed = Bed::new();
    for (arguments, words) in [
        ("-h", &["--kernel", "--engine", "-s"][..]),
        ("--version", &["bhyve", "Apiary"]),
        ("-s help", &["hostbridge\n", "lpc\n", "virtio-blk\n"]),
        ("-l help", &["com1\n", "bootrom\n"]),
        ("-c 2 -m 1G -o config.dump=1 g7", &["name=g7\n", "cpus=2\n", "memory.size=1G\n"]),
    ] {
        let outcome = bed.run(arguments);
        assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(0), ""), "{arguments}: {outcome:?}");
        for word in words {
            assert!(outcome.stdout.contains(word), "{arguments}: no {word:?} in {:?}", outcome.stdout);
        }
    }
    bed.assert_clean();
}
