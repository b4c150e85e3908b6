//! The reference: the host processor executes the raw bytes of one instruction, with every register loaded, at the guest's
//! own addresses. Nothing here is shared with the code under test.
//!
//! The code memory is full of INT3, so each execution ends in a signal, wherever it goes; the handler takes the
//! general registers and leaves through a stub that stores the vector and x87 state. 32-bit code runs in Linux's
//! compatibility segment, 16-bit code in segments of the process's own local descriptor table.

use std::arch::global_asm;
use std::cell::UnsafeCell;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

use iced_x86::Code;

use super::state::*;

const SIGNALS: [libc::c_int; 5] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGTRAP];

/// Linux's segment selectors for user mode (GDT entries 4 to 6).
const CODE_32: u16 = 0x23;
const DATA_FLAT: u16 = 0x2b;
const CODE_64: u16 = 0x33;
/// Entries of our LDT.
const CODE_16: u16 = 0x07;
const DATA_16: u16 = 0x0f;

#[repr(C, align(64))]
struct Run {
    input: State,
    output: State,
    host_rsp: u64,
    vector: u64,
    error_code: u64,
    address: u64,
    target_offset: u32,
    target_selector: u16,
    data_selector: u16,
    stack_selector: u16,
}

struct Shared(UnsafeCell<Run>);
// SAFETY: only used under `LOCK`, and by the signal handler of the thread that holds it.
unsafe impl Sync for Shared {}

const EMPTY: State = State { x87: [0; 512], vector: [[0; 32]; 16], gpr: [0; 16], rip: 0, rflags: 0 };
static RUN: Shared = Shared(UnsafeCell::new(Run {
    input: EMPTY,
    output: EMPTY,
    host_rsp: 0,
    vector: 0,
    error_code: 0,
    address: 0,
    target_offset: 0,
    target_selector: 0,
    data_selector: 0,
    stack_selector: 0,
}));
static LOCK: Mutex<()> = Mutex::new(());
static ACTIVE: AtomicBool = AtomicBool::new(false);
static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();

global_asm!(
    ".globl differential_enter",
    ".globl differential_leave",
    "differential_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "stmxcsr [rsp]",
    "lea rax, [rip + {run}]",
    "mov [rax + {host_rsp}], rsp",
    "fxrstor64 [rax + {in_x87}]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vmovdqu ymm\\n, [rax + {in_vector} + \\n * 32]",
    ".endr",
    "movzx ecx, word ptr [rax + {data_selector}]",
    "mov ds, ecx",
    "mov es, ecx",
    "movzx ecx, word ptr [rax + {stack_selector}]",
    "mov ss, ecx",
    "push qword ptr [rax + {in_rflags}]",
    "popfq",
    "mov rcx, [rax + {in_gpr} + 8]",
    "mov rdx, [rax + {in_gpr} + 16]",
    "mov rbx, [rax + {in_gpr} + 24]",
    "mov rsp, [rax + {in_gpr} + 32]",
    "mov rbp, [rax + {in_gpr} + 40]",
    "mov rsi, [rax + {in_gpr} + 48]",
    "mov rdi, [rax + {in_gpr} + 56]",
    ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov r\\n, [rax + {in_gpr} + \\n * 8]",
    ".endr",
    "mov rax, [rax + {in_gpr}]",
    // Far jump through a 16:32 pointer.
    ".byte 0xff, 0x2d",
    ".long {run} + {target} - . - 4",
    "differential_leave:",
    "lea rax, [rip + {run}]",
    "fxsave64 [rax + {out_x87}]",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vmovdqu [rax + {out_vector} + \\n * 32], ymm\\n",
    ".endr",
    "xor ecx, ecx",
    "mov ds, ecx",
    "mov es, ecx",
    "fninit",
    "ldmxcsr [rsp]",
    "vzeroupper",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    run = sym RUN,
    host_rsp = const offset_of!(Run, host_rsp),
    in_x87 = const offset_of!(Run, input) + offset_of!(State, x87),
    in_vector = const offset_of!(Run, input) + offset_of!(State, vector),
    in_gpr = const offset_of!(Run, input) + offset_of!(State, gpr),
    in_rflags = const offset_of!(Run, input) + offset_of!(State, rflags),
    out_x87 = const offset_of!(Run, output) + offset_of!(State, x87),
    out_vector = const offset_of!(Run, output) + offset_of!(State, vector),
    data_selector = const offset_of!(Run, data_selector),
    stack_selector = const offset_of!(Run, stack_selector),
    target = const offset_of!(Run, target_offset),
);

unsafe extern "C" {
    fn differential_enter();
    fn differential_leave();
}

/// The host processor. Exists once at a time.
pub struct Host {
    _lock: MutexGuard<'static, ()>,
    memory: *mut u8,
    code: *mut u8,
    has_16_bit: bool,
    last_len: usize,
}

impl Host {
    pub fn new() -> io::Result<Host> {
        let lock = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let code = map(CODE, CODE_BYTES, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?;
        let memory = map_data()?;
        // SAFETY: the area was just mapped with this length.
        unsafe { code.write_bytes(0xcc, CODE_BYTES) };
        install_handlers()?;
        own_signal_stack()?;
        // SAFETY: the GS base is not used by anything else in a Rust process on Linux.
        if unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1001, GS_BASE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let has_16_bit = describe_16_bit_segments().is_ok();
        Ok(Host { _lock: lock, memory, code, has_16_bit, last_len: 0 })
    }

    /// Whether 16-bit code can be run; it needs the modify_ldt system call.
    pub fn has_16_bit(&self) -> bool {
        self.has_16_bit
    }

    /// Sets the bytes of the data area.
    pub fn set_memory(&mut self, bytes: &Memory) {
        // SAFETY: the alias is writable, of this size, and nothing in Rust refers to it.
        unsafe { self.memory.copy_from(bytes.0.as_ptr(), DATA_BYTES) };
    }

    /// The bytes of the data area as they are now.
    pub fn memory(&self) -> &[u8] {
        // SAFETY: the alias is mapped and readable, and does not change while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.memory, DATA_BYTES) }
    }

    /// Changes the rights of the code area.
    fn protect_code(&self, protection: i32) {
        // SAFETY: the area is this runner's own mapping.
        let refused = unsafe { libc::mprotect(self.code.cast(), CODE_BYTES, protection) } != 0;
        assert!(!refused, "mprotect of the code area: {}", std::io::Error::last_os_error());
    }

    /// Executes the instruction of `case` in its state and the present memory.
    pub fn run(&mut self, case: &Case<'_>) -> Outcome {
        let run = RUN.0.get();
        // SAFETY: the lock is held, and the handler runs only inside `differential_enter`. The code area is writable and
        // has room for an instruction.
        unsafe {
            let entry = self.code.add(CODE_ENTRY as usize);
            self.protect_code(libc::PROT_READ | libc::PROT_WRITE);
            entry.write_bytes(0xcc, self.last_len);
            entry.copy_from(case.bytes.as_ptr(), case.bytes.len());
            // Code cannot be written while it runs: a stray store must not be the next case's code.
            self.protect_code(libc::PROT_READ | libc::PROT_EXEC);
            (*run).input = case.state.clone();
            (*run).target_offset = case.state.rip as u32;
            ((*run).target_selector, (*run).data_selector, (*run).stack_selector) = match case.bitness {
                16 => (CODE_16, DATA_16, DATA_16),
                32 => (CODE_32, DATA_FLAT, DATA_FLAT),
                _ => (CODE_64, DATA_FLAT, DATA_FLAT),
            };
            ACTIVE.store(true, Ordering::SeqCst);
            differential_enter();
        }
        self.last_len = case.bytes.len();
        // SAFETY: as above; the execution is over.
        let run = unsafe { &*run };
        let mut state = run.output.clone();
        if case.bitness != 64 {
            state.gpr.iter_mut().for_each(|gpr| *gpr &= 0xffff_ffff);
        }
        let arrived = state.rip != case.state.rip;
        let fetch = run.vector == 14 && run.error_code & 0x10 != 0;
        let end = match run.vector {
            3 if case.instruction.code() != Code::Int3 => {
                state.rip -= 1;
                End::Done
            }
            // It got where it was told to, and there is nothing.
            14 if arrived && fetch && run.address == code_base(case.bitness) + state.rip => End::Done,
            vector => End::Fault {
                vector: vector as u8,
                error_code: run.error_code as u32,
                address: if vector == 14 { run.address } else { 0 },
            },
        };
        Outcome { end, state }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: both areas were mapped by `new` and are used by nothing else.
        unsafe {
            libc::munmap(self.code.cast(), CODE_BYTES);
            libc::munmap(DATA as *mut _, DATA_BYTES);
            libc::munmap(self.memory.cast(), DATA_BYTES);
        }
    }
}

fn map(address: u64, len: usize, protection: libc::c_int) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: with MAP_FIXED_NOREPLACE no existing mapping is touched.
    let mapped = unsafe { libc::mmap(address as *mut _, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(mapped.cast())
}

/// Maps the data area for the guest, and returns a second mapping of it through which all of it can be changed.
fn map_data() -> io::Result<*mut u8> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"differential".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(DATA_BYTES as u64)?;
    let map = |address: u64, protection, flags| {
        // SAFETY: without MAP_FIXED, no existing mapping is touched.
        let at = unsafe { libc::mmap(address as *mut _, DATA_BYTES, protection, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast::<u8>()) }
    };
    map(DATA, libc::PROT_NONE, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE)?;
    for (range, protection) in [(WRITABLE, libc::PROT_READ | libc::PROT_WRITE), (READ_ONLY, libc::PROT_READ)]
    {
        let len = (range.end - range.start) as usize;
        // SAFETY: the range belongs to the area just mapped.
        if unsafe { libc::mprotect(range.start as *mut _, len, protection) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // So that the page tables say what the guest's would.
        for page in range.step_by(PAGE as usize) {
            // SAFETY: the page was just made readable.
            unsafe { (page as *const u8).read_volatile() };
        }
    }
    map(0, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
}

/// The guest's stack pointer can be anything, so signals need their own stack.
fn own_signal_stack() -> io::Result<()> {
    const LEN: usize = 1 << 17;
    let stack = libc::stack_t {
        ss_sp: Box::leak(vec![0u8; LEN].into_boxed_slice()).as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: LEN,
    };
    // SAFETY: the stack is leaked, so it outlives the thread.
    match unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct user_desc` of modify_ldt(2).
#[repr(C)]
struct UserDescriptor {
    entry_number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

fn describe_16_bit_segments() -> io::Result<()> {
    const SEG_32BIT: u32 = 1;
    const CONTENTS_CODE: u32 = 2 << 1;
    const LIMIT_IN_PAGES: u32 = 1 << 4;
    const USABLE: u32 = 1 << 6;
    let descriptors = [
        UserDescriptor { entry_number: 0, base: CODE as u32, limit: 0xffff, flags: CONTENTS_CODE | USABLE },
        UserDescriptor {
            entry_number: 1,
            base: DATA as u32,
            limit: 0xf_ffff,
            flags: SEG_32BIT | LIMIT_IN_PAGES | USABLE,
        },
    ];
    for descriptor in &descriptors {
        // SAFETY: the structure is as modify_ldt(2) wants it.
        let result = unsafe {
            libc::syscall(libc::SYS_modify_ldt, 0x11, descriptor, std::mem::size_of::<UserDescriptor>())
        };
        if result as i32 != 0 {
            return Err(io::Error::from_raw_os_error(-(result as i32)));
        }
    }
    Ok(())
}

fn install_handlers() -> io::Result<()> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero is a valid value of the C structure.
    let mut previous: [libc::sigaction; SIGNALS.len()] = unsafe { std::mem::zeroed() };
    for (signal, old) in SIGNALS.into_iter().zip(&mut previous) {
        // SAFETY: all-zero is a valid value of the C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler is a function of the right signature, `old` is valid for writing.
        if unsafe { libc::sigaction(signal, &action, old) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    PREVIOUS.get_or_init(|| previous);
    Ok(())
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if !ACTIVE.swap(false, Ordering::SeqCst) {
        // Not ours: as it was before, or the end.
        let previous = SIGNALS.iter().position(|s| *s == signal).and_then(|i| PREVIOUS.get().map(|p| &p[i]));
        // SAFETY: the kernel would have called the address with this signature; else the default action is restored.
        unsafe {
            match previous {
                Some(old) if old.sa_sigaction > 1 && old.sa_flags & libc::SA_SIGINFO != 0 => {
                    let function: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(old.sa_sigaction);
                    function(signal, info, context);
                }
                _ => {
                    libc::signal(signal, libc::SIG_DFL);
                    libc::raise(signal);
                }
            }
        }
        return;
    }
    let run = RUN.0.get();
    // SAFETY: the kernel passes a ucontext; `RUN` belongs to the interrupted `Host::run`.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        use libc::*;
        let order = [
            REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10,
            REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
        ];
        for (number, index) in order.into_iter().enumerate() {
            (*run).output.gpr[number] = registers[index as usize] as u64;
        }
        (*run).output.rip = registers[REG_RIP as usize] as u64;
        (*run).output.rflags = registers[REG_EFL as usize] as u64;
        (*run).vector = registers[REG_TRAPNO as usize] as u64;
        (*run).error_code = registers[REG_ERR as usize] as u64;
        (*run).address = registers[REG_CR2 as usize] as u64;
        registers[REG_RIP as usize] = differential_leave as *const () as i64;
        registers[REG_RSP as usize] = (*run).host_rsp as i64;
        registers[REG_EFL as usize] = 0x202;
        // CS in the lowest 16 bits, SS in the highest.
        let middle = registers[REG_CSGSFS as usize] as u64 & 0x0000_ffff_ffff_0000;
        let selectors = middle | u64::from(CODE_64) | u64::from(DATA_FLAT) << 48;
        registers[REG_CSGSFS as usize] = selectors as i64;
    }
}
