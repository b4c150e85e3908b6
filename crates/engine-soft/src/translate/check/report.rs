//! What is said about a block that did not come to the same both ways.

use std::fmt::Write;

use iced_x86::{Decoder, FastFormatter};

use super::Piece;
use super::journal::{Difference, Journal};
use super::state::State;
use crate::cpu::Cpu;
use crate::interp::decode;
use crate::translate::cache::Variant;

/// What differs.
pub(super) struct Report {
    /// Guest-physical address of the block.
    gpa: u64,
    /// Its bytes, and how many instructions of it ran.
    bytes: Box<[u8]>,
    count: usize,
    /// What differs of the registers, in words.
    registers: Vec<String>,
    memory: Vec<Difference>,
    /// The translated code would access a device.
    met_device: bool,
}

impl Report {
    /// Of the two ends of a piece that is at a guest-physical address.
    pub fn new(
        gpa: u64,
        piece: &Piece,
        undefined_flags: u16,
        interpreted: &State,
        translated: &State,
        journal: &Journal,
    ) -> Report {
        let registers = interpreted
            .list(undefined_flags)
            .into_iter()
            .zip(translated.list(undefined_flags))
            .filter(|(a, b)| a != b)
            .map(|((name, a), (_, b))| format!("{name}: interpreter {a}, translator {b}"))
            .collect();
        Report {
            gpa,
            bytes: piece.bytes.clone(),
            count: piece.undefined.len(),
            registers,
            memory: journal.differences(),
            met_device: journal.met_device(),
        }
    }

    /// All of it in words; the block began in state `start`.
    pub fn text(&self, cpu: &Cpu, start: &State, variant: Variant) -> String {
        let mut text = format!(
            "interpreter and translator differ over the block at physical address {:#x} ({variant})\n",
            self.gpa
        );
        text += &self.listing(cpu.user.rip, variant.code_bits());
        for line in &self.registers {
            let _ = writeln!(text, "  {line}");
        }
        for Difference { host, interpreted, found } in &self.memory {
            let at = match cpu.map.find_host(*host as *const u8) {
                Some((_, gpa)) => format!("physical address {gpa:#x}"),
                None => format!("host address {host:#x}"),
            };
            let _ = writeln!(text, "  {at}: interpreter {interpreted:02x?}, translator {found:02x?}");
        }
        if self.met_device {
            text += "  the translator accesses a device, the interpreter does not\n";
        }
        text += "It began with";
        for (name, value) in start.list(0) {
            let _ = write!(text, "\n  {name}: {value}");
        }
        text
    }

    /// Address, bytes and text of each instruction.
    fn listing(&self, rip: u64, bits: u32) -> String {
        let mut decoder = Decoder::with_ip(bits, &self.bytes, rip, decode::options());
        let mut formatter = FastFormatter::new();
        let mut listing = String::new();
        for _ in 0..self.count {
            let from = decoder.position();
            let instruction = decoder.decode();
            let bytes: String =
                self.bytes[from..decoder.position()].iter().map(|b| format!("{b:02x} ")).collect();
            let _ = write!(listing, "  {:x}  {bytes:<32}", instruction.ip());
            formatter.format(&instruction, &mut listing);
            listing.push('\n');
        }
        listing
    }
}
