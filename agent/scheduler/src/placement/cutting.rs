//! What the parts of a device are worth, from the mix of what is asked for: Gilmore and Gomory's dual
//! prices of the cutting-stock problem ("A linear programming approach to the cutting-stock problem",
//! Operations Research 9, 1961).
//!
//! Devices are the stock, shares the pieces. The linear program asks for the fewest devices that serve
//! the demand; the dual price of a piece is the part of a device that one more of it costs. A rest is
//! worth what the best pieces that fit into it are worth: 0.19 of a device is worth nothing where
//! nearly every piece is 0.81, 0.53 is worth a half where two of 0.47 share a device. So the loss of
//! value tells, long before a device is full, which pieces should not be put together.

use crate::model::{Profile, WHOLE};

/// Most pieces of different sizes that are priced; the rarest others are left out, which bounds the
/// time.
pub(super) const MOST_PIECES: usize = 48;

/// Enough for every list of pieces that was tried; each pivot costs a matrix of at most
/// [`MOST_PIECES`] squared.
const MOST_PIVOTS: usize = 2_000;

const EPSILON: f64 = 1e-9;

/// The best pattern under these prices: its value, and how many of each piece it has.
pub(super) type Pattern = (f64, Vec<f64>);

/// Prices of pieces, as parts of a whole device, for these demands. `alone` says how many of a piece
/// fit on a device that has nothing else, at least one; `best` finds the pattern worth most.
pub(super) fn prices(demand: &[f64], alone: &[u32], mut best: impl FnMut(&[f64]) -> Pattern) -> Vec<f64> {
    let pieces = demand.len();
    // The inverse of the basis, and how often each pattern of the basis is cut.
    let mut inverse = vec![vec![0.0; pieces]; pieces];
    for piece in 0..pieces {
        inverse[piece][piece] = 1.0 / f64::from(alone[piece].max(1));
    }
    let mut cut: Vec<f64> = (0..pieces).map(|piece| demand[piece] * inverse[piece][piece]).collect();
    let mut prices = vec![0.0; pieces];
    for _ in 0..MOST_PIVOTS {
        for (piece, price) in prices.iter_mut().enumerate() {
            *price = inverse.iter().map(|row| row[piece]).sum::<f64>().max(0.0);
        }
        let (value, pattern) = best(&prices);
        if value <= 1.0 + EPSILON || !pivot(&mut inverse, &mut cut, &pattern) {
            break;
        }
    }
    prices
}

/// Brings a pattern into the basis; false if it cannot be.
fn pivot(inverse: &mut [Vec<f64>], cut: &mut [f64], pattern: &[f64]) -> bool {
    let column: Vec<f64> =
        inverse.iter().map(|row| row.iter().zip(pattern).map(|(one, count)| one * count).sum()).collect();
    let mut leaving: Option<(usize, f64)> = None;
    for (row, &step) in column.iter().enumerate() {
        if step > EPSILON {
            let ratio = cut[row] / step;
            if leaving.is_none_or(|(_, least)| ratio < least - 1e-12) {
                leaving = Some((row, ratio));
            }
        }
    }
    let Some((leaving, ratio)) = leaving else { return false };
    for (row, &step) in column.iter().enumerate() {
        cut[row] = if row == leaving { ratio } else { cut[row] - ratio * step };
    }
    for value in &mut inverse[leaving] {
        *value /= column[leaving];
    }
    let pivot = inverse[leaving].clone();
    for (row, &step) in column.iter().enumerate() {
        if row != leaving && step != 0.0 {
            for (value, pivot) in inverse[row].iter_mut().zip(&pivot) {
                *value -= step * pivot;
            }
        }
    }
    true
}

/// What each rest of a freely divided device is worth, in thousandths, by rest in `unit` thousandths:
/// the best pieces that fit. A whole device is worth 1000.
pub(super) fn rests(pieces: &[(u16, f64)], unit: u16) -> Vec<f64> {
    let cells = usize::from(WHOLE / unit);
    let sizes: Vec<usize> =
        pieces.iter().map(|(milli, _)| usize::from(milli.div_ceil(unit)).clamp(1, cells)).collect();
    let demand: Vec<f64> = pieces.iter().map(|(_, demand)| *demand).collect();
    let alone: Vec<u32> = sizes.iter().map(|&size| u32::try_from(cells / size).unwrap_or(1)).collect();
    let prices = prices(&demand, &alone, |prices| {
        let (values, choice) = knapsack(&sizes, prices, cells);
        let mut pattern = vec![0.0; sizes.len()];
        let mut rest = cells;
        while rest > 0 {
            match choice[rest] {
                Some(piece) => {
                    pattern[piece] += 1.0;
                    rest -= sizes[piece];
                }
                None => rest -= 1,
            }
        }
        (values[cells], pattern)
    });
    let (mut values, _) = knapsack(&sizes, &prices, cells);
    for value in &mut values {
        *value = (*value * f64::from(WHOLE)).min(f64::from(WHOLE));
    }
    values[cells] = f64::from(WHOLE);
    values
}

/// Numbers of compute slices that can be free: none to seven.
pub(super) const COMPUTE: usize = 8;

/// What each rest of a partitioned device is worth, in thousandths, by free memory slots (as bits) times
/// [`COMPUTE`] plus free compute slices: the best instances that still fit. A whole device is worth 1000.
pub(super) fn partitions(profiles: &[Profile], demand: &[f64]) -> Vec<f64> {
    let whole = 0xff * COMPUTE + COMPUTE - 1;
    let only =
        |at: usize| profiles.iter().enumerate().map(move |(other, _)| f64::from(u8::from(other == at)));
    let alone: Vec<u32> = (0..profiles.len())
        .map(|at| instances(profiles, &only(at).collect::<Vec<_>>()).0[whole] as u32)
        .collect();
    let prices = prices(demand, &alone, |prices| {
        let (values, choice) = instances(profiles, prices);
        let mut pattern = vec![0.0; profiles.len()];
        let mut state = whole;
        while let Some((profile, next)) = choice[state] {
            pattern[profile] += 1.0;
            state = next;
        }
        (values[whole], pattern)
    });
    let most = f64::from(WHOLE);
    let (values, _) = instances(profiles, &prices);
    let mut values: Vec<f64> = values.into_iter().map(|value| (value * most).min(most)).collect();
    values[whole] = most;
    values
}

/// A profile, and the state once an instance of it is taken.
type Step = Option<(usize, usize)>;

/// The most that fits into each state of a partitioned device, and the instance that is taken first.
fn instances(profiles: &[Profile], prices: &[f64]) -> (Vec<f64>, Vec<Step>) {
    let mut values = vec![0.0_f64; 256 * COMPUTE];
    let mut choice: Vec<Step> = vec![None; 256 * COMPUTE];
    // Taking slots makes the number smaller: smaller states are known when they are needed.
    for slots in 0..256_usize {
        for compute in 0..COMPUTE {
            let state = slots * COMPUTE + compute;
            for (at, profile) in profiles.iter().enumerate() {
                let (size, need) = (usize::from(profile.slots), usize::from(profile.compute));
                for &start in &profile.starts {
                    let mask = ((1_usize << size) - 1) << start;
                    if size == 0 || mask > 0xff || slots & mask != mask || need > compute {
                        continue;
                    }
                    let next = (slots & !mask) * COMPUTE + compute - need;
                    if values[next] + prices[at] > values[state] + 1e-12 {
                        values[state] = values[next] + prices[at];
                        choice[state] = Some((at, next));
                    }
                }
            }
        }
    }
    (values, choice)
}

/// The most that fits into each number of cells, and the piece that was put in last.
fn knapsack(sizes: &[usize], prices: &[f64], cells: usize) -> (Vec<f64>, Vec<Option<usize>>) {
    let (mut values, mut choice) = (vec![0.0_f64; cells + 1], vec![None; cells + 1]);
    for rest in 1..=cells {
        values[rest] = values[rest - 1];
        for (piece, &size) in sizes.iter().enumerate() {
            if size <= rest && values[rest - size] + prices[piece] > values[rest] + 1e-12 {
                values[rest] = values[rest - size] + prices[piece];
                choice[rest] = Some(piece);
            }
        }
    }
    (values, choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_worth_the_pieces_that_are_cut_from_it() {
        // Two of 0.47 share a device, 0.81 needs one for itself, 0.65 and 0.32 share one.
        let pieces = [(470, 10.0), (810, 10.0), (650, 3.0), (320, 3.0)];
        let rests = rests(&pieces, 10);
        let near = |milli: usize, worth: f64| (rests[milli / 10] - worth).abs() < 1.0;
        assert!(near(1000, 1000.0) && near(530, 500.0) && near(470, 500.0) && near(190, 0.0));
        assert!((rests[65] + rests[32] - 1000.0).abs() < 1.0);
        assert!(rests.is_sorted());
    }

    #[test]
    fn instances_that_block_large_ones_cost_what_those_are_worth() {
        let profile = |slots, compute, starts: &[u8]| Profile {
            name: String::new(),
            slots,
            compute,
            starts: starts.to_vec(),
        };
        let profiles = [profile(1, 1, &[0, 1, 2, 3, 4, 5, 6]), profile(4, 3, &[0, 4])];
        let table = partitions(&profiles, &[1.0, 5.0]);
        let worth = |slots: usize, compute: usize| table[slots * COMPUTE + compute];
        assert_eq!(worth(0xff, 7), 1000.0);
        // Five large and one small: a large one costs half a device, a small one an eighth.
        assert!((worth(0xf0, 4) - 500.0).abs() < 1.0 && (worth(0x0e, 6) - 375.0).abs() < 1.0);
        // A small one where it blocks a large one that could have its neighbours costs more.
        assert!(worth(0xfe, 6) > worth(0xef, 6));
    }

    #[test]
    fn prices_bound_every_pattern_and_pay_for_the_demand() {
        let pieces = [(110, 3.0), (230, 8.0), (320, 20.0), (550, 5.0), (590, 5.0), (370, 4.0)];
        let rests = rests(&pieces, 10);
        // Feasible: no pattern is worth more than the device it is cut from.
        for rest in 0..=100 {
            assert!(rests[rest] + rests[100 - rest] <= 1000.0 + 1e-6, "{rest}");
        }
        // Strong duality against what can be seen by hand: (320 x 3) and so on need at least the sum.
        let need: f64 = pieces.iter().map(|(milli, demand)| f64::from(*milli) / 1000.0 * demand).sum();
        let paid: f64 =
            pieces.iter().map(|(milli, demand)| rests[usize::from(milli / 10)] / 1000.0 * demand).sum();
        assert!(paid >= need * 0.95, "{paid} {need}");
    }
}
