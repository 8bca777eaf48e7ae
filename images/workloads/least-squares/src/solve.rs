//! From the triangle of `[A | y]` to coefficients, their errors, and the reasons there are none.

use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Mat, Par};

use crate::factor::Triangle;

/// A column whose part that is orthogonal to the columns before it is smaller than this fraction
/// of its length is taken as their linear combination. Rounding leaves about 1e-16 times a small
/// factor there when it is one; a fit beyond this point would have no correct digit anyway.
const DEPENDENT: f64 = 1e-14;

/// Why the data does not determine the coefficients.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SolveError {
    /// Fewer rows than unknowns.
    #[error("{rows} rows cannot determine {unknowns} coefficients; add rows or leave features out")]
    TooFewRows {
        /// Rows in the dataset.
        rows: u64,
        /// Coefficients wanted.
        unknowns: usize,
    },
    /// A column is zero throughout.
    #[error("column {name} is zero in every row; leave it out with --features")]
    ZeroColumn {
        /// Its name.
        name: String,
    },
    /// A column adds nothing to those before it.
    #[error(
        "column {name} is a linear combination of the columns before it (relative distance {distance:.1e}): \
         the coefficients are not determined; leave a column out with --features"
    )]
    Dependent {
        /// Its name.
        name: String,
        /// Length of its part orthogonal to the columns before it, relative to its own.
        distance: f64,
    },
    /// Squares of the values exceed what a double holds.
    #[error("the values are too large: a sum of squares overflows; rescale the columns")]
    Overflow,
}

/// What the triangle gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    scales: Vec<f64>,
    /// The triangle of A, each column divided by its scale.
    scaled: Mat<f64>,
    /// One for each column of A.
    pub coefficients: Vec<f64>,
    /// Square roots of the diagonal of (AᵀA)⁻¹: times the residual standard error they are the
    /// standard errors of the coefficients.
    pub error_factors: Vec<f64>,
    /// Condition number of A with columns of equal length, in the Frobenius norm.
    pub condition: f64,
}

impl Solution {
    /// Corrects the coefficients by the solution d of RᵀR d = Aᵀr, given Aᵀr. A correction that is
    /// no number (the gradient of huge values overflows) is left out.
    pub fn correct(&mut self, gradient: &[f64]) {
        let n = self.coefficients.len();
        assert_eq!(gradient.len(), n, "one entry for each coefficient");
        let mut side = Mat::from_fn(n, 1, |i, _| gradient[i] / self.scales[i]);
        solve_lower_triangular_in_place(self.scaled.transpose(), side.as_mut(), Par::Seq);
        solve_upper_triangular_in_place(self.scaled.as_ref(), side.as_mut(), Par::Seq);
        let corrected: Vec<f64> =
            (0..n).map(|i| self.coefficients[i] + side[(i, 0)] / self.scales[i]).collect();
        if corrected.iter().all(|c| c.is_finite()) {
            self.coefficients = corrected;
        }
    }
}

/// Solves min ‖A b − y‖ from the triangle of `[A | y]`. `names` are those of A's columns.
pub fn solve(triangle: &Triangle, names: &[String], rows: u64) -> Result<Solution, SolveError> {
    let unknowns = names.len();
    assert_eq!(triangle.columns(), unknowns + 1, "one column more than unknowns");
    if triangle.rows() < unknowns {
        return Err(SolveError::TooFewRows { rows, unknowns });
    }
    if triangle.packed().iter().any(|v| !v.is_finite()) {
        return Err(SolveError::Overflow);
    }
    // Columns of about equal length: then the diagonal tells dependence from a mere small unit,
    // and nothing over- or underflows. Powers of two, so that scaling rounds nothing.
    let mut scales = Vec::with_capacity(unknowns);
    for (column, name) in names.iter().enumerate() {
        let length = (0..=column).fold(0.0, |sum: f64, row| sum.hypot(triangle.at(row, column)));
        let scale = power_of_two(length);
        if scale == 0.0 {
            return Err(SolveError::ZeroColumn { name: name.clone() });
        }
        let distance = triangle.at(column, column) / length;
        if distance < DEPENDENT {
            return Err(SolveError::Dependent { name: name.clone(), distance });
        }
        scales.push(scale);
    }
    let scaled = Mat::from_fn(unknowns, unknowns, |i, j| triangle.at(i, j) / scales[j]);
    // The right-hand sides: Qᵀy, and the identity for R⁻¹.
    let mut sides = Mat::from_fn(unknowns, unknowns + 1, |i, j| match j {
        0 => triangle.at(i, unknowns),
        _ => f64::from(u8::from(i + 1 == j)),
    });
    solve_upper_triangular_in_place(scaled.as_ref(), sides.as_mut(), Par::Seq);
    let inverse = sides.as_ref().subcols(1, unknowns);
    let coefficients: Vec<f64> = (0..unknowns).map(|i| sides[(i, 0)] / scales[i]).collect();
    if coefficients.iter().any(|c| !c.is_finite()) {
        return Err(SolveError::Overflow);
    }
    let condition = scaled.norm_l2() * inverse.norm_l2();
    Ok(Solution {
        coefficients,
        error_factors: (0..unknowns).map(|i| inverse.row(i).norm_l2() / scales[i]).collect(),
        condition,
        scales,
        scaled,
    })
}

/// The largest power of two that is not above a positive `length`; zero for zero.
fn power_of_two(length: f64) -> f64 {
    const FRACTION_BITS: u64 = (1 << 52) - 1;
    f64::from_bits(length.to_bits() & !FRACTION_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::Factor;

    fn triangle(rows: &[&[f64]]) -> Triangle {
        let columns = rows[0].len();
        let mut factor = Factor::new(columns, rows.len());
        factor.fold(rows.len(), |c, slots| slots.iter_mut().zip(rows).for_each(|(s, r)| *s = r[c]));
        factor.triangle()
    }

    fn names(n: usize) -> Vec<String> {
        ["a", "b", "c"][..n].iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn a_line_through_points_on_it() {
        let t = triangle(&[&[1.0, 1.0, 3.0], &[1.0, 2.0, 5.0], &[1.0, 3.0, 7.0]]);
        let s = solve(&t, &names(2), 3).unwrap();
        assert!((s.coefficients[0] - 1.0).abs() < 1e-13);
        assert!((s.coefficients[1] - 2.0).abs() < 1e-13);
        // (AᵀA)⁻¹ = [[14, -6], [-6, 3]] / 6
        assert!((s.error_factors[0] - (14.0f64 / 6.0).sqrt()).abs() < 1e-13);
        assert!((s.error_factors[1] - 0.5f64.sqrt()).abs() < 1e-13);
    }

    #[test]
    fn units_do_not_matter() {
        let t = triangle(&[&[1e-150, 1e150, 1.0], &[2e-150, 1e150, 2.0], &[3e-150, 3e150, 4.0]]);
        let s = solve(&t, &names(2), 3).unwrap();
        assert!(s.condition < 100.0, "{}", s.condition);
        assert!(s.coefficients.iter().all(|c| c.is_finite()));
    }

    #[test]
    fn the_dependent_column_is_named() {
        let t = triangle(&[
            &[1.0, 0.1, 1.1, 1.0],
            &[1.0, 0.7, 1.7, 2.0],
            &[1.0, 0.3, 1.3, 0.0],
            &[1.0, 0.9, 1.9, 1.0],
        ]);
        match solve(&t, &names(3), 4) {
            Err(SolveError::Dependent { name, .. }) => assert_eq!(name, "c"),
            other => panic!("{other:?}"),
        }
        let zero = triangle(&[&[1.0, 0.0, 1.0], &[1.0, 0.0, 2.0], &[1.0, 0.0, 2.0]]);
        assert_eq!(solve(&zero, &names(2), 3), Err(SolveError::ZeroColumn { name: "b".to_owned() }));
    }

    #[test]
    fn too_few_rows_are_said_so() {
        let t = triangle(&[&[1.0, 2.0, 3.0]]);
        assert_eq!(solve(&t, &names(2), 1), Err(SolveError::TooFewRows { rows: 1, unknowns: 2 }));
    }
}
