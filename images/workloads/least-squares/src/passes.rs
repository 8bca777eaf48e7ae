//! What one rank computes in one pass over its rows.
//!
//! `A` has a leading column of ones when there is an intercept, then the features.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::data::{BLOCK_ROWS, Block, DataError, Share};
use crate::factor::{Factor, Triangle};

/// The linear model: which columns A has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Columns read as features.
    pub features: usize,
    /// Whether a column of ones comes first.
    pub intercept: bool,
}

impl Model {
    /// Columns of A.
    pub fn unknowns(self) -> usize {
        self.features + usize::from(self.intercept)
    }

    fn design(self, block: &Block, column: usize, slots: &mut [f64]) {
        match column.checked_sub(usize::from(self.intercept)) {
            None => slots.fill(1.0),
            Some(feature) => slots.copy_from_slice(block.column(feature)),
        }
    }
}

/// What the first pass finds.
#[derive(Debug, Clone)]
pub struct Factored {
    /// Rows in the share.
    pub rows: u64,
    /// Sum of the response.
    pub response_sum: f64,
    /// Triangle of `[A | y]`.
    pub triangle: Triangle,
}

/// The residuals of a share.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Residuals {
    /// Rows in the share.
    pub rows: u64,
    /// Sum of squared residuals.
    pub squares: f64,
    /// Sum of the residuals' absolute values.
    pub absolute: f64,
    /// Least residual.
    pub min: f64,
    /// Greatest residual.
    pub max: f64,
    /// Sum of squared deviations of the response from the given centre.
    pub response_squares: f64,
}

/// A rank's passes, with the time they take beside reading.
pub struct Worker {
    model: Model,
    share: Share,
    computing: Duration,
}

impl Worker {
    /// A worker for the rows of `share`.
    pub fn new(model: Model, share: Share) -> Self {
        Self { model, share, computing: Duration::ZERO }
    }

    /// Time spent on reading and parsing so far.
    pub fn reading(&self) -> Duration {
        self.share.reading()
    }

    /// Time spent on arithmetic so far.
    pub fn computing(&self) -> Duration {
        self.computing
    }

    /// First pass: the triangle of `[A | y]`. `check` is called with each block and may stop it.
    pub fn factor<E: From<DataError>>(
        &mut self,
        mut check: impl FnMut() -> Result<(), E>,
    ) -> Result<Factored, E> {
        let (model, mut computing) = (self.model, Duration::ZERO);
        let unknowns = model.unknowns();
        let mut factor = Factor::new(unknowns + 1, BLOCK_ROWS);
        let mut sum = Sum::default();
        let rows = self.share.for_each_block(|block| {
            let started = Instant::now();
            block.response().iter().for_each(|y| sum.add(*y));
            factor.fold(block.rows(), |column, slots| match column {
                c if c == unknowns => slots.copy_from_slice(block.response()),
                c => model.design(block, c, slots),
            });
            computing += started.elapsed();
            check()
        })?;
        self.computing += computing;
        Ok(Factored { rows, response_sum: sum.value(), triangle: factor.triangle() })
    }

    /// Refinement pass: Aᵀr with the residuals r = y − A b, in twice the working precision. It is
    /// zero for the exact solution, so what is left of it gives the correction to b; being what
    /// remains of large terms that cancel, across ranks too, it is of no use in plain doubles.
    pub fn gradient<E: From<DataError>>(
        &mut self,
        coefficients: &[f64],
        mut check: impl FnMut() -> Result<(), E>,
    ) -> Result<Vec<Sum>, E> {
        let (model, mut computing) = (self.model, Duration::ZERO);
        let mut gradient = vec![Sum::default(); model.unknowns()];
        let mut residuals = ResidualBlock::default();
        self.share.for_each_block(|block| {
            let started = Instant::now();
            residuals.compute(model, block, coefficients);
            let (intercept, slopes) = gradient.split_at_mut(usize::from(model.intercept));
            let rows = || residuals.high.iter().zip(&residuals.low);
            for sum in intercept {
                rows().for_each(|(high, low)| sum.add_pair(*high, *low));
            }
            for (feature, sum) in slopes.iter_mut().enumerate() {
                for ((high, low), x) in rows().zip(block.column(feature)) {
                    let x = Split::of(*x);
                    let (product, error) = x.times(*high);
                    sum.add_pair(product, x.value * low + error);
                }
            }
            computing += started.elapsed();
            check()
        })?;
        self.computing += computing;
        Ok(gradient)
    }

    /// Last pass: the residuals. `each` gets, block by block, the response and the residuals.
    pub fn residuals<E: From<DataError>>(
        &mut self,
        coefficients: &[f64],
        centre: f64,
        mut each: impl FnMut(&[f64], &[f64]) -> Result<(), E>,
    ) -> Result<Residuals, E> {
        let (model, mut computing) = (self.model, Duration::ZERO);
        let (mut squares, mut absolute, mut response) = (Sum::default(), Sum::default(), Sum::default());
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut residuals = ResidualBlock::default();
        let rows = self.share.for_each_block(|block| {
            let started = Instant::now();
            residuals.compute(model, block, coefficients);
            let r = &residuals.high;
            for (r, y) in r.iter().zip(block.response()) {
                squares.add(r * r);
                absolute.add(r.abs());
                response.add((y - centre) * (y - centre));
                min = min.min(*r);
                max = max.max(*r);
            }
            computing += started.elapsed();
            each(block.response(), r)
        })?;
        self.computing += computing;
        Ok(Residuals {
            rows,
            squares: squares.value(),
            absolute: absolute.value(),
            min,
            max,
            response_squares: response.value(),
        })
    }
}

/// Residuals of a block in twice the working precision: the sum of `high`, the nearest double,
/// and `low`. y and A b agree in most of their leading digits, and refinement can only correct
/// what the difference still shows.
#[derive(Default)]
struct ResidualBlock {
    high: Vec<f64>,
    low: Vec<f64>,
}

impl ResidualBlock {
    fn compute(&mut self, model: Model, block: &Block, coefficients: &[f64]) {
        self.high.clear();
        self.high.extend_from_slice(block.response());
        self.low.clear();
        self.low.resize(block.rows(), 0.0);
        let (intercept, slopes) = coefficients.split_at(usize::from(model.intercept));
        for b in intercept {
            self.high.iter_mut().zip(&mut self.low).for_each(|(h, l)| subtract(h, l, *b, 0.0));
        }
        for (feature, b) in slopes.iter().enumerate() {
            let split = Split::of(*b);
            let rows = self.high.iter_mut().zip(&mut self.low).zip(block.column(feature));
            rows.for_each(|((h, l), x)| {
                let (product, error) = split.times(*x);
                subtract(h, l, product, error);
            });
        }
        for (high, low) in self.high.iter_mut().zip(&mut self.low) {
            let nearest = *high + *low;
            *low -= nearest - *high;
            *high = nearest;
        }
    }
}

/// high + low −= value + error, where the rounding of the leading part goes into low
/// (Knuth's two-sum).
#[inline]
fn subtract(high: &mut f64, low: &mut f64, value: f64, error: f64) {
    let difference = *high - value;
    let back = difference - *high;
    let lost = (*high - (difference - back)) - (value + back);
    *low += lost - error;
    *high = difference;
}

/// A factor cut in halves of 26 bits, so that products with it are exact in two doubles (Dekker
/// and Veltkamp; a fused multiply-add would be a library call on the baseline x86-64).
#[derive(Clone, Copy)]
struct Split {
    value: f64,
    high: f64,
    low: f64,
}

impl Split {
    /// 2^27 + 1.
    const SPLITTER: f64 = 134_217_729.0;

    #[inline]
    fn of(value: f64) -> Self {
        let scaled = Self::SPLITTER * value;
        // Beyond 2^996 the halves overflow: such a factor is used as it is, without its error.
        if !scaled.is_finite() {
            return Self { value, high: value, low: 0.0 };
        }
        let high = scaled - (scaled - value);
        Self { value, high, low: value - high }
    }

    /// The rounded product and what rounding lost.
    #[inline]
    fn times(self, other: f64) -> (f64, f64) {
        let other = Self::of(other);
        let product = self.value * other.value;
        let error = ((self.high * other.high - product) + self.high * other.low + self.low * other.high)
            + self.low * other.low;
        (product, if error.is_finite() { error } else { 0.0 })
    }
}

/// A sum that carries its rounding error along (Neumaier).
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    total: f64,
    lost: f64,
}

impl Sum {
    /// Adds a value.
    #[inline]
    pub fn add(&mut self, value: f64) {
        let total = self.total + value;
        let back = total - self.total;
        self.lost += (self.total - (total - back)) + (value - back);
        self.total = total;
    }

    /// Adds a value given in two parts, of which the second is the lesser.
    #[inline]
    pub fn add_pair(&mut self, high: f64, low: f64) {
        self.add(high);
        self.lost += low;
    }

    /// Adds another sum.
    pub fn add_sum(&mut self, other: Self) {
        self.add_pair(other.total, other.lost);
    }

    /// The sum.
    pub fn value(self) -> f64 {
        self.total + self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn products_are_exact(a in -1e15..1e15f64, b in -1e15..1e15f64) {
            let (product, error) = Split::of(a).times(b);
            prop_assert_eq!(error, a.mul_add(b, -product));
        }
    }

    #[test]
    fn sums_keep_what_plain_addition_loses() {
        let mut sum = Sum::default();
        [1e16, 1.0, 1.0, -1e16].iter().for_each(|v| sum.add(*v));
        assert_eq!(sum.value(), 2.0);
    }

    #[test]
    fn residuals_keep_what_cancellation_loses() {
        let (mut high, mut low) = (1e16 + 2.0, 0.0);
        let (product, error) = Split::of(1e8 + 1.0).times(1e8 - 1.0); // 1e16 - 1
        subtract(&mut high, &mut low, product, error);
        assert_eq!(high + low, 3.0);
    }
}
