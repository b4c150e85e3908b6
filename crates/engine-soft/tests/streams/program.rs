//! Programs as lists of items, so that one that fails can be made smaller item by item.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FastFormatter, Instruction,
    InstructionBlock, MemoryOperand, Register,
};

use super::machine::{COUNTER, END_VECTOR, Mode};

/// A place that branches lead to.
pub type Label = usize;

#[derive(Clone, Debug)]
pub enum Item {
    Label(Label),
    /// An instruction that goes on behind itself.
    Plain(Instruction),
    /// A branch.
    Branch(Code, Label),
    /// The address of a label in a register.
    Address(Register, Label),
    /// Ends the program when the turns are used up. Flags are lost.
    Turn,
    /// Ends the program.
    End,
}

impl Item {
    /// Whether the program makes sense without it.
    pub fn is_removable(&self) -> bool {
        !matches!(self, Item::Label(_) | Item::Turn | Item::End)
    }
}

#[derive(Clone)]
pub struct Program {
    pub mode: Mode,
    pub items: Vec<Item>,
    /// Linear address.
    pub at: u64,
    /// How many turns all loops take together.
    pub turns: u32,
}

pub struct Assembled {
    pub bytes: Vec<u8>,
    /// Begin and end of each instruction.
    pub next: Vec<(u64, u64)>,
}

/// Instructions are known by these addresses until they have their own.
const NUMBERS: u64 = 0x1000_0000;

impl Program {
    fn end_label(&self) -> Label {
        usize::MAX
    }

    /// Instructions, branches leading to numbers; the place of each label among them.
    fn instructions(&self, addresses: &dyn Fn(Label) -> u64) -> (Vec<Instruction>, Vec<(Label, usize)>) {
        let bits = self.mode.bits;
        let mut list: Vec<Instruction> = Vec::new();
        let mut labels = Vec::new();
        let mut branches = Vec::new();
        for item in &self.items {
            match item {
                Item::Label(label) => labels.push((*label, list.len())),
                Item::Plain(instruction) => list.push(*instruction),
                Item::Branch(code, label) => {
                    branches.push((list.len(), *code, *label));
                    list.push(Instruction::default());
                }
                Item::Address(register, label) => list.push(mov(bits, *register, addresses(*label))),
                Item::Turn => {
                    let counter = MemoryOperand::with_displ(COUNTER, bits / 8);
                    list.push(Instruction::with2(Code::Sub_rm32_imm8, counter, 1).expect("an instruction"));
                    let code = if bits == 64 { Code::Js_rel32_64 } else { Code::Js_rel32_32 };
                    branches.push((list.len(), code, self.end_label()));
                    list.push(Instruction::default());
                }
                Item::End => {
                    labels.push((self.end_label(), list.len()));
                    let vector = i32::from(END_VECTOR);
                    list.push(Instruction::with1(Code::Int_imm8, vector).expect("an instruction"));
                }
            }
        }
        for (index, code, label) in branches {
            let place = labels.iter().find(|(known, _)| *known == label).expect("a label").1;
            list[index] = Instruction::with_branch(code, NUMBERS + place as u64).expect("a branch");
        }
        for (index, instruction) in list.iter_mut().enumerate() {
            instruction.set_ip(NUMBERS + index as u64);
        }
        (list, labels)
    }

    pub fn assemble(&self) -> Assembled {
        let encode = |list: &[Instruction]| {
            let block = InstructionBlock::new(list, self.at);
            BlockEncoder::encode(self.mode.bits, block, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
                .unwrap_or_else(|error| panic!("{error}\n{list:?}"))
        };
        // Addresses of labels have one length whatever they are.
        let (list, labels) = self.instructions(&|_| self.at);
        let offsets = encode(&list).new_instruction_offsets;
        let address = |label: Label| {
            let place = labels.iter().find(|(known, _)| *known == label).expect("a label").1;
            self.at + u64::from(offsets[place])
        };
        let (list, _) = self.instructions(&address);
        let bytes = encode(&list).code_buffer;
        let mut decoder = Decoder::new(self.mode.bits, &bytes, DecoderOptions::NONE);
        let mut next = Vec::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            next.push((instruction.ip(), instruction.next_ip()));
        }
        Assembled { bytes, next }
    }

    pub fn listing(&self) -> String {
        let code = self.assemble().bytes;
        let mut decoder = Decoder::with_ip(self.mode.bits, &code, self.at, DecoderOptions::NONE);
        let mut out = format!("{:?}, {} turns\n", self.mode, self.turns);
        let mut formatter = FastFormatter::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            let at = (instruction.ip() - self.at) as usize;
            let bytes: Vec<_> = code[at..at + instruction.len()].iter().map(|b| format!("{b:02x}")).collect();
            out += &format!("  {:x}  {:32} {text}\n", instruction.ip(), bytes.join(" "));
        }
        out
    }
}

/// MOV of a whole register, with the longest immediate.
pub fn mov(bits: u32, register: Register, value: u64) -> Instruction {
    let number = register.full_register().number() as u32;
    let made = if bits == 64 {
        Instruction::with2(Code::Mov_r64_imm64, Register::RAX + number, value)
    } else {
        Instruction::with2(Code::Mov_r32_imm32, Register::EAX + number, value as u32)
    };
    made.expect("an instruction")
}
