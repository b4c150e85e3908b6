//! The text of `bhyve -h`, written from the tables that the command line is read with.

use std::fmt::Write;

use crate::cli::{Group, OPTIONS};
use crate::{lpc, pci};

const HEADINGS: &[(Group, &str)] = &[
    (Group::Processors, "Processors"),
    (Group::Memory, "Memory"),
    (Group::Boot, "What to boot (or -l bootrom)"),
    (Group::Devices, "Devices"),
    (Group::Firmware, "Firmware tables"),
    (Group::Running, "Running"),
    (Group::Settings, "Configuration variables, bhyve_config(5)"),
    (Group::Help, "Help"),
];

/// Column at which explanations start.
const INDENT: usize = 24;

/// The widest line.
const WIDTH: usize = 96;

/// The whole text, ending in a line feed.
pub fn text() -> String {
    let mut out = String::from(
        "usage: bhyve [options] [+feature,-feature,...] NAME\n\
         \x20      bhyve -s help | -l help | -h\n\n\
         Runs the virtual machine NAME until its guest powers off, reboots or fails.\n\
         Options are read in order; where two set the same variable, the later one counts.\n",
    );
    for (group, heading) in HEADINGS {
        section(&mut out, heading);
        for option in OPTIONS.iter().filter(|option| option.group == *group) {
            entry(&mut out, &option.form(), option.help, "");
        }
        if *group == Group::Processors {
            entry(&mut out, "+feature,-feature", "CPU features to add or take away, as in +avx2,-x2apic", "");
        }
    }
    section(&mut out, "PCI devices (-s SLOT,DEVICE, -s SLOT:FUNCTION,DEVICE or -s BUS:SLOT:FUNCTION,DEVICE)");
    for device in pci::DEVICES {
        entry(&mut out, device.name, device.summary, device.form);
    }
    section(&mut out, "LPC devices (-l DEVICE)");
    for device in lpc::DEVICES {
        entry(&mut out, device.name, device.summary, device.form);
    }
    out.push_str(
        "\nExamples:\n\
         \x20 bhyve -A -H -P -c 2 -m 1G -s 0,hostbridge -s 1,lpc -l com1,stdio \\\n\
         \x20       -s 2,virtio-net,tap0 -s 3,virtio-blk,/vm/web.img \\\n\
         \x20       --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0 web\n\
         \x20 bhyve -k web.conf -o config.dump=1\n\
         \nExit status: 0 reboot, 1 power-off, 2 halt, 3 triple fault, 4 error.\n",
    );
    out
}

fn section(out: &mut String, heading: &str) {
    let _ = writeln!(out, "\n{heading}:");
}

/// A term, its explanation beside it or, where the term is long, below it, and a form below that.
fn entry(out: &mut String, term: &str, explanation: &str, form: &str) {
    let mut line = format!("  {term}");
    if line.len() + 2 > INDENT {
        out.push_str(&line);
        out.push('\n');
        line.clear();
    }
    let _ = write!(out, "{line:INDENT$}");
    wrap(out, explanation);
    if !form.is_empty() {
        let _ = write!(out, "{:INDENT$}", "");
        wrap(out, form);
    }
}

/// Writes text that starts at the explanations' column, breaking lines at spaces and, in forms, before `[,`.
fn wrap(out: &mut String, text: &str) {
    let mut column = INDENT;
    let spaced = text.replace("[,", "\u{0}[,");
    for word in spaced.split_inclusive([' ', '\u{0}']) {
        let length = word.trim_end_matches([' ', '\u{0}']).len();
        if column > INDENT && column + length > WIDTH {
            out.truncate(out.trim_end_matches(' ').len());
            let _ = write!(out, "\n{:INDENT$}", "");
            column = INDENT;
        }
        let word = word.trim_end_matches('\u{0}');
        out.push_str(word);
        column += word.len();
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_and_device_is_explained() {
        let text = text();
        for option in OPTIONS {
            let form = format!("  {}", option.form());
            assert!(text.lines().any(|line| line.starts_with(&form)), "{form}");
        }
        for name in pci::DEVICES.iter().map(|d| d.name).chain(lpc::DEVICES.iter().map(|d| d.name)) {
            assert!(text.lines().any(|line| line.split_whitespace().next() == Some(name)), "{name}");
        }
    }

    #[test]
    fn lines_fit_and_end_cleanly() {
        for line in text().lines() {
            assert!(line.len() <= WIDTH && line.trim_end() == line && !line.contains('\0'), "{line:?}");
        }
    }

    #[test]
    fn every_letter_of_bhyve_is_there_once() {
        let mut letters: Vec<char> = OPTIONS.iter().filter_map(|option| option.short).collect();
        letters.sort_unstable();
        let manual: String = letters.into_iter().collect();
        assert_eq!(manual, "ACDGHIKPSUWYacefhklmoprsuwx");
    }
}
