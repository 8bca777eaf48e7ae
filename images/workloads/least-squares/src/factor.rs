//! The running QR factor of a tall matrix: blocks of rows go in, a triangle comes out.
//!
//! Stacking a block under the triangle so far and triangularising again gives the factor of all
//! rows seen (Demmel, Grigori, Hoemmen, Langou: "Communication-optimal parallel and sequential QR
//! and LU factorizations", 2012, §3). Folding the ranks' triangles, in rank order, is the same
//! operation. Every step is orthogonal, so the result is as backward stable as one Householder QR
//! of the whole matrix, and it depends only on the split, never on timing.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch};
use faer::{Mat, Par};

/// Width of the panels of Householder reflectors: 8 columns is all that most fits have, and one
/// panel then is the whole matrix.
const PANEL: usize = 8;

/// An upper triangle (a trapezoid while fewer rows than columns were seen), diagonal not negative.
#[derive(Debug, Clone, PartialEq)]
pub struct Triangle {
    columns: usize,
    rows: usize,
    /// The upper part row after row: row `i` holds columns `i..columns`.
    packed: Vec<f64>,
}

impl Triangle {
    /// The factor of a matrix with `columns` columns and no row.
    pub fn empty(columns: usize) -> Self {
        Self { columns, rows: 0, packed: Vec::new() }
    }

    /// Takes a packed triangle that came from elsewhere; `None` when its length is not that of a
    /// trapezoid with `rows` rows of `columns` columns, or when a value is not finite.
    pub fn from_packed(columns: usize, rows: usize, packed: Vec<f64>) -> Option<Self> {
        if rows > columns || packed.len() != packed_length(columns, rows) {
            return None;
        }
        packed.iter().all(|v| v.is_finite()).then_some(Self { columns, rows, packed })
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of rows: the lesser of the columns and the rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The upper part row after row.
    pub fn packed(&self) -> &[f64] {
        &self.packed
    }

    /// The entry at a row and a column; zero below the diagonal and beyond the last row.
    pub fn at(&self, row: usize, column: usize) -> f64 {
        if row >= self.rows || column < row {
            return 0.0;
        }
        self.packed[packed_length(self.columns, row) + column - row]
    }
}

fn packed_length(columns: usize, rows: usize) -> usize {
    (0..rows).map(|row| columns - row).sum()
}

/// Folds rows into a triangle.
pub struct Factor {
    columns: usize,
    /// The triangle so far in its first `filled` rows, room for a block below.
    work: Mat<f64>,
    filled: usize,
    coefficients: Mat<f64>,
    scratch: MemBuffer,
}

impl Factor {
    /// An empty factor of `columns` columns that takes at most `block_rows` rows at a time.
    pub fn new(columns: usize, block_rows: usize) -> Self {
        let rows = columns + block_rows;
        let panel = PANEL.min(columns);
        let need = qr_in_place_scratch::<f64>(rows, columns, panel, Par::Seq, Default::default());
        Self {
            columns,
            work: Mat::zeros(rows, columns),
            filled: 0,
            coefficients: Mat::zeros(panel, columns),
            scratch: MemBuffer::new(need),
        }
    }

    /// Folds `rows` rows in: `fill(column, slots)` writes each column of the block.
    pub fn fold(&mut self, rows: usize, mut fill: impl FnMut(usize, &mut [f64])) {
        if rows == 0 {
            return;
        }
        let height = self.filled + rows;
        for column in 0..self.columns {
            let slots = self.work.col_as_slice_mut(column);
            fill(column, &mut slots[self.filled..height]);
        }
        let size = height.min(self.columns);
        let panel = PANEL.min(size);
        qr_in_place(
            self.work.as_mut().subrows_mut(0, height),
            self.coefficients.as_mut().submatrix_mut(0, 0, panel, size),
            Par::Seq,
            MemStack::new(&mut self.scratch),
            Default::default(),
        );
        // The reflectors were left below the diagonal; the next block needs zeros there.
        for column in 0..self.columns {
            let slots = self.work.col_as_slice_mut(column);
            for slot in slots.iter_mut().take(size).skip(column + 1) {
                *slot = 0.0;
            }
        }
        self.filled = size;
    }

    /// Folds a triangle in, whose columns must be as many.
    pub fn fold_triangle(&mut self, triangle: &Triangle) {
        assert_eq!(triangle.columns, self.columns, "triangles of different matrices");
        self.fold(triangle.rows, |column, slots| {
            for (row, slot) in slots.iter_mut().enumerate() {
                *slot = triangle.at(row, column);
            }
        });
    }

    /// The triangle of all rows so far.
    pub fn triangle(&self) -> Triangle {
        let mut packed = Vec::with_capacity(packed_length(self.columns, self.filled));
        for row in 0..self.filled {
            // Rows of a QR factor are defined up to their sign: this fixes it.
            let sign = if self.work[(row, row)] < 0.0 { -1.0 } else { 1.0 };
            packed.extend((row..self.columns).map(|column| sign * self.work[(row, column)]));
        }
        Triangle { columns: self.columns, rows: self.filled, packed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn factor_of(rows: &[Vec<f64>], columns: usize) -> Triangle {
        let mut factor = Factor::new(columns, rows.len().max(1));
        factor.fold(rows.len(), |c, slots| slots.iter_mut().zip(rows).for_each(|(s, r)| *s = r[c]));
        factor.triangle()
    }

    fn largest(triangle: &Triangle) -> f64 {
        triangle.packed().iter().fold(1.0, |m: f64, v| m.max(v.abs()))
    }

    #[test]
    fn keeps_the_norms_of_the_columns() {
        let rows = vec![vec![3.0, 1.0], vec![4.0, 2.0], vec![0.0, 2.0]];
        let r = factor_of(&rows, 2);
        assert!((r.at(0, 0) - 5.0).abs() < 1e-14);
        assert!((r.at(0, 1).hypot(r.at(1, 1)) - 3.0).abs() < 1e-14);
        assert_eq!(r.at(1, 0), 0.0);
    }

    #[test]
    fn refuses_a_packed_triangle_of_the_wrong_shape_or_with_infinities() {
        assert!(Triangle::from_packed(3, 2, vec![1.0; 5]).is_some());
        assert!(Triangle::from_packed(3, 2, vec![1.0; 6]).is_none());
        assert!(Triangle::from_packed(2, 3, vec![1.0; 3]).is_none());
        assert!(Triangle::from_packed(1, 1, vec![f64::NAN]).is_none());
    }

    proptest! {
        /// Any split over ranks, any block size, even ranks with fewer rows than columns or none:
        /// RᵀR equals the Gram matrix, and R the factor of the whole.
        #[test]
        fn any_split_gives_the_same_triangle(
            rows in prop::collection::vec(prop::collection::vec(-100.0..100.0f64, 4), 0..60),
            cuts in prop::collection::vec(0usize..60, 0..5),
            block in 1usize..20,
        ) {
            let whole = factor_of(&rows, 4);
            let mut edges: Vec<usize> = cuts.iter().map(|c| c % (rows.len() + 1)).collect();
            edges.extend([0, rows.len()]);
            edges.sort_unstable();
            let mut all = Factor::new(4, 4);
            for edge in edges.windows(2) {
                let mut local = Factor::new(4, block);
                for chunk in rows[edge[0]..edge[1]].chunks(block) {
                    local.fold(chunk.len(), |c, s| s.iter_mut().zip(chunk).for_each(|(s, r)| *s = r[c]));
                }
                all.fold_triangle(&local.triangle());
            }
            let combined = all.triangle();
            prop_assert_eq!(combined.rows(), rows.len().min(4));
            let scale = largest(&whole);
            for i in 0..4 {
                for j in 0..4 {
                    let gram: f64 = rows.iter().map(|r| r[i] * r[j]).sum();
                    let ours: f64 = (0..4).map(|k| combined.at(k, i) * combined.at(k, j)).sum();
                    prop_assert!((gram - ours).abs() <= 1e-12 * scale * scale);
                }
            }
        }
    }
}
