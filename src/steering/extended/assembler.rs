//! The parts extended BPF programs are assembled from: instructions by what they do, and labels for jumps forward.

use crate::sys::bpf::Instruction;

/// Registers. R0 takes results, R1 to R5 arguments and are lost in a call, R6 to R9 are kept.
#[derive(Clone, Copy)]
pub(super) enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    /// The end of the stack, which is 512 bytes below it.
    Frame,
}

/// A place that is jumped to before it is reached.
#[derive(Clone, Copy)]
pub(super) struct Label(usize);

/// Conditions of 64-bit jumps: the opcode for a constant, without the bit that says "register".
#[derive(Clone, Copy)]
pub(super) enum Condition {
    Equal = 0x15,
    NotEqual = 0x55,
    Below = 0xa5,
    SignedBelow = 0xc5,
}

/// Operations, the same way; those that end in 32 clear the upper half.
#[derive(Clone, Copy)]
pub(super) enum Operation {
    Add = 0x07,
    Subtract = 0x17,
    Multiply = 0x27,
    And = 0x57,
    ShiftLeft = 0x67,
    ShiftRight = 0x77,
    Move = 0xb7,
    Multiply32 = 0x24,
    ShiftRight32 = 0x74,
    Xor32 = 0xa4,
    Move32 = 0xb4,
}

/// Widths of loads and stores, in the bits of the opcode.
#[derive(Clone, Copy)]
pub(super) enum Width {
    Word = 0x00,
    Byte = 0x10,
    Double = 0x18,
}

/// The bit of an opcode that says that the operand is a register.
const FROM_REGISTER: u8 = 0x08;
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const JUMP: u8 = 0x05;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const LOAD_DOUBLE: u8 = 0x18;
const TO_BIG_ENDIAN: u8 = 0xdc;
/// In the source register of `LOAD_DOUBLE`: its constant is the descriptor of a map.
const PSEUDO_MAP: u8 = 1;

#[derive(Default)]
pub(super) struct Assembler {
    code: Vec<Instruction>,
    /// Instructions whose offset is to lead to a label.
    jumps: Vec<(usize, Label)>,
    /// Where labels have come to be.
    places: Vec<Option<usize>>,
}

impl Assembler {
    pub(super) fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// The label stands for what comes next.
    pub(super) fn place(&mut self, label: Label) {
        debug_assert!(self.places[label.0].is_none(), "a label stands for one place");
        self.places[label.0] = Some(self.code.len());
    }

    fn push(&mut self, opcode: u8, destination: u8, source: u8, offset: i16, immediate: i32) {
        self.code.push(Instruction::new(opcode, destination, source, offset, immediate));
    }

    /// `to = to OPERATION from`.
    pub(super) fn register(&mut self, operation: Operation, to: Register, from: Register) {
        self.push(operation as u8 | FROM_REGISTER, to as u8, from as u8, 0, 0);
    }

    /// `to = to OPERATION value`.
    pub(super) fn constant(&mut self, operation: Operation, to: Register, value: u32) {
        self.push(operation as u8, to as u8, 0, 0, value.cast_signed());
    }

    pub(super) fn load(&mut self, width: Width, to: Register, base: Register, offset: i16) {
        self.push(LOAD | width as u8, to as u8, base as u8, offset, 0);
    }

    pub(super) fn store(&mut self, width: Width, base: Register, offset: i16, from: Register) {
        self.push(STORE | width as u8, base as u8, from as u8, offset, 0);
    }

    /// The lower half as the network writes it, and back.
    pub(super) fn swap_network_order(&mut self, register: Register) {
        self.push(TO_BIG_ENDIAN, register as u8, 0, 0, 32);
    }

    pub(super) fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(JUMP, 0, 0, 0, 0);
    }

    pub(super) fn jump_if(&mut self, left: Register, condition: Condition, right: u32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8, left as u8, 0, 0, right.cast_signed());
    }

    pub(super) fn jump_if_register(&mut self, left: Register, condition: Condition, right: Register, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8 | FROM_REGISTER, left as u8, right as u8, 0, 0);
    }

    /// A helper of the kernel's, by its number.
    pub(super) fn call(&mut self, helper: u32) {
        self.push(CALL, 0, 0, 0, helper.cast_signed());
    }

    pub(super) fn exit(&mut self) {
        self.push(EXIT, 0, 0, 0, 0);
    }

    /// A map, as an argument for helpers.
    pub(super) fn map(&mut self, to: Register, descriptor: i32) {
        self.push(LOAD_DOUBLE, to as u8, PSEUDO_MAP, 0, descriptor);
        self.push(0, 0, 0, 0, 0);
    }

    /// The program, with every jump led to its label.
    pub(super) fn finish(mut self) -> Vec<Instruction> {
        for (from, label) in self.jumps {
            let to = self.places[label.0].expect("a label that is jumped to has its place");
            // Counted from the instruction after the jump; the programs here have a few hundred.
            self.code[from].offset = (to - from - 1) as i16;
        }
        self.code
    }
}
