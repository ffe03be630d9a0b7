//! The parts classic BPF programs are assembled from.
//!
//! A program runs once for each SYN. What it returns is the index of a listener in its group; an
//! index beyond the group makes the kernel fall back to its own hash over all members.

use std::ops::Range;

use libc::sock_filter;

/// One instruction without a jump.
pub(super) fn statement(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

/// One instruction that skips `jt` instructions if its condition holds and `jf` if not.
pub(super) fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        // Opcodes fit into 16 bits; libc has them as 32.
        code: code as u16,
        jt,
        jf,
        k,
    }
}

/// Continues a program that has a well mixed number in A: ends it with one of `active` (ascending,
/// each once, not empty), all with the same probability.
///
/// The number modulo n is a position in `active`. Positions with consecutive slots differ from them
/// by one constant, so each such run costs at most three instructions: the usual table, everything
/// active, three in all; the worst, alternating slots, two for each. Jumps reach two instructions
/// far, so their width of 8 bits is no limit.
pub(super) fn choose(mut program: Vec<sock_filter>, active: &[u16]) -> Vec<sock_filter> {
    use libc::{BPF_A, BPF_ADD, BPF_ALU, BPF_JGE, BPF_JMP, BPF_K, BPF_MOD, BPF_RET};

    debug_assert!(active.is_sorted_by(|one, two| one < two) && !active.is_empty());
    program.push(statement(BPF_ALU | BPF_MOD | BPF_K, active.len() as u32));
    for run in runs(active) {
        let slot = u32::from(active[run.start]);
        let last = run.end == active.len();
        if run.len() == 1 {
            if !last {
                program.push(jump(BPF_JMP | BPF_JGE | BPF_K, run.end as u32, 1, 0));
            }
            program.push(statement(BPF_RET | BPF_K, slot));
            continue;
        }
        if !last {
            program.push(jump(BPF_JMP | BPF_JGE | BPF_K, run.end as u32, 2, 0));
        }
        // A slot is never below its position, since slots ascend from 0.
        let offset = slot - run.start as u32;
        program.push(statement(BPF_ALU | BPF_ADD | BPF_K, offset));
        program.push(statement(BPF_RET | BPF_A, 0));
    }
    program
}

/// Positions in `active` that hold consecutive slots, as ranges in order.
fn runs(active: &[u16]) -> Vec<Range<usize>> {
    let mut end = 0;
    active
        .chunk_by(|one, two| one + 1 == *two)
        .map(|run| {
            let start = end;
            end += run.len();
            start..end
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Runs the tail that [`choose`] writes, with `a` in A.
    fn run(program: &[sock_filter], mut a: u32) -> u32 {
        let mut at = 0;
        loop {
            let instruction = &program[at];
            let (code, k) = (u32::from(instruction.code), instruction.k);
            at += 1;
            match code {
                0x94 => a %= k,
                0x04 => a += k,
                0x35 => {
                    at += usize::from(match a >= k {
                        true => instruction.jt,
                        false => instruction.jf,
                    });
                }
                0x06 => return k,
                0x16 => return a,
                _ => panic!("unexpected instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn every_active_slot_is_chosen_equally_and_no_other() {
        let sets: [Vec<u16>; 7] = [
            vec![0],
            vec![5],
            vec![0, 1, 2, 3],
            vec![2, 3, 4],
            vec![0, 2, 3, 7, 8, 9, 20],
            (0..1024).step_by(2).collect(),
            (0..1024).filter(|slot| slot % 3 != 0).collect(),
        ];
        for active in sets {
            let program = choose(Vec::new(), &active);
            let chosen: Vec<_> = (0..active.len() as u32).map(|a| run(&program, a)).collect();
            let expected: Vec<_> = active.iter().map(|slot| u32::from(*slot)).collect();
            assert_eq!(chosen, expected);
            assert!(program.len() <= 2 * active.len() + 1);
        }
    }

    #[test]
    fn the_usual_table_takes_three_instructions_and_one_slot_two() {
        let all: Vec<u16> = (0..64).collect();
        assert_eq!(choose(Vec::new(), &all).len(), 3);
        assert_eq!(choose(Vec::new(), &[7]).len(), 2);
    }
}
