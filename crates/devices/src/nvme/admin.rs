//! Admin commands (NVMe 1.4 §5).

use memory::GuestMemory;
use vm_memory::Bytes;

use super::bits::{Status, admin, cc, csts, feature, log, size};
use super::queues::{CompletionQueue, SubmissionQueue};
use super::{Command, MAX_ASYNC_EVENTS, Nvme, State, Tag};
use crate::access::lock;

/// Those that there are.
pub(super) const ADMIN_COMMANDS: &[u8] = &[
    admin::DELETE_SQ,
    admin::CREATE_SQ,
    admin::GET_LOG_PAGE,
    admin::DELETE_CQ,
    admin::CREATE_CQ,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
];

/// Flag of both create commands: the queue is contiguous.
const CONTIGUOUS: u32 = 1 << 0;
/// Flag of creating a completion queue: it interrupts.
const INTERRUPTS: u32 = 1 << 1;

/// Writes to where a command wants its data.
fn answer(memory: &GuestMemory, command: &Command, mut bytes: &[u8]) -> Result<u32, Status> {
    for span in command.data(memory, bytes.len() as u64)? {
        let (part, rest) = bytes.split_at(span.len.min(bytes.len()));
        memory.write_slice(part, span.address).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        bytes = rest;
    }
    Ok(0)
}

impl Nvme {
    /// Carries out an admin command.
    pub(super) fn admin(&self, tag: Tag, command: &Command) {
        let result = match command.opcode() {
            admin::DELETE_SQ => self.delete_submission(command),
            admin::CREATE_SQ => self.create_submission(command),
            admin::GET_LOG_PAGE => self.get_log_page(command),
            admin::DELETE_CQ => self.delete_completion(command),
            admin::CREATE_CQ => self.create_completion(command),
            admin::IDENTIFY => {
                let structure = command.dword(10) as u8;
                match self.identify(structure, command.namespace()) {
                    Some(page) => answer(&self.memory, command, &page),
                    None if structure <= super::bits::cns::DESCRIPTORS => Err(Status::INVALID_NAMESPACE),
                    None => Err(Status::INVALID_FIELD),
                }
            }
            // Commands are on the disk at once and cannot be called back: "not aborted" (§5.1).
            admin::ABORT => Ok(1),
            admin::SET_FEATURES => self.set_feature(command),
            admin::GET_FEATURES => self.get_feature(command),
            admin::ASYNC_EVENT_REQUEST => match self.request_event(tag) {
                Ok(()) => return,
                Err(status) => Err(status),
            },
            _ => Err(Status::INVALID_OPCODE),
        };
        match result {
            Ok(result) => self.complete(tag, Status::SUCCESS, result),
            Err(status) => self.complete(tag, status, 0),
        }
    }

    /// Number, size and address that both create commands have.
    fn new_queue(&self, state: &State, command: &Command) -> Result<(u16, u16, u64), Status> {
        let (id, entries) = (command.dword(10) as u16, command.dword(10) >> 16);
        if id == 0 || id > self.config.max_queues {
            return Err(Status::QUEUE_IDENTIFIER);
        }
        if entries == 0 || entries >= u32::from(self.config.queue_size) {
            return Err(Status::QUEUE_SIZE);
        }
        let base = command.qword(6);
        if command.dword(11) & CONTIGUOUS == 0 || !base.is_multiple_of(size::PAGE) {
            return Err(Status::INVALID_FIELD);
        }
        let sizes =
            (state.configuration >> cc::IOSQES_SHIFT & 15, state.configuration >> cc::IOCQES_SHIFT & 15);
        if sizes != (size::SQE_SHIFT, size::CQE_SHIFT) {
            return Err(Status::QUEUE_SIZE);
        }
        Ok((id, entries as u16 + 1, base))
    }

    fn create_completion(&self, command: &Command) -> Result<u32, Status> {
        let mut state = lock(&self.state);
        let (id, entries, base) = self.new_queue(&state, command)?;
        if state.completion.contains_key(&id) {
            return Err(Status::QUEUE_IDENTIFIER);
        }
        let vector = (command.dword(11) >> 16) as u16;
        if vector > self.config.max_queues {
            return Err(Status::INTERRUPT_VECTOR);
        }
        let interrupts = command.dword(11) & INTERRUPTS != 0;
        state.completion.insert(id, CompletionQueue::new(base, entries, interrupts, vector));
        Ok(0)
    }

    fn create_submission(&self, command: &Command) -> Result<u32, Status> {
        let mut state = lock(&self.state);
        let (id, entries, base) = self.new_queue(&state, command)?;
        if state.submission.contains_key(&id) {
            return Err(Status::QUEUE_IDENTIFIER);
        }
        let to = (command.dword(11) >> 16) as u16;
        let queue = state.completion.get_mut(&to).filter(|_| to != 0).ok_or(Status::CQ_INVALID)?;
        queue.users += 1;
        state.submission.insert(id, SubmissionQueue::new(base, entries, to));
        Ok(0)
    }

    fn delete_submission(&self, command: &Command) -> Result<u32, Status> {
        let id = command.dword(10) as u16;
        {
            let mut state = lock(&self.state);
            // From here on nothing is taken off it.
            let queue = state.submission.get_mut(&id).filter(|_| id != 0).ok_or(Status::QUEUE_IDENTIFIER)?;
            queue.tail = queue.head;
        }
        self.disk.abort();
        let mut state = lock(&self.state);
        if let Some(queue) = state.submission.remove(&id)
            && let Some(to) = state.completion.get_mut(&queue.completions)
        {
            to.users = to.users.saturating_sub(1);
        }
        Ok(0)
    }

    fn delete_completion(&self, command: &Command) -> Result<u32, Status> {
        let id = command.dword(10) as u16;
        let mut state = lock(&self.state);
        let queue = state.completion.get(&id).filter(|_| id != 0).ok_or(Status::QUEUE_IDENTIFIER)?;
        if queue.users > 0 {
            return Err(Status::QUEUE_DELETION);
        }
        state.completion.remove(&id);
        self.drive_pin(&state);
        Ok(0)
    }

    fn get_log_page(&self, command: &Command) -> Result<u32, Status> {
        let number = command.dword(10) as u8;
        let page = self.log_page(number).ok_or(Status::LOG_PAGE)?;
        let dwords = u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let offset = command.qword(12);
        if !offset.is_multiple_of(4) || offset > page.len() as u64 {
            return Err(Status::INVALID_FIELD);
        }
        // More than there is reads as zeros, within reason.
        let len = ((dwords + 1) * 4).min(4096) as usize;
        let mut bytes = vec![0; len];
        let from = &page[offset as usize..];
        bytes.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
        answer(&self.memory, command, &bytes)
    }

    /// What a feature is before anybody has set it.
    fn default_feature(&self, number: u8) -> Option<u32> {
        let queues = u32::from(self.config.max_queues) - 1;
        Some(match number {
            feature::ARBITRATION
            | feature::POWER_MANAGEMENT
            | feature::ERROR_RECOVERY
            | feature::INTERRUPT_COALESCING
            | feature::INTERRUPT_VECTOR
            | feature::WRITE_ATOMICITY
            | feature::ASYNC_EVENT => 0,
            feature::TEMPERATURE_THRESHOLD => 0xffff,
            feature::VOLATILE_WRITE_CACHE if !self.disk.info().writethrough => 1,
            feature::NUMBER_OF_QUEUES => queues | queues << 16,
            _ => return None,
        })
    }

    fn get_feature(&self, command: &Command) -> Result<u32, Status> {
        /// Which value: the current, the default, the saved one, or what can be done with the feature.
        const CAPABILITIES: u32 = 3;
        const CHANGEABLE: u32 = 1 << 2;
        let number = command.dword(10) as u8;
        let default = self.default_feature(number).ok_or(Status::INVALID_FIELD)?;
        match command.dword(10) >> 8 & 7 {
            0 => Ok(lock(&self.state).features.get(&number).copied().unwrap_or(default)),
            CAPABILITIES => Ok(CHANGEABLE),
            // Nothing is saved.
            1 | 2 => Ok(default),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn set_feature(&self, command: &Command) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        let (number, value) = (command.dword(10) as u8, command.dword(11));
        let default = self.default_feature(number).ok_or(Status::INVALID_FIELD)?;
        if command.dword(10) & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        match number {
            // It is what it is; a driver may ask for fewer.
            feature::NUMBER_OF_QUEUES if value & 0xffff == 0xffff || value >> 16 == 0xffff => {
                return Err(Status::INVALID_FIELD);
            }
            feature::NUMBER_OF_QUEUES => return Ok(default),
            // There is one power state.
            feature::POWER_MANAGEMENT if value & 31 != 0 => return Err(Status::INVALID_FIELD),
            // The cache is the host's, and stays.
            feature::VOLATILE_WRITE_CACHE if value & 1 == 0 => return Err(Status::FEATURE_NOT_CHANGEABLE),
            _ => {}
        }
        let mut state = lock(&self.state);
        state.features.insert(number, value);
        if number == feature::ASYNC_EVENT {
            self.tell_namespace(&mut state);
        }
        Ok(0)
    }

    fn request_event(&self, tag: Tag) -> Result<(), Status> {
        let mut state = lock(&self.state);
        if state.async_events.len() >= MAX_ASYNC_EVENTS {
            return Err(Status::ASYNC_EVENT_LIMIT);
        }
        // It waits without taking a place among the commands that are carried out.
        if let Some(queue) = state.submission.get_mut(&0) {
            queue.in_flight = queue.in_flight.saturating_sub(1);
        }
        state.async_events.push(tag.command);
        self.tell_namespace(&mut state);
        Ok(())
    }

    /// Ends an asynchronous event request if the namespace has changed, the driver wants to know and has not been told.
    pub(super) fn tell_namespace(&self, state: &mut State) {
        /// Type notice, namespace attribute changed, and the log page that says more.
        const CHANGED: u32 = 2 | (log::CHANGED_NAMESPACES as u32) << 16;
        let wanted =
            state.features.get(&feature::ASYNC_EVENT).is_some_and(|v| v & feature::NOTICE_NAMESPACE != 0);
        if !state.namespace_changed || state.namespace_told || !wanted || state.status & csts::RDY == 0 {
            return;
        }
        let Some(command) = state.async_events.pop() else { return };
        state.namespace_told = true;
        let Some(head) = state.submission.get(&0).map(|queue| queue.head) else { return };
        let Some(queue) = state.completion.get_mut(&0) else { return };
        let entry = super::Completion {
            result: CHANGED,
            queue: 0,
            queue_head: head,
            command,
            status: Status::SUCCESS.field(),
        };
        let posted = queue.post(&self.memory, entry);
        let vector = (posted && queue.interrupts).then_some(queue.vector);
        self.interrupt(state, vector);
    }
}
