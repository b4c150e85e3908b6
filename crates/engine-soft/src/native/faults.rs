//! Host faults in generated code. The processor's exception arrives as a signal. In a thunk the handler recognises the guest
//! instruction by the marker in front of it and continues at the thunk's fault exit; in translated code it looks the
//! instruction up in a table and continues at its stub. Signals from elsewhere go to whoever handled them before.

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use x86::exception::Vector;

use super::NativeFault;
use super::emit::{MARKER, MARKER_BYTES, ThunkResult};

/// Signals in which Linux reports the exceptions that user-mode instructions raise.
const SIGNALS: [libc::c_int; 4] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL];

/// What handled each of [`SIGNALS`] before.
static PREVIOUS: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();
/// Serialises installation and changes to the list of regions.
static WRITERS: Mutex<()> = Mutex::new(());
/// Every region of executable memory that thunks were ever in, as a list that signal handlers can walk. Nodes are
/// never freed, but are used again.
static REGIONS: AtomicPtr<Region> = AtomicPtr::new(ptr::null_mut());

struct Region {
    start: AtomicUsize,
    /// Zero while the node is unused.
    end: AtomicUsize,
    /// Where its instructions go on after a fault; null for thunks.
    table: AtomicPtr<Faults>,
    next: *const Region,
}

/// Instructions that may fault, ascending, and where to go on then. Only the thread that runs the code changes it, and
/// never while the code runs; so a signal handler in the code can read it.
struct Faults {
    /// Where the region starts.
    start: usize,
    /// Offsets in the region: the instruction's in the upper half, in the lower where to go on. What is not used yet
    /// takes no memory.
    entries: Box<[AtomicU64]>,
    len: AtomicUsize,
}

/// The faults that are expected in a region of translated code.
pub struct FaultTable {
    faults: Box<Faults>,
    _registration: Registration,
}

/// Bytes of code for which there is one entry.
const BYTES_PER_FAULT: usize = 128;

impl FaultTable {
    /// An empty table for a range of addresses.
    ///
    /// # Errors
    /// The host refuses signal handlers.
    pub fn new(range: Range<usize>) -> io::Result<Self> {
        install()?;
        let entries = zeroed(range.len() / BYTES_PER_FAULT);
        let faults = Box::new(Faults { start: range.start, entries, len: AtomicUsize::new(0) });
        let registration = Registration::new(range, &raw const *faults);
        Ok(FaultTable { faults, _registration: registration })
    }

    /// Entries that can still be added.
    pub fn room(&self) -> usize {
        self.faults.entries.len() - self.faults.len.load(Ordering::Relaxed)
    }

    /// Adds an instruction at a higher address than all before. Without room it is not added.
    pub fn push(&mut self, instruction: u64, resume: u64) {
        let len = self.faults.len.load(Ordering::Relaxed);
        if let Some(entry) = self.faults.entries.get(len) {
            let start = self.faults.start as u64;
            entry.store((instruction - start) << 32 | (resume - start), Ordering::Relaxed);
            self.faults.len.store(len + 1, Ordering::Release);
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.faults.len.store(0, Ordering::Release);
    }
}

impl Faults {
    fn find(&self, rip: usize) -> Option<usize> {
        let entries = self.entries.get(..self.len.load(Ordering::Acquire))?;
        let offset = rip.checked_sub(self.start)? as u64;
        let found =
            entries.binary_search_by_key(&offset, |entry| entry.load(Ordering::Relaxed) >> 32).ok()?;
        Some(self.start + entries[found].load(Ordering::Relaxed) as u32 as usize)
    }
}

/// So many zeroes, of which none takes memory before it is written.
fn zeroed(len: usize) -> Box<[AtomicU64]> {
    let words = Box::into_raw(vec![0u64; len].into_boxed_slice());
    const { assert!(align_of::<AtomicU64>() == align_of::<u64>()) };
    // SAFETY: an atomic word has the size, the alignment and the values of a plain one, and the box is nobody else's.
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}

/// Makes faults in a range of addresses known as those of thunks, while it lives.
pub(super) struct Registration(&'static Region);

// SAFETY: the node is only changed through atomics, under the writers' lock.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    /// For thunks.
    pub(super) fn of_thunks(range: Range<usize>) -> Self {
        Self::new(range, ptr::null())
    }

    /// `table` is null for thunks; otherwise it outlives the registration.
    fn new(range: Range<usize>, table: *const Faults) -> Self {
        let _guard = WRITERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let region = match regions().find(|region| region.end.load(Ordering::Relaxed) == 0) {
            Some(unused) => unused,
            None => {
                let next = REGIONS.load(Ordering::Relaxed);
                let node = Box::leak(Box::new(Region {
                    start: AtomicUsize::new(0),
                    end: AtomicUsize::new(0),
                    table: AtomicPtr::new(ptr::null_mut()),
                    next,
                }));
                REGIONS.store(node, Ordering::Release);
                node
            }
        };
        region.table.store(table.cast_mut(), Ordering::Release);
        region.start.store(range.start, Ordering::Release);
        region.end.store(range.end, Ordering::Release);
        Registration(region)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _guard = WRITERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.0.end.store(0, Ordering::Release);
    }
}

fn regions() -> impl Iterator<Item = &'static Region> {
    let mut next: *const Region = REGIONS.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: nodes are leaked boxes, complete before they are linked, and never freed.
        let region = unsafe { next.as_ref() }?;
        next = region.next;
        Some(region)
    })
}

/// Installs the signal handlers, once in a process. Handlers that the process installs later for the same signals have
/// to pass on what is not theirs.
pub(super) fn install() -> io::Result<()> {
    let _guard = WRITERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero is a valid value of the C structure.
    let mut previous: [libc::sigaction; SIGNALS.len()] = unsafe { std::mem::zeroed() };
    for (signal, old) in SIGNALS.into_iter().zip(&mut previous) {
        // SAFETY: asks only; `old` is valid for writing.
        if unsafe { libc::sigaction(signal, ptr::null(), old) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    PREVIOUS.get_or_init(|| previous);
    for signal in SIGNALS {
        // SAFETY: all-zero is a valid value of the C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the structure is initialised, and the handler does only what is allowed in a signal handler.
        if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The signal handler.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a `ucontext_t` that the handler may change.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    match place_of(rip) {
        Some(Place::Thunk(exit)) => {
            let vector = registers[libc::REG_TRAPNO as usize];
            registers[libc::REG_RIP as usize] = exit as i64;
            registers[libc::REG_RAX as usize] = vector + 1;
            registers[libc::REG_RDX as usize] = registers[libc::REG_CR2 as usize];
            return;
        }
        Some(Place::Translated(stub)) => {
            registers[libc::REG_RIP as usize] = stub as i64;
            return;
        }
        None => {}
    }
    // SAFETY: the arguments are the kernel's, unchanged.
    unsafe { pass_on(signal, info, context) };
}

/// Where to go on after a fault.
enum Place {
    /// The fault exit of a thunk, which expects the vector and the address.
    Thunk(usize),
    /// The stub of an instruction in translated code, which expects the registers as they were.
    Translated(usize),
}

/// Where to go on if `rip` is a guest instruction in generated code.
fn place_of(rip: usize) -> Option<Place> {
    let inside = |region: &&Region| {
        let end = region.end.load(Ordering::Acquire);
        let start = region.start.load(Ordering::Acquire);
        rip >= start.saturating_add(MARKER_BYTES) && rip < end
    };
    let region = regions().find(inside)?;
    let table = region.table.load(Ordering::Acquire);
    if !table.is_null() {
        // SAFETY: the table outlives the registration, and this thread is in its code.
        return unsafe { &*table }.find(rip).map(Place::Translated);
    }
    // SAFETY: the bytes before `rip` are in the same readable mapping of code.
    let marker = unsafe { ptr::read_unaligned((rip - MARKER_BYTES) as *const [u8; MARKER_BYTES]) };
    let distance = marker.strip_prefix(&MARKER)?;
    let distance = i32::from_le_bytes(distance.try_into().ok()?);
    rip.checked_add_signed(distance as isize).map(Place::Thunk)
}

/// Does what would have been done with the signal before [`install`].
///
/// # Safety
/// To be called from a signal handler with its own arguments.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS.iter().position(|s| *s == signal).and_then(|i| PREVIOUS.get().map(|p| &p[i]));
    match previous {
        Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: the kernel would have called this address with this signature.
                let function: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(action.sa_sigaction) };
                function(signal, info, context);
            } else {
                // SAFETY: as above.
                let function: extern "C" fn(libc::c_int) =
                    unsafe { std::mem::transmute(action.sa_sigaction) };
                function(signal);
            }
        }
        _ => {
            // SAFETY: all-zero with SIG_DFL is the default action; then the fault, or the signal raised again, ends
            // the process as it would have without us.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, ptr::null_mut());
                libc::raise(signal);
            }
        }
    }
}

/// What a thunk's result says.
pub(super) fn decode(result: ThunkResult) -> Result<(), NativeFault> {
    const PAGE_FAULT: u64 = Vector::PageFault as u64;
    const DIVIDE: u64 = Vector::DivideError as u64;
    const SIMD: u64 = Vector::Simd as u64;
    const X87: u64 = Vector::X87 as u64;
    const UNDEFINED: u64 = Vector::InvalidOpcode as u64;
    const PROTECTION: u64 = Vector::GeneralProtection as u64;
    const STACK: u64 = Vector::StackFault as u64;
    const ALIGNMENT: u64 = Vector::AlignmentCheck as u64;
    let Some(vector) = result.vector_plus_one.checked_sub(1) else {
        return Ok(());
    };
    Err(match vector {
        DIVIDE => NativeFault::DivideError,
        SIMD => NativeFault::Simd,
        X87 => NativeFault::X87,
        UNDEFINED => NativeFault::InvalidOpcode,
        PROTECTION | STACK => NativeFault::GeneralProtection,
        ALIGNMENT => NativeFault::AlignmentCheck,
        PAGE_FAULT => NativeFault::HostMemory { address: result.address },
        other => NativeFault::Unexpected { vector: other as u8 },
    })
}
