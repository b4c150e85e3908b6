//! Instructions of translated code that the interpreter's handlers execute. A unit keeps of an instruction nothing but its bytes; it
//! is decoded when a handler is wanted for it, and kept for a while, since some are wanted all the time.

use iced_x86::Instruction;

use super::cache::Variant;
use crate::interp::decode::Decoded;
use crate::interp::op::Op;
use crate::native::Thunk;

/// How many are kept.
const ENTRIES: usize = 4096;

/// What executing a site's instruction takes.
#[derive(Clone, Copy)]
pub struct HandlerCall {
    /// The instruction, decoded.
    pub op: Op,
    /// The variant of its unit.
    pub variant: Variant,
    /// Where the code after it begins; 0 if the unit has to be left there.
    pub resume: u64,
}

struct Entry {
    site: u32,
    call: HandlerCall,
    /// What the operation refers to.
    _instruction: Option<Box<Instruction>>,
    _thunk: Option<Box<Thunk>>,
}

/// The calls that were made lately: a direct-mapped table by number of the site.
pub struct HandlerCalls(Box<[Option<Entry>]>);

impl HandlerCalls {
    /// An empty table.
    pub fn new() -> Self {
        HandlerCalls((0..ENTRIES).map(|_| None).collect())
    }

    /// What is known of a site.
    pub fn find(&self, site: u32) -> Option<HandlerCall> {
        let entry = self.0[site as usize % ENTRIES].as_ref()?;
        (entry.site == site).then_some(entry.call)
    }

    /// Keeps the first instruction of `decoded` as that of a site; `None` if nothing was decoded.
    pub fn insert(
        &mut self,
        site: u32,
        mut decoded: Decoded,
        variant: Variant,
        resume: u64,
    ) -> Option<HandlerCall> {
        let call = HandlerCall { op: *decoded.ops.first()?, variant, resume };
        let (_instruction, _thunk) = (decoded.instructions.pop(), decoded.thunks.pop());
        self.0[site as usize % ENTRIES] = Some(Entry { site, call, _instruction, _thunk });
        Some(call)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.fill_with(|| None);
    }
}
