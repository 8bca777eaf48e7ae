//! Linear least squares over a gang of processes, by tall-skinny QR (TSQR).
//!
//! Every rank reads its own share of the rows, folds it block by block into a small triangular
//! factor, and sends that to rank 0, which folds the factors together, solves, and has all ranks
//! evaluate the residuals. The normal equations, whose condition number is the square of the
//! data's, are never formed, so ill-conditioned problems keep their digits.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`data`] | CSV and Parquet files, the share of one rank, blocks of rows |
//! | [`factor`] | the running QR factor: rows in, triangle out |
//! | [`solve`] | coefficients and their errors from the triangle; rank deficiency |
//! | [`passes`] | what one rank computes while it reads its share once |
//! | [`gang`] | messages between ranks over TCP |
//! | [`fit`] | the whole computation as rank 0 and as any other rank |
//! | [`report`] | tables, JSON and residual files |
//! | [`output`] | files that appear whole or not at all |
//! | [`generate`] | synthetic datasets with known coefficients |
//! | [`terminate`] | a prompt end on SIGTERM, as PID 1 too |

pub mod data;
pub mod factor;
pub mod fit;
pub mod gang;
pub mod generate;
pub mod output;
pub mod passes;
pub mod report;
pub mod solve;
pub mod terminate;
