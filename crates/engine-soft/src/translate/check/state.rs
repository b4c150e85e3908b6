//! The registers of a processor as a comparison keeps them: all that an instruction which can be run twice may change.

use std::ops::Range;

use x86::{ControlRegisters, DebugRegisters, DescriptorTable, Exception, Segment};

use crate::cpu::{Cpu, Mode, R};
use crate::tlb::Privilege;

/// x87 state in an FXSAVE image: all of it but MXCSR, which is kept elsewhere, and XMM registers.
const X87: [Range<usize>; 2] = [0..24, 32..X87_BYTES];

/// Where x87 state ends in an FXSAVE image.
const X87_BYTES: usize = 160;

/// Defines [`State`] and how it is taken, restored and compared, from the names of the processor's fields that are simply
/// copied.
macro_rules! state {
    (user: $($user:ident: $user_type:ty),*; cpu: $($field:ident: $type:ty),*;) => {
        /// Registers, and what follows from them.
        #[derive(Clone)]
        pub(super) struct State {
            $(pub $user: $user_type,)*
            $($field: $type,)*
            x87: [u8; X87_BYTES],
            pub status: u16,
            kernel_gs_base: u64,
            exception: Option<Exception>,
        }

        impl State {
            /// The present state, after a run with this result.
            #[inline(always)]
            pub fn of(cpu: &Cpu, result: R<()>) -> State {
                let mut x87 = [0; X87_BYTES];
                x87.copy_from_slice(&cpu.user.x87.0[..X87_BYTES]);
                State {
                    $($user: cpu.user.$user,)*
                    $($field: cpu.$field,)*
                    x87,
                    status: cpu.user.status,
                    kernel_gs_base: cpu.msrs.kernel_gs_base,
                    exception: result.err().map(|_| cpu.raised_exception()),
                }
            }

            /// Makes it the present state again.
            pub fn restore(&self, cpu: &mut Cpu) {
                $(cpu.user.$user = self.$user;)*
                $(cpu.$field = self.$field;)*
                cpu.user.x87.0[..X87_BYTES].copy_from_slice(&self.x87);
                cpu.user.status = self.status;
                cpu.msrs.kernel_gs_base = self.kernel_gs_base;
            }

            /// Whether it is the present state, after a run with this result, but for the status flags.
            pub fn is_state_of(&self, cpu: &Cpu, result: R<()>) -> bool {
                true $(&& self.$user == cpu.user.$user)*
                    $(&& self.$field == cpu.$field)*
                    && X87.iter().all(|range| self.x87[range.clone()] == cpu.user.x87.0[range.clone()])
                    && self.kernel_gs_base == cpu.msrs.kernel_gs_base
                    && self.exception == result.err().map(|_| cpu.raised_exception())
            }
        }
    };
}

state! {
    user: gpr: [u64; 16], rip: u64, segment_base: [u64; 6], direction: u16, mxcsr: u32, vector: [[u8; 32]; 16];
    cpu: system_flags: u64, segments: [Segment; 6], ldt: Segment, tr: Segment, gdt: DescriptorTable,
        idt: DescriptorTable, control: ControlRegisters, debug: DebugRegisters, interrupt_shadow: bool,
        nmi_masked: bool, pending_debug: u64, privilege: Privilege, cpl: u8, mode: Mode, code_bits: u8,
        disabled: u8, unchecked_segments: u8, alignment_check: bool, stack_mask: u64, watchpoints: bool;
}

impl State {
    /// Every register with its name and value; undefined flags as zero.
    pub fn list(&self, undefined_flags: u16) -> Vec<(String, String)> {
        const GPR: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        const SEGMENT: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
        let mut list = vec![("rip".to_owned(), format!("{:x}", self.rip))];
        let mut add = |name: &str, value: String| list.push((name.to_owned(), value));
        GPR.iter().zip(self.gpr).for_each(|(name, value)| add(name, format!("{value:x}")));
        add("status flags (SF ZF AF PF CF, OF)", format!("{:04x}", self.status & !undefined_flags));
        add("direction flag", self.direction.to_string());
        add("system flags", format!("{:x}", self.system_flags));
        add("mxcsr", format!("{:x}", self.mxcsr));
        for (number, value) in self.vector.iter().enumerate() {
            add(&format!("ymm{number}"), bytes_downwards(value));
        }
        for range in X87 {
            for (index, value) in self.x87[range.clone()].chunks(16).enumerate() {
                add(&format!("x87 image, byte {} on", range.start + 16 * index), bytes_downwards(value));
            }
        }
        for (index, name) in SEGMENT.iter().enumerate() {
            add(name, format!("{:x?}, base used {:x}", self.segments[index], self.segment_base[index]));
        }
        add("ldtr", format!("{:x?}", self.ldt));
        add("tr", format!("{:x?}", self.tr));
        add("gdtr", format!("{:x?}", self.gdt));
        add("idtr", format!("{:x?}", self.idt));
        add("control registers", format!("{:x?}", self.control));
        add("debug registers", format!("{:x?}, pending {:x}", self.debug, self.pending_debug));
        add("kernel gs base", format!("{:x}", self.kernel_gs_base));
        add("events", format!("shadow {}, NMIs masked {}", self.interrupt_shadow, self.nmi_masked));
        add(
            "mode",
            format!(
                "{:?}, {}-bit, CPL {}, {:?}, disabled {:x}, unchecked {:x}, alignment {}, stack {:x}, watched {}",
                self.mode,
                self.code_bits,
                self.cpl,
                self.privilege,
                self.disabled,
                self.unchecked_segments,
                self.alignment_check,
                self.stack_mask,
                self.watchpoints
            ),
        );
        add("exception", format!("{:x?}", self.exception));
        list
    }
}

/// As one number, the last byte first.
fn bytes_downwards(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}
