//! The parts classic BPF programs are assembled from, and the program that chooses by chance and weight.
//!
//! A program runs once for each SYN. What it returns is the index of a listener in its group; an
//! index beyond the group makes the kernel fall back to its own hash over all members.

use std::ops::Range;

use libc::{
    BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_JA, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_MOD, BPF_RET, BPF_W, SKF_AD_OFF,
    SKF_AD_RANDOM, sock_filter,
};

use super::Share;

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

/// The program that chooses by chance, in proportion to the weights; `None` without shares.
pub(super) fn random_by_weight(shares: &[Share]) -> Option<Vec<sock_filter>> {
    let first = shares.first()?;
    let load = statement(BPF_LD | BPF_W | BPF_ABS, (SKF_AD_OFF + SKF_AD_RANDOM) as u32);
    if shares.iter().all(|share| share.weight == first.weight) {
        let active: Vec<u16> = shares.iter().map(|share| share.slot).collect();
        return Some(choose(vec![load], &active));
    }
    Some(choose_by_weight(vec![load], shares))
}

/// Continues a program that has a random number in A: ends it with the slot of one of `shares` (not empty, no weight 0),
/// in proportion to their weights.
///
/// The number modulo the sum of all weights falls into one slot's interval, which a binary search finds: two
/// instructions for each slot, and ten comparisons at most for a SYN. The remainder prefers low numbers by the sum over
/// 2^32, which is 1.6 % for the largest sum there can be and nothing for usual ones.
fn choose_by_weight(mut program: Vec<sock_filter>, shares: &[Share]) -> Vec<sock_filter> {
    let mut sum = 0;
    // Where each slot's interval ends.
    let ends: Vec<u32> = shares
        .iter()
        .map(|share| {
            sum += u32::from(share.weight);
            sum
        })
        .collect();
    program.push(statement(BPF_ALU | BPF_MOD | BPF_K, sum));
    search(&mut program, shares, &ends);
    program
}

/// Ends the program with one of `shares`, A being in one of their intervals.
fn search(program: &mut Vec<sock_filter>, shares: &[Share], ends: &[u32]) {
    if let [share] = shares {
        program.push(statement(BPF_RET | BPF_K, u32::from(share.slot)));
        return;
    }
    let middle = shares.len() / 2;
    let mut lower = Vec::new();
    search(&mut lower, &shares[..middle], &ends[..middle]);
    // A conditional jump has 8 bits for its width; an unconditional one 32.
    match u8::try_from(lower.len()) {
        Ok(past_lower) => program.push(jump(BPF_JMP | BPF_JGE | BPF_K, ends[middle - 1], past_lower, 0)),
        Err(_) => {
            program.push(jump(BPF_JMP | BPF_JGE | BPF_K, ends[middle - 1], 0, 1));
            program.push(statement(BPF_JMP | BPF_JA, lower.len() as u32));
        }
    }
    program.append(&mut lower);
    search(program, &shares[middle..], &ends[middle..]);
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
mod tests {
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
                0x05 => at += k as usize,
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

    fn expect_in_proportion(weights: &[u16]) {
        let shares: Vec<_> =
            weights.iter().zip(0..).map(|(weight, slot)| Share { slot: 2 * slot, weight: *weight }).collect();
        let program = choose_by_weight(Vec::new(), &shares);
        let mut counts = vec![0_u16; 2 * weights.len()];
        let sum = weights.iter().map(|weight| u32::from(*weight)).sum();
        (0..sum).for_each(|number| counts[run(&program, number) as usize] += 1);
        for share in shares {
            assert_eq!(counts[usize::from(share.slot)], share.weight, "slot {} of {weights:?}", share.slot);
        }
    }

    #[test]
    fn weighted_slots_are_chosen_in_exact_proportion_and_no_other() {
        expect_in_proportion(&[3]);
        expect_in_proportion(&[1, 2]);
        expect_in_proportion(&[5, 1, 1, 7, 2]);
        expect_in_proportion(&[u16::MAX, 1, 9]);
        let many: Vec<u16> = (0..1024).map(|index| 1 + index * 37 % 64).collect();
        expect_in_proportion(&many);
    }

    #[test]
    fn the_longest_weighted_program_is_below_the_kernels_limit_and_equal_weights_take_the_short_one() {
        let shares: Vec<_> = (0..1024).map(|slot| Share { slot, weight: 1 + slot % 2 }).collect();
        let length = random_by_weight(&shares).unwrap().len();
        assert!(length < 2100, "{length}");
        let equal: Vec<_> = (0..64).map(|slot| Share { slot, weight: 9 }).collect();
        assert_eq!(random_by_weight(&equal).unwrap().len(), 4);
        assert!(random_by_weight(&[]).is_none());
    }
}
