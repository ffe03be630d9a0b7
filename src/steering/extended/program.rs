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
//! fresh(slot) = since[slot] >= now - stale_after, or since[slot] == 0 (it sleeps) and ++sent[slot] <= 64
//! ```
//! One that sleeps wakes for the first connection and counts from there (`sys/heartbeats.rs`), unless nobody gives it a CPU.
//! Where a machine stands still and all who were at work are stale, those that slept when it began would get everything: 3 s
//! of new connections in one queue, and a quarter of a minute of work for one executor while the others had none. The bound
//! is by number and not by time since a handshake takes as long as the client is far away.
//!
//! After the first choice it goes from entry to entry instead of choosing anew: so it finds a fresh slot for certain
//! among up to seven, and of two slots with one stale no connection meets that one. It starts from another number, so
//! that what a stale slot does not get is spread over all and not on its neighbour. If all it looked at are stale the
//! first choice stands, since then the weights are all there is to go by.

use super::assembler::{Assembler, Condition, Label, Operation, Register, Width};
use crate::steering::Draw;
use crate::steering::hash::{MIX_ONE, MIX_TWO, SPREAD};
use crate::sys::bpf::Instruction;
use crate::sys::heartbeats::SENT_AT;
use Condition::{Below, Equal, NotEqual, SignedBelow};
use Operation::{Add, And, Move, Move32, Multiply, Multiply32, ShiftLeft, ShiftRight, ShiftRight32, Subtract, Xor32};
use Register::{Frame, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use Width::{Byte, Double, Word};

/// Values of the table's map: the count of entries in force in the lower half, the position of the first in the upper.
pub(super) const HEADER: u32 = 0;
/// Nanoseconds.
pub(super) const STALE_AFTER: u32 = 1;
/// Where entries begin, on a cache line of their own.
pub(super) const ENTRIES: u32 = 8;

/// Connections for one that sleeps, until it has been awake: as many as it accepts in its first turn.
const SENT_MAX: u32 = 64;

/// Slots looked at before the first choice stands: that one, and seven more.
const TRIES: u32 = 8;

/// Helpers of the kernel's, from linux/bpf.h.
const MAP_LOOKUP_ELEM: u32 = 1;
const KTIME_GET_NS: u32 = 5;
const GET_PRANDOM_U32: u32 = 7;
const SKB_LOAD_BYTES: u32 = 26;
const SKB_LOAD_BYTES_RELATIVE: u32 = 68;
const SK_SELECT_REUSEPORT: u32 = 82;
/// `BPF_HDR_START_NET`: offsets count from the network header.
const FROM_NETWORK_HEADER: u32 = 1;
const SK_PASS: u32 = 1;

/// Places on the stack. A key has four bytes, the others eight.
const KEY: i16 = -4;
const FIRST: i16 = -16;
const NUMBER: i16 = -24;
const LENGTH: i16 = -32;
const PACKET: i16 = -48;

/// Within a slot's heartbeat.
const SENT: i16 = SENT_AT as i16;

/// What a program works with: descriptors of maps.
pub(super) struct Plan {
    pub draw: Draw,
    pub table: i32,
    pub heartbeats: i32,
    pub sockets: i32,
}

/// The program of one group. Throughout it R6 is the context, R7 the key of the first entry in force, and R9 the time
/// before which a heartbeat is stale.
///
/// Maps are read by look-up, which the kernel compiles to a few instructions for arrays, and not by addresses computed
/// here: those the verifier takes without reserve only from a process with CAP_PERFMON.
pub(super) fn program(plan: &Plan) -> Vec<Instruction> {
    let mut code = Assembler::default();
    let give_up = code.label();
    code.register(Move, R6, R1);
    draw(&mut code, plan.draw);
    code.store(Double, Frame, NUMBER, R8);
    code.call(KTIME_GET_NS);
    code.register(Move, R9, R0);
    look_up_constant(&mut code, plan.table, STALE_AFTER, give_up);
    code.register(Subtract, R9, R0);
    look_up_constant(&mut code, plan.table, HEADER, give_up);
    code.register(Move, R7, R0);
    code.constant(ShiftRight, R7, 32);
    code.constant(Add, R7, ENTRIES);
    code.constant(ShiftLeft, R0, 32);
    code.constant(ShiftRight, R0, 32);
    code.store(Double, Frame, LENGTH, R0);

    choose_first(&mut code, plan, give_up);
    select_if_fresh(&mut code, plan);
    for attempt in 1..TRIES {
        if attempt == 1 {
            another_position(&mut code, plan.draw);
        } else {
            next_position(&mut code);
        }
        code.register(Move, R0, R8);
        look_up_entry(&mut code, plan, give_up);
        code.constant(And, R0, 0xffff);
        code.store(Word, Frame, KEY, R0);
        select_if_fresh(&mut code, plan);
    }

    code.load(Double, R0, Frame, FIRST);
    code.store(Word, Frame, KEY, R0);
    select(&mut code, plan);
    code.place(give_up);
    // Without a selection the kernel's hash over all members decides.
    code.constant(Move, R0, SK_PASS);
    code.exit();
    code.finish()
}

/// The value with the key that is on the stack, its first eight bytes, into R0.
fn look_up(code: &mut Assembler, map: i32, without: Label) {
    find(code, map, without);
    code.load(Double, R0, R0, 0);
}

/// Where the value with the key that is on the stack is, into R0.
fn find(code: &mut Assembler, map: i32, without: Label) {
    code.map(R1, map);
    code.register(Move, R2, Frame);
    code.constant(Add, R2, i32::from(KEY).cast_unsigned());
    code.call(MAP_LOOKUP_ELEM);
    code.jump_if(R0, Equal, 0, without);
}

fn look_up_constant(code: &mut Assembler, map: i32, key: u32, without: Label) {
    code.constant(Move, R1, key);
    code.store(Word, Frame, KEY, R1);
    look_up(code, map, without);
}

/// The entry at the position in R0 into R0.
fn look_up_entry(code: &mut Assembler, plan: &Plan, without: Label) {
    code.register(Add, R0, R7);
    code.store(Word, Frame, KEY, R0);
    look_up(code, plan.table, without);
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
    code.load(Double, R1, Frame, LENGTH);
    code.register(Multiply, R8, R1);
}

/// The choice by weight, as a key and as the first choice.
fn choose_first(code: &mut Assembler, plan: &Plan, give_up: Label) {
    times_length(code);
    code.register(Move, R0, R8);
    code.constant(ShiftRight, R0, 32);
    look_up_entry(code, plan, give_up);
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
    code.store(Word, Frame, KEY, R0);
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
    code.load(Double, R1, Frame, LENGTH);
    code.jump_if_register(R8, Below, R1, inside);
    code.constant(Move, R8, 0);
    code.place(inside);
}

/// Ends the program if the slot that is the key is not stale and has a listener; goes on otherwise.
fn select_if_fresh(code: &mut Assembler, plan: &Plan) {
    let (awake, fresh, next) = (code.label(), code.label(), code.label());
    find(code, plan.heartbeats, next);
    code.load(Double, R1, R0, 0);
    code.jump_if(R1, NotEqual, 0, awake);
    // Two CPUs may count one connection for two: the bound is a rough one.
    code.load(Double, R1, R0, SENT);
    code.constant(Move, R2, SENT_MAX - 1);
    code.jump_if_register(R2, Below, R1, next);
    code.constant(Add, R1, 1);
    code.store(Double, R0, SENT, R1);
    code.jump(fresh);
    code.place(awake);
    code.jump_if_register(R1, SignedBelow, R9, next);
    code.place(fresh);
    select(code, plan);
    code.jump_if(R0, NotEqual, 0, next);
    code.constant(Move, R0, SK_PASS);
    code.exit();
    code.place(next);
}

/// Selects the listener of the slot that is the key; 0 in R0 if it has one.
fn select(code: &mut Assembler, plan: &Plan) {
    code.register(Move, R1, R6);
    code.map(R2, plan.sockets);
    code.register(Move, R3, Frame);
    code.constant(Add, R3, i32::from(KEY).cast_unsigned());
    code.constant(Move, R4, 0);
    code.call(SK_SELECT_REUSEPORT);
}
