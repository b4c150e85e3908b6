//! FXSAVE, XSAVE and their relatives (SDM 1 chapter 13): images composed from and taken apart into
//! [`crate::user::UserRegs`].

use x86::bits::{cr4, efer};
use x86::xsave::{LEGACY_BYTES, MIN_BYTES, XCOMP_BV, XSTATE_BV, component};
use x86::{Exception, Vector};

use crate::cpu::{Cpu, R, gpr};
use crate::interp::op::{Flow, Op};
use crate::mmu::Access;

type F = R<Flow>;

/// Offset of the upper YMM halves in the area.
const AVX: usize = 576;
const AVX_BYTES: usize = 256;
/// Offset of MXCSR and of XMM0 in the legacy region.
const MXCSR: usize = 24;
const XMM: usize = 160;
/// The x87 part of the legacy region: header and ST0–7.
const X87_HEADER: std::ops::Range<usize> = 0..24;
const X87_REGISTERS: std::ops::Range<usize> = 32..160;
/// Largest area that the CPU model has.
const AREA: usize = AVX + AVX_BYTES;

/// Values of [`Op::aux`].
pub mod form {
    #![allow(missing_docs)]
    pub const FXSAVE: u8 = 0;
    pub const FXRSTOR: u8 = 1;
    pub const XSAVE: u8 = 2;
    pub const XSAVEOPT: u8 = 3;
    pub const XRSTOR: u8 = 4;
}

impl Cpu {
    /// Components that are not in their initial state (XINUSE).
    pub fn xstate_in_use(&self) -> u64 {
        let mut used = component::SSE;
        let x87 = &self.user.x87.0;
        let fresh = x87[0..2] == [0x7f, 3] && x87[2..24].iter().all(|b| *b == 0);
        if !fresh || x87[X87_REGISTERS].iter().any(|b| *b != 0) {
            used |= component::X87;
        }
        if self.user.vector.iter().any(|v| v[16..].iter().any(|b| *b != 0)) {
            used |= component::AVX;
        }
        if self.user.mxcsr == 0x1f80 && self.user.vector.iter().all(|v| v[..16].iter().all(|b| *b == 0)) {
            used &= !component::SSE;
        }
        used
    }

    /// Bits of MXCSR that the processor has.
    pub fn mxcsr_mask(&self) -> u32 {
        0xffff | host_mxcsr_mask() & 1 << 17
    }

    /// XMM registers that an image of the current mode holds.
    fn vector_count(&self) -> usize {
        if self.is_64bit() { 16 } else { 8 }
    }

    fn put_x87(&self, area: &mut [u8], wide: bool) {
        area[X87_HEADER].copy_from_slice(&self.user.x87.0[X87_HEADER]);
        area[X87_REGISTERS].copy_from_slice(&self.user.x87.0[X87_REGISTERS]);
        if !wide {
            // FCS and FDS are not kept (CPUID.7.EBX[13] and AMD both say so).
            area[12..16].fill(0);
            area[20..24].fill(0);
        }
    }

    /// Loads the x87 part. The host does it, so that reserved bits, the error summary and the last-instruction pointers come
    /// out as on this processor; outside 64-bit form (`wide`) the pointers are 32 bits.
    fn take_x87(&mut self, area: &[u8], wide: bool) {
        let image = &mut self.user.x87.0;
        image.fill(0);
        image[X87_HEADER].copy_from_slice(&area[X87_HEADER]);
        image[X87_REGISTERS].copy_from_slice(&area[X87_REGISTERS]);
        if !wide {
            image[12..16].fill(0);
            image[20..24].fill(0);
        }
        image[MXCSR..][..4].copy_from_slice(&0x1f80u32.to_le_bytes());
        normalise(&mut self.user.x87);
        // Bits 80–127 of each register are not kept.
        for register in self.user.x87.0[X87_REGISTERS].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
    }

    fn init_x87(&mut self) {
        self.user.x87.0[..LEGACY_BYTES].fill(0);
        self.user.x87.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }

    fn put_vectors(&self, area: &mut [u8]) {
        for index in 0..self.vector_count() {
            area[XMM + 16 * index..][..16].copy_from_slice(&self.user.vector[index][..16]);
        }
    }

    fn take_vectors(&mut self, area: Option<&[u8]>) {
        for index in 0..self.vector_count() {
            match area {
                Some(area) => {
                    self.user.vector[index][..16].copy_from_slice(&area[XMM + 16 * index..][..16]);
                }
                None => self.user.vector[index][..16].fill(0),
            }
        }
    }

    /// All of the state as a standard-form area with room for every component Apiary knows.
    pub fn xsave_image(&self) -> Vec<u8> {
        let mut area = vec![0; x86::xsave::MAX_BYTES];
        self.put_x87(&mut area, true);
        area[MXCSR..][..4].copy_from_slice(&self.user.mxcsr.to_le_bytes());
        area[MXCSR + 4..][..4].copy_from_slice(&self.mxcsr_mask().to_le_bytes());
        for (index, vector) in self.user.vector.iter().enumerate() {
            area[XMM + 16 * index..][..16].copy_from_slice(&vector[..16]);
            area[AVX + 16 * index..][..16].copy_from_slice(&vector[16..]);
        }
        let used = component::X87 | component::SSE | component::AVX;
        area[XSTATE_BV..][..8].copy_from_slice(&used.to_le_bytes());
        area
    }

    /// Loads what [`Cpu::xsave_image`] gave, on this or another engine.
    ///
    /// # Errors
    /// It is too short, holds state that the CPU model lacks, or a bad MXCSR.
    pub fn load_xsave_image(&mut self, area: &[u8]) -> Result<(), String> {
        if area.len() < MIN_BYTES {
            return Err(format!("XSAVE image of {} bytes; at least {MIN_BYTES} are needed", area.len()));
        }
        let mut present = [0; 8];
        present.copy_from_slice(&area[XSTATE_BV..][..8]);
        let present = u64::from_le_bytes(present);
        let known = component::X87 | component::SSE | component::AVX;
        if present & !known != 0 {
            return Err(format!("XSAVE image with components {:#x}, which this CPU lacks", present & !known));
        }
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&area[MXCSR..][..4]);
        let mxcsr = u32::from_le_bytes(mxcsr);
        if mxcsr & !self.mxcsr_mask() != 0 {
            return Err(format!("MXCSR {mxcsr:#x} has bits that this CPU reserves"));
        }
        self.user.mxcsr = mxcsr;
        self.take_x87(area, true);
        for (index, vector) in self.user.vector.iter_mut().enumerate() {
            vector[..16].copy_from_slice(&area[XMM + 16 * index..][..16]);
            if present & component::AVX != 0 && area.len() >= AREA {
                vector[16..].copy_from_slice(&area[AVX + 16 * index..][..16]);
            } else {
                vector[16..].fill(0);
            }
        }
        Ok(())
    }
}

/// Passes an image through the host's x87 registers.
fn normalise(image: &mut crate::user::X87Image) {
    let mut mxcsr = 0u32;
    // SAFETY: the image is 512 bytes and 64-byte aligned, its MXCSR is the default; everything that FXRSTOR changes is
    // declared or put back.
    unsafe {
        core::arch::asm!(
            "stmxcsr [{mxcsr}]",
            "fxrstor64 [{image}]",
            "fxsave64 [{image}]",
            "fninit",
            "ldmxcsr [{mxcsr}]",
            image = in(reg) image.0.as_mut_ptr(),
            mxcsr = in(reg) &raw mut mxcsr,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack)
        );
    }
}

/// MXCSR_MASK of the host.
fn host_mxcsr_mask() -> u32 {
    static MASK: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *MASK.get_or_init(|| {
        let mut image = crate::user::X87Image([0; 512]);
        // SAFETY: the image is 512 bytes and 64-byte aligned; FXSAVE exists on every x86-64 processor.
        unsafe { core::arch::x86_64::_fxsave64(image.0.as_mut_ptr()) };
        let mut mask = [0; 4];
        mask.copy_from_slice(&image.0[28..32]);
        match u32::from_le_bytes(mask) {
            0 => 0xffbf,
            mask => mask,
        }
    })
}

/// The whole family: `aux` is the [`form`], `size` 8 with REX.W.
pub fn xstate(cpu: &mut Cpu, op: &Op) -> F {
    match op.aux {
        form::FXSAVE => fxsave(cpu, op),
        form::FXRSTOR => fxrstor(cpu, op),
        form::XRSTOR => xrstor(cpu, op),
        _ => xsave(cpu, op),
    }
}

/// Address of the image; misalignment is #GP.
fn area_address(cpu: &mut Cpu, op: &Op, len: usize, alignment: u64, access: Access) -> R<u64> {
    let address = cpu.address(op, len as u32, access)?;
    cpu.check_canonical(address)?;
    if address & (alignment - 1) != 0 { cpu.gp0() } else { Ok(address) }
}

fn fpu_available(cpu: &mut Cpu) -> R<()> {
    use x86::bits::cr0;
    if cpu.control.cr0 & cr0::EM != 0 || cpu.control.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(Exception::plain(Vector::DeviceNotAvailable)));
    }
    Ok(())
}

/// With EFER.FFXSR, FXSAVE and FXRSTOR at CPL 0 in 64-bit mode leave the XMM registers out (APM 2 §3.1.7).
fn fast_fxsave(cpu: &Cpu) -> bool {
    cpu.control.efer & efer::FFXSR != 0 && cpu.is_64bit() && cpu.cpl == 0
}

fn fxsave(cpu: &mut Cpu, op: &Op) -> F {
    fpu_available(cpu)?;
    let address = area_address(cpu, op, LEGACY_BYTES, 16, Access::Write)?;
    let mut area = [0u8; LEGACY_BYTES];
    cpu.probe_write(address, LEGACY_BYTES as u64)?;
    cpu.read_bytes(address, &mut area)?;
    cpu.put_x87(&mut area, op.size == 8);
    area[MXCSR..][..4].copy_from_slice(&cpu.user.mxcsr.to_le_bytes());
    area[MXCSR + 4..][..4].copy_from_slice(&cpu.mxcsr_mask().to_le_bytes());
    if cpu.control.cr4 & cr4::OSFXSR != 0 && !fast_fxsave(cpu) {
        cpu.put_vectors(&mut area);
    }
    cpu.write_bytes(address, &area[..416])?;
    Ok(Flow::Next)
}

fn read_mxcsr(cpu: &mut Cpu, area: &[u8]) -> R<u32> {
    let mut mxcsr = [0; 4];
    mxcsr.copy_from_slice(&area[MXCSR..][..4]);
    let mxcsr = u32::from_le_bytes(mxcsr);
    if mxcsr & !cpu.mxcsr_mask() != 0 { cpu.gp0() } else { Ok(mxcsr) }
}

fn fxrstor(cpu: &mut Cpu, op: &Op) -> F {
    fpu_available(cpu)?;
    let address = area_address(cpu, op, LEGACY_BYTES, 16, Access::Read)?;
    let mut area = [0u8; LEGACY_BYTES];
    cpu.read_bytes(address, &mut area)?;
    let mxcsr = read_mxcsr(cpu, &area)?;
    cpu.take_x87(&area, op.size == 8);
    if cpu.control.cr4 & cr4::OSFXSR != 0 {
        cpu.user.mxcsr = mxcsr;
        if !fast_fxsave(cpu) {
            cpu.take_vectors(Some(&area));
        }
    }
    Ok(Flow::Next)
}

/// Requested components: EDX:EAX and XCR0.
fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.user.gpr[gpr::RAX] & 0xffff_ffff | cpu.user.gpr[gpr::RDX] << 32;
    mask & cpu.control.xcr0
}

fn xsave_available(cpu: &mut Cpu) -> R<()> {
    use x86::bits::cr0;
    if cpu.control.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    if cpu.control.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(Exception::plain(Vector::DeviceNotAvailable)));
    }
    Ok(())
}

fn area_len(components: u64) -> usize {
    if components & component::AVX != 0 { AREA } else { MIN_BYTES }
}

fn xsave(cpu: &mut Cpu, op: &Op) -> F {
    xsave_available(cpu)?;
    let wanted = requested(cpu);
    let len = area_len(wanted);
    let address = area_address(cpu, op, len, 64, Access::Write)?;
    let mut area = [0u8; AREA];
    cpu.probe_write(address, len as u64)?;
    cpu.read_bytes(address, &mut area[..len])?;
    let in_use = cpu.xstate_in_use();
    let written = if op.aux == form::XSAVEOPT { wanted & in_use } else { wanted };
    if written & component::X87 != 0 {
        cpu.put_x87(&mut area, op.size == 8);
    }
    if wanted & (component::SSE | component::AVX) != 0 {
        area[MXCSR..][..4].copy_from_slice(&cpu.user.mxcsr.to_le_bytes());
        area[MXCSR + 4..][..4].copy_from_slice(&cpu.mxcsr_mask().to_le_bytes());
    }
    if written & component::SSE != 0 {
        cpu.put_vectors(&mut area);
    }
    if written & component::AVX != 0 {
        for index in 0..cpu.vector_count() {
            area[AVX + 16 * index..][..16].copy_from_slice(&cpu.user.vector[index][16..]);
        }
    }
    let mut header = [0; 8];
    header.copy_from_slice(&area[XSTATE_BV..][..8]);
    let header = u64::from_le_bytes(header) & !wanted | wanted & in_use;
    area[XSTATE_BV..][..8].copy_from_slice(&header.to_le_bytes());
    cpu.write_bytes(address, &area[..len])?;
    Ok(Flow::Next)
}

/// XRSTOR. Legacy region and header are read whatever is asked for, and the header is judged before what lies behind it
/// is touched; then the last byte comes first, whether the component is present or not, and MXCSR is judged when all of
/// the area has been read. (SDM 1 §13.8 leaves the order open; this is what a Zen 4 does.)
fn xrstor(cpu: &mut Cpu, op: &Op) -> F {
    xsave_available(cpu)?;
    let wanted = requested(cpu);
    let len = area_len(wanted);
    let address = area_address(cpu, op, MIN_BYTES, 64, Access::Read)?;
    let mut area = [0u8; AREA];
    cpu.read_bytes(address, &mut area[..MIN_BYTES])?;
    let mut present = [0; 8];
    present.copy_from_slice(&area[XSTATE_BV..][..8]);
    let present = u64::from_le_bytes(present);
    // Standard form: XCOMP_BV and the rest of the header must be zero.
    if present & !cpu.control.xcr0 != 0 || area[XCOMP_BV..XCOMP_BV + 16].iter().any(|b| *b != 0) {
        return cpu.gp0();
    }
    if len > MIN_BYTES {
        cpu.address(op, len as u32, Access::Read)?;
        cpu.read_bytes(address + len as u64 - 1, &mut area[len - 1..len])?;
        cpu.read_bytes(address + MIN_BYTES as u64, &mut area[MIN_BYTES..len])?;
    }
    let mxcsr =
        if wanted & (component::SSE | component::AVX) != 0 { Some(read_mxcsr(cpu, &area)?) } else { None };
    if wanted & component::X87 != 0 {
        if present & component::X87 != 0 { cpu.take_x87(&area, op.size == 8) } else { cpu.init_x87() }
    }
    if let Some(mxcsr) = mxcsr {
        cpu.user.mxcsr = mxcsr;
    }
    if wanted & component::SSE != 0 {
        cpu.take_vectors((present & component::SSE != 0).then_some(&area[..]));
    }
    if wanted & component::AVX != 0 {
        for index in 0..cpu.vector_count() {
            if present & component::AVX != 0 {
                cpu.user.vector[index][16..].copy_from_slice(&area[AVX + 16 * index..][..16]);
            } else {
                cpu.user.vector[index][16..].fill(0);
            }
        }
    }
    Ok(Flow::Next)
}
