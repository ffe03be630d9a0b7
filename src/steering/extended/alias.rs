//! The table of an extended program: Vose's alias method, which chooses by weight with one multiplication and one
//! comparison, whatever the number of slots.
//!
//! There is an entry for each slot of the table. A number is multiplied by their count: the upper half of the product is
//! a position, the lower half a fraction. The slot that owns the entry is chosen if the fraction is below the entry's
//! threshold, its alias otherwise. One entry is one word, so it is never seen half written.

use crate::steering::Share;

/// The slot that owns the entry in the lowest 16 bits, its alias in the next, the threshold in the upper half.
fn entry(own: u16, alias: u16, threshold: u32) -> u64 {
    u64::from(own) | u64::from(alias) << 16 | u64::from(threshold) << 32
}

/// The entries for these shares: none of them is zero, and there are no more than 2^16.
pub(in crate::steering) fn entries(shares: &[Share]) -> Vec<u64> {
    let count = shares.len() as u64;
    let total: u64 = shares.iter().map(|share| u64::from(share.weight)).sum();
    // How much of its own entry a slot fills, in units of which an entry has `total`.
    let mut filled: Vec<u64> = shares.iter().map(|share| u64::from(share.weight) * count).collect();
    let mut table: Vec<u64> = shares.iter().map(|share| entry(share.slot, share.slot, u32::MAX)).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..shares.len()).filter(|position| filled[*position] != total).partition(|position| filled[*position] < total);
    // Units are conserved, so as long as one entry is not full there is a slot that has too much.
    while let (Some(poor), Some(rich)) = (small.pop(), large.pop()) {
        let threshold = (filled[poor] << 32) / total;
        table[poor] = entry(shares[poor].slot, shares[rich].slot, threshold as u32);
        filled[rich] -= total - filled[poor];
        match filled[rich] {
            left if left < total => small.push(rich),
            left if left > total => large.push(rich),
            _ => {}
        }
    }
    table
}

/// What the program does with a number.
#[cfg(test)]
pub(in crate::steering) fn choose(table: &[u64], number: u32) -> u16 {
    let product = u64::from(number) * table.len() as u64;
    let entry = table[(product >> 32) as usize];
    let own = (product & 0xffff_ffff) < entry >> 32;
    (if own { entry } else { entry >> 16 }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect_in_proportion(weights: &[u16]) {
        let shares: Vec<_> = weights
            .iter()
            .enumerate()
            .map(|(index, weight)| Share { slot: 3 * index as u16, weight: *weight })
            .collect();
        let table = entries(&shares);
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut counts = vec![0_u32; 3 * weights.len()];
        let numbers = 1 << 20;
        (0..numbers).for_each(|number: u32| counts[usize::from(choose(&table, number << 12))] += 1);
        for share in shares {
            let expected = f64::from(share.weight) / total * f64::from(numbers);
            let got = f64::from(counts[usize::from(share.slot)]);
            // Rounding of thresholds and of the numbers that are tried.
            let tolerance = 2.0 * weights.len() as f64 + 2.0;
            assert!((got - expected).abs() <= tolerance, "{weights:?}: slot {}: {got}, not {expected}", share.slot);
        }
    }

    #[test]
    fn slots_are_chosen_in_proportion_to_their_weights() {
        expect_in_proportion(&[1]);
        expect_in_proportion(&[5, 5, 5, 5]);
        expect_in_proportion(&[1, 2, 3, 4, 5]);
        expect_in_proportion(&[u16::MAX, 1, 1]);
        expect_in_proportion(&[32, 8, 16, 16, 16, 16, 31]);
        let many: Vec<u16> = (0..1000).map(|index| 1 + index * 37 % 64).collect();
        expect_in_proportion(&many);
    }

    #[test]
    fn every_slot_owns_the_entry_in_its_position() {
        let shares: Vec<_> = (0..64).map(|slot| Share { slot, weight: 1 + slot % 7 }).collect();
        let own: Vec<_> = entries(&shares).into_iter().map(|entry| entry as u16).collect();
        assert_eq!(own, (0..64).collect::<Vec<u16>>());
    }
}
