//! The extended program: chooses a slot by weight, passes over those with a stale heartbeat, and selects its listener.
//!
//! As pseudo-code, with `header`, `stale_after` and `entries` in memory that the table writes:
//! ```text
//! number = random, or a hash of the client's address and both ports
//! (length, base) = header                           one load
//! first = choose entries[base + number * length]    by the alias method, see `alias`
//! if fresh(first) and select(first): done
//! position = another number * length
//! 7 times: slot = the owner of entries[base + position]; if fresh(slot) and select(slot): done; position += 1
//! select(first), or leave it to the kernel's hash over all members
//!
//! fresh(slot) = since[slot] == 0 or since[slot] >= now - stale_after
//! ```
//! After the first choice it goes from entry to entry instead of choosing anew: so it finds a fresh slot for certain
//! among up to seven, and of two slots with one stale no connection meets that one. It starts from another number, so
//! that what a stale slot does not get is spread over all and not on its neighbour. If all it looked at are stale the
//! first choice stands, since then the weights are all there is to go by.

use super::assembler::{Assembler, Condition, Label, Operation, Register, Width};
use crate::steering::Draw;
use crate::steering::hash::{MIX_ONE, MIX_TWO, SPREAD};
use crate::sys::bpf::Instruction;
use Condition::{AtLeast, Below, Equal, NotEqual, SignedBelow};
use Operation::{Add, And, Move, Move32, Multiply, Multiply32, ShiftLeft, ShiftRight, ShiftRight32, Subtract, Xor32};
use Register::{Frame, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use Width::{Byte, Double, Word};

/// Words of the table's memory: the count of entries in force in the lower half, the position of the first in the upper.
pub(super) const HEADER: usize = 0;
/// Nanoseconds.
pub(super) const STALE_AFTER: usize = 1;
/// Where entries begin, on a cache line of their own.
pub(super) const ENTRIES: usize = 8;

/// Slots looked at before the first choice stands: that one, and seven more.
const TRIES: u32 = 8;

/// Helpers of the kernel's, from linux/bpf.h.
const KTIME_GET_NS: u32 = 5;
const GET_PRANDOM_U32: u32 = 7;
const SKB_LOAD_BYTES: u32 = 26;
const SKB_LOAD_BYTES_RELATIVE: u32 = 68;
const SK_SELECT_REUSEPORT: u32 = 82;
/// `BPF_HDR_START_NET`: offsets count from the network header.
const FROM_NETWORK_HEADER: u32 = 1;
const SK_PASS: u32 = 1;

/// Places on the stack.
const SLOT: i16 = -8;
const FIRST: i16 = -16;
const HEADER_SEEN: i16 = -24;
const NUMBER: i16 = -32;
const PACKET: i16 = -48;

/// What a program works with: descriptors of maps, and how many slots they have room for.
pub(super) struct Plan {
    pub draw: Draw,
    pub slots: u16,
    pub table: i32,
    pub heartbeats: i32,
    pub sockets: i32,
}

/// The program of one group. Throughout it R6 is the context, R7 the table, and R9 the time before which a heartbeat is
/// stale.
pub(super) fn program(plan: &Plan) -> Vec<Instruction> {
    let mut code = Assembler::default();
    code.register(Move, R6, R1);
    code.map_value(R7, plan.table);
    draw(&mut code, plan.draw);
    code.store(Double, Frame, NUMBER, R8);
    code.call(KTIME_GET_NS);
    code.register(Move, R9, R0);
    code.load(Double, R1, R7, byte(STALE_AFTER));
    code.register(Subtract, R9, R1);
    code.load(Double, R1, R7, byte(HEADER));
    code.store(Double, Frame, HEADER_SEEN, R1);

    let give_up = code.label();
    choose_first(&mut code, plan, give_up);
    let next = code.label();
    select_if_fresh(&mut code, plan, next);
    code.place(next);
    for attempt in 1..TRIES {
        if attempt == 1 {
            another_position(&mut code, plan.draw);
        } else {
            next_position(&mut code);
        }
        owner_of_entry(&mut code, plan, give_up);
        let next = code.label();
        select_if_fresh(&mut code, plan, next);
        code.place(next);
    }

    code.load(Double, R0, Frame, FIRST);
    code.store(Double, Frame, SLOT, R0);
    select(&mut code, plan);
    code.place(give_up);
    // Without a selection the kernel's hash over all members decides.
    code.constant(Move, R0, SK_PASS);
    code.exit();
    code.finish()
}

fn byte(word: usize) -> i16 {
    (8 * word) as i16
}

/// A number of 32 well mixed bits into R8.
fn draw(code: &mut Assembler, draw: Draw) {
    let done = code.label();
    if let Draw::Hash { seed } = draw {
        let no_packet = code.label();
        hash(code, seed, no_packet);
        code.jump(done);
        code.place(no_packet);
    }
    random(code);
    code.place(done);
}

fn random(code: &mut Assembler) {
    code.call(GET_PRANDOM_U32);
    code.register(Move32, R8, R0);
}

/// As the classic program of `steering::hash` computes it.
fn hash(code: &mut Assembler, seed: u32, no_packet: Label) {
    let (v6, ports) = (code.label(), code.label());
    load_packet(code, SKB_LOAD_BYTES_RELATIVE, 0, 1, no_packet);
    code.load(Byte, R1, Frame, PACKET);
    code.constant(ShiftRight, R1, 4);
    code.jump_if(R1, Equal, 6, v6);
    load_packet(code, SKB_LOAD_BYTES_RELATIVE, 12, 4, no_packet);
    load_number(code, 0);
    code.register(Move32, R8, R1);
    code.constant(Multiply32, R8, SPREAD);
    code.jump(ports);

    code.place(v6);
    load_packet(code, SKB_LOAD_BYTES_RELATIVE, 8, 16, no_packet);
    code.constant(Move32, R8, 0);
    for word in 0..4 {
        load_number(code, 4 * word);
        code.register(Xor32, R8, R1);
        code.constant(Multiply32, R8, SPREAD);
    }

    code.place(ports);
    load_packet(code, SKB_LOAD_BYTES, 0, 4, no_packet);
    load_number(code, 0);
    code.register(Xor32, R8, R1);
    code.constant(Xor32, R8, seed);
    mix(code);
}

/// The finaliser of MurmurHash3, in R8.
fn mix(code: &mut Assembler) {
    for (shift, multiplier) in [(16, Some(MIX_ONE)), (13, Some(MIX_TWO)), (16, None)] {
        code.register(Move32, R1, R8);
        code.constant(ShiftRight32, R1, shift);
        code.register(Xor32, R8, R1);
        if let Some(multiplier) = multiplier {
            code.constant(Multiply32, R8, multiplier);
        }
    }
}

/// Bytes of the packet onto the stack: from the network header on, or from the one of TCP.
fn load_packet(code: &mut Assembler, helper: u32, offset: u32, length: u32, no_packet: Label) {
    code.register(Move, R1, R6);
    code.constant(Move, R2, offset);
    code.register(Move, R3, Frame);
    code.constant(Add, R3, i32::from(PACKET).cast_unsigned());
    code.constant(Move, R4, length);
    code.constant(Move, R5, FROM_NETWORK_HEADER);
    code.call(helper);
    code.jump_if(R0, NotEqual, 0, no_packet);
}

/// Four of those bytes into R1, as the number that the network means.
fn load_number(code: &mut Assembler, offset: i16) {
    code.load(Word, R1, Frame, PACKET + offset);
    code.swap_network_order(R1);
}

/// Multiplies the number in R8 by the count of entries; R1 is lost.
fn times_length(code: &mut Assembler) {
    code.load(Double, R1, Frame, HEADER_SEEN);
    code.constant(ShiftLeft, R1, 32);
    code.constant(ShiftRight, R1, 32);
    code.register(Multiply, R8, R1);
}

/// The entry at the position in R3 into R0.
fn load_entry(code: &mut Assembler, plan: &Plan, give_up: Label) {
    code.load(Double, R2, Frame, HEADER_SEEN);
    code.constant(ShiftRight, R2, 32);
    code.register(Add, R2, R3);
    // Never so; the verifier wants to know.
    code.jump_if(R2, AtLeast, 2 * u32::from(plan.slots), give_up);
    code.constant(ShiftLeft, R2, 3);
    code.register(Add, R2, R7);
    code.load(Double, R0, R2, byte(ENTRIES));
}

/// The choice by weight into R0 and its two places on the stack.
fn choose_first(code: &mut Assembler, plan: &Plan, give_up: Label) {
    times_length(code);
    code.register(Move, R3, R8);
    code.constant(ShiftRight, R3, 32);
    load_entry(code, plan, give_up);
    code.constant(ShiftLeft, R8, 32);
    code.constant(ShiftRight, R8, 32);
    code.register(Move, R1, R0);
    code.constant(ShiftRight, R1, 32);
    let own = code.label();
    code.jump_if_register(R8, Below, R1, own);
    code.constant(ShiftRight, R0, 16);
    code.place(own);
    code.constant(And, R0, 0xffff);
    code.store(Double, Frame, FIRST, R0);
    code.store(Double, Frame, SLOT, R0);
}

/// The position of another number into R8.
fn another_position(code: &mut Assembler, draw: Draw) {
    match draw {
        Draw::Random => random(code),
        Draw::Hash { .. } => {
            code.load(Double, R8, Frame, NUMBER);
            code.constant(Xor32, R8, SPREAD);
            mix(code);
        }
    }
    times_length(code);
    code.constant(ShiftRight, R8, 32);
}

/// The position after that in R8, the first after the last.
fn next_position(code: &mut Assembler) {
    let inside = code.label();
    code.constant(Add, R8, 1);
    code.load(Double, R1, Frame, HEADER_SEEN);
    code.constant(ShiftLeft, R1, 32);
    code.constant(ShiftRight, R1, 32);
    code.jump_if_register(R8, Below, R1, inside);
    code.constant(Move, R8, 0);
    code.place(inside);
}

/// The slot that owns the entry at the position in R8, into R0 and its place on the stack.
fn owner_of_entry(code: &mut Assembler, plan: &Plan, give_up: Label) {
    code.register(Move, R3, R8);
    load_entry(code, plan, give_up);
    code.constant(And, R0, 0xffff);
    code.store(Double, Frame, SLOT, R0);
}

/// Ends the program if the slot in R0 is not stale and has a listener; goes on at `next` otherwise.
fn select_if_fresh(code: &mut Assembler, plan: &Plan, next: Label) {
    let fresh = code.label();
    code.jump_if(R0, AtLeast, u32::from(plan.slots), next);
    code.map_value(R1, plan.heartbeats);
    code.constant(ShiftLeft, R0, HEARTBEAT_SHIFT);
    code.register(Add, R1, R0);
    code.load(Double, R1, R1, 0);
    code.jump_if(R1, Equal, 0, fresh);
    code.jump_if_register(R1, SignedBelow, R9, next);
    code.place(fresh);
    select(code, plan);
    code.jump_if(R0, NotEqual, 0, next);
    code.constant(Move, R0, SK_PASS);
    code.exit();
}

/// A heartbeat has 128 bytes (`sys::heartbeats`).
const HEARTBEAT_SHIFT: u32 = crate::sys::heartbeats::BYTES_PER_SLOT.trailing_zeros();

/// Selects the listener of the slot that is on the stack; 0 in R0 if it has one.
fn select(code: &mut Assembler, plan: &Plan) {
    code.register(Move, R1, R6);
    code.map(R2, plan.sockets);
    code.register(Move, R3, Frame);
    // The key has four bytes; the slot was stored as eight.
    let key = if cfg!(target_endian = "little") { SLOT } else { SLOT + 4 };
    code.constant(Add, R3, i32::from(key).cast_unsigned());
    code.constant(Move, R4, 0);
    code.call(SK_SELECT_REUSEPORT);
}
