//! The whole fit, as rank 0 and as any other rank.
//!
//! 1. Every rank factors its share; rank 0 folds the triangles in rank order and solves.
//! 2. Refinement, where the condition calls for it: every rank forms the residuals r of these
//!    coefficients and Aᵀr in twice the working precision; rank 0 solves RᵀR d = Aᵀr for the
//!    correction d (the corrected seminormal equations of Björck, 1987).
//! 3. Every rank evaluates the residuals of the final coefficients, from which the sums of
//!    squares, R² and the standard errors come, free of cancellation.

use std::path::PathBuf;
use std::time::Instant;

use crate::data::{DataError, Dataset, Part, Share};
use crate::factor::{Factor, Triangle};
use crate::gang::{GangError, Master, Member, Message, Place};
use crate::output::OutputError;
use crate::passes::{Model, Residuals, Sum, Worker};
use crate::report::ResidualFile;
use crate::solve::{Solution, SolveError, solve};

/// Why a fit failed.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// The dataset.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The problem has no single solution.
    #[error("{path}: {source}")]
    Solve {
        /// The dataset.
        path: String,
        /// Why.
        source: SolveError,
    },
    /// The gang.
    #[error(transparent)]
    Gang(#[from] GangError),
    /// A file to be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Condition number from which on a refinement pass is worth its time: below it the digits that
/// QR leaves uncertain are the last two or three of sixteen.
const REFINE_ABOVE: f64 = 100.0;

/// Exit status for bad input.
pub const EXIT_DATA: u8 = 2;
/// Exit status for a failure of communication.
pub const EXIT_GANG: u8 = 3;

impl FitError {
    /// The exit status that says what kind of failure it was.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Data(_) | Self::Solve { .. } | Self::Output(_) => EXIT_DATA,
            Self::Gang(GangError::Setup(_)) => EXIT_DATA,
            // A rank with bad data takes the others with it, and they say so with its status.
            Self::Gang(GangError::Aborted { exit: EXIT_DATA, .. }) => EXIT_DATA,
            Self::Gang(_) => EXIT_GANG,
        }
    }
}

/// What to fit.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The dataset with its columns.
    pub dataset: Dataset,
    /// Whether the model has an intercept.
    pub intercept: bool,
    /// Refinement passes; `None` leaves it to the condition number.
    pub refinements: Option<u32>,
    /// Bytes of rows kept in memory between passes.
    pub keep_bytes: usize,
    /// Where residuals go, if anywhere.
    pub residuals: Option<PathBuf>,
}

impl Problem {
    fn model(&self) -> Model {
        Model { features: self.dataset.features().len(), intercept: self.intercept }
    }

    /// Names of the coefficients.
    pub fn names(&self) -> Vec<String> {
        let intercept = self.intercept.then(|| "(intercept)".to_owned());
        intercept.into_iter().chain(self.dataset.features().iter().cloned()).collect()
    }

    /// The problem in words, equal on all ranks that belong together. Paths may differ.
    pub fn in_words(&self) -> String {
        format!(
            "response {} on {}{} in a dataset of {} bytes",
            self.dataset.response(),
            if self.intercept { "an intercept, " } else { "" },
            self.dataset.features().join(", "),
            self.dataset.bytes()
        )
    }

    /// Largest message between ranks, in bytes: a triangle, with room for its frame.
    pub fn message_limit(&self) -> usize {
        let columns = self.model().unknowns() + 1;
        4096 + columns * (columns + 1) / 2 * size_of::<f64>()
    }

    fn worker(&self, part: Part) -> Worker {
        Worker::new(self.model(), Share::new(self.dataset.clone(), part, self.keep_bytes))
    }

    fn solve(&self, triangle: &Triangle, rows: u64) -> Result<Solution, FitError> {
        solve(triangle, &self.names(), rows).map_err(|e| self.unsolvable(e))
    }

    fn unsolvable(&self, source: SolveError) -> FitError {
        FitError::Solve { path: self.dataset.path().display().to_string(), source }
    }

    /// Refuses a triangle of one's own that cannot be sent: others would take infinities for a
    /// broken peer.
    fn check_finite(&self, triangle: &Triangle) -> Result<(), FitError> {
        if triangle.packed().iter().all(|v| v.is_finite()) {
            return Ok(());
        }
        Err(self.unsolvable(SolveError::Overflow))
    }
}

/// What one rank did.
#[derive(Debug, Clone)]
pub struct RankWork {
    /// The rank.
    pub rank: u32,
    /// Its address as rank 0 saw it; none for rank 0.
    pub address: Option<String>,
    /// Rows in its share.
    pub rows: u64,
    /// Seconds spent on reading and parsing.
    pub read_seconds: f64,
    /// Seconds spent on arithmetic.
    pub compute_seconds: f64,
}

/// A finished fit.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Names of the coefficients.
    pub names: Vec<String>,
    /// The coefficients.
    pub coefficients: Vec<f64>,
    /// See [`Solution::error_factors`].
    pub error_factors: Vec<f64>,
    /// See [`Solution::condition`].
    pub condition: f64,
    /// Residuals of all ranks together.
    pub residuals: Residuals,
    /// Whether R² is relative to the mean of the response (else to zero).
    pub centred: bool,
    /// The work of each rank, in rank order.
    pub ranks: Vec<RankWork>,
    /// Seconds rank 0 waited for others.
    pub gather_seconds: f64,
    /// Seconds from start to end on rank 0.
    pub total_seconds: f64,
}

impl Fit {
    /// Rows beyond the number of coefficients.
    pub fn degrees_of_freedom(&self) -> u64 {
        self.residuals.rows - self.coefficients.len() as u64
    }

    /// Coefficient of determination; none when the response does not vary.
    pub fn r_squared(&self) -> Option<f64> {
        let total = self.residuals.response_squares;
        (total > 0.0).then(|| 1.0 - self.residuals.squares / total)
    }

    /// Residual standard error √(RSS / degrees of freedom); none without degrees of freedom.
    pub fn residual_standard_error(&self) -> Option<f64> {
        match self.degrees_of_freedom() {
            0 => None,
            df => Some((self.residuals.squares / df as f64).sqrt()),
        }
    }

    /// Root of the mean squared residual.
    pub fn rmse(&self) -> f64 {
        (self.residuals.squares / self.residuals.rows as f64).sqrt()
    }

    /// Standard errors of the coefficients; none without degrees of freedom.
    pub fn standard_errors(&self) -> Option<Vec<f64>> {
        self.residual_standard_error().map(|s| self.error_factors.iter().map(|f| f * s).collect())
    }
}

/// Runs rank 0 of the gang, or the whole fit when it is the only rank.
pub fn run_master(problem: &Problem, place: &Place) -> Result<Fit, FitError> {
    let mut gang = Gang { master: None, place, waited: 0.0 };
    if place.world > 1 {
        gang.master = Some(Master::listen(place.clone())?);
    }
    let result = lead(problem, &mut gang);
    if let (Err(error), Some(master)) = (&result, &mut gang.master) {
        master.abort(error.exit_status(), &error.to_string());
    }
    result
}

/// Rank 0's view of the other ranks; without a master there are none.
struct Gang<'a> {
    master: Option<Master>,
    place: &'a Place,
    waited: f64,
}

impl Gang<'_> {
    fn check(&mut self) -> Result<(), FitError> {
        self.master.as_mut().map_or(Ok(()), |m| m.check().map_err(FitError::from))
    }

    fn tell(&mut self, message: impl Fn(u32) -> Message) -> Result<(), FitError> {
        self.master.as_mut().map_or(Ok(()), |m| m.tell(message).map_err(FitError::from))
    }

    /// One message from each other rank, in rank order, through `take`, which says whether it is
    /// what was due.
    fn gather(&mut self, mut take: impl FnMut(u32, &Message) -> Option<()>) -> Result<(), FitError> {
        let Some(master) = &mut self.master else { return Ok(()) };
        let started = Instant::now();
        for (rank, message) in master.gather()? {
            if take(rank, &message).is_none() {
                return Err(master.unexpected(rank, &message).into());
            }
        }
        self.waited += started.elapsed().as_secs_f64();
        Ok(())
    }
}

fn lead(problem: &Problem, gang: &mut Gang<'_>) -> Result<Fit, FitError> {
    let started = Instant::now();
    let part = Part { rank: 0, of: gang.place.world };
    let mut worker = problem.worker(part);
    let columns = problem.model().unknowns() + 1;

    let first = worker.factor(|| gang.check())?;
    problem.check_finite(&first.triangle)?;
    let mut shares = vec![first.rows];
    let mut response = Sum::default();
    response.add(first.response_sum);
    let mut all = Factor::new(columns, columns);
    all.fold_triangle(&first.triangle);
    gang.gather(|_, message| {
        let Message::Factored { rows, response_sum, triangle_rows, triangle } = message else { return None };
        all.fold_triangle(&unpack(columns, *triangle_rows, triangle)?);
        shares.push(*rows);
        response.add(*response_sum);
        Some(())
    })?;
    let rows = shares.iter().sum();
    let mut solution = problem.solve(&all.triangle(), rows)?;
    let automatic = u32::from(solution.condition > REFINE_ABOVE);
    for _ in 0..problem.refinements.unwrap_or(automatic) {
        refine(gang, &mut worker, &mut solution)?;
    }

    let centre = if problem.intercept { response.value() / rows as f64 } else { 0.0 };
    let coefficients = solution.coefficients;
    gang.tell(|rank| Message::Evaluate {
        coefficients: coefficients.clone(),
        centre,
        first_row: shares[..rank as usize].iter().sum(),
    })?;
    let mut file = ResidualFile::create(problem.residuals.as_deref(), part, 0)?;
    let own = worker.residuals(&coefficients, centre, |y, r| {
        file.write(y, r)?;
        gang.check()
    })?;
    let mut parts = vec![own];
    let mut ranks = vec![RankWork {
        rank: 0,
        address: None,
        rows: own.rows,
        read_seconds: worker.reading().as_secs_f64(),
        compute_seconds: worker.computing().as_secs_f64(),
    }];
    gang.gather(|rank, message| {
        let Message::Evaluated { residuals, read_seconds, compute_seconds } = message else { return None };
        parts.push(*residuals);
        ranks.push(RankWork {
            rank,
            address: None,
            rows: residuals.rows,
            read_seconds: *read_seconds,
            compute_seconds: *compute_seconds,
        });
        Some(())
    })?;
    file.finish()?;
    gang.tell(|_| Message::Done)?;
    for (rank, address) in gang.master.iter().flat_map(Master::addresses) {
        ranks[rank as usize].address = Some(address.to_owned());
    }
    Ok(Fit {
        names: problem.names(),
        coefficients,
        error_factors: solution.error_factors,
        condition: solution.condition,
        residuals: together(&parts),
        centred: problem.intercept,
        ranks,
        gather_seconds: gang.waited,
        total_seconds: started.elapsed().as_secs_f64(),
    })
}

fn refine(gang: &mut Gang<'_>, worker: &mut Worker, solution: &mut Solution) -> Result<(), FitError> {
    gang.tell(|_| Message::Refine(solution.coefficients.clone()))?;
    let mut gradient = worker.gradient(&solution.coefficients, || gang.check())?;
    gang.gather(|_, message| {
        let Message::Refined(part) = message else { return None };
        if part.len() != gradient.len() {
            return None;
        }
        gradient.iter_mut().zip(part).for_each(|(sum, part)| sum.add_sum(*part));
        Some(())
    })?;
    let gradient: Vec<f64> = gradient.into_iter().map(Sum::value).collect();
    solution.correct(&gradient);
    Ok(())
}

/// A triangle from a peer, if it is one.
fn unpack(columns: usize, rows: u32, packed: &[f64]) -> Option<Triangle> {
    Triangle::from_packed(columns, usize::try_from(rows).ok()?, packed.to_vec())
}

fn together(parts: &[Residuals]) -> Residuals {
    let sum = |of: fn(&Residuals) -> f64| {
        let mut sum = Sum::default();
        parts.iter().for_each(|p| sum.add(of(p)));
        sum.value()
    };
    Residuals {
        rows: parts.iter().map(|p| p.rows).sum(),
        squares: sum(|p| p.squares),
        absolute: sum(|p| p.absolute),
        min: parts.iter().fold(f64::INFINITY, |m, p| m.min(p.min)),
        max: parts.iter().fold(f64::NEG_INFINITY, |m, p| m.max(p.max)),
        response_squares: sum(|p| p.response_squares),
    }
}

/// Runs any rank but 0, until rank 0 says that all is done.
pub fn run_member(problem: &Problem, place: &Place) -> Result<RankWork, FitError> {
    let mut gang = Member::join(place)?;
    let result = follow(problem, place, &mut gang);
    if let Err(error) = &result
        && !matches!(error, FitError::Gang(_))
    {
        gang.abort(error.exit_status(), &error.to_string());
    }
    result
}

fn follow(problem: &Problem, place: &Place, gang: &mut Member) -> Result<RankWork, FitError> {
    let part = Part { rank: place.rank, of: place.world };
    let unknowns = problem.model().unknowns();
    let mut worker = problem.worker(part);
    let first = worker.factor(|| Ok::<_, FitError>(()))?;
    problem.check_finite(&first.triangle)?;
    gang.send(&Message::Factored {
        rows: first.rows,
        response_sum: first.response_sum,
        triangle_rows: first.triangle.rows() as u32,
        triangle: first.triangle.packed().to_vec(),
    })?;
    loop {
        match gang.receive()? {
            Message::Refine(coefficients) if coefficients.len() == unknowns => {
                let gradient = worker.gradient(&coefficients, || Ok::<_, FitError>(()))?;
                gang.send(&Message::Refined(gradient))?;
            }
            Message::Evaluate { coefficients, centre, first_row } if coefficients.len() == unknowns => {
                let mut file = ResidualFile::create(problem.residuals.as_deref(), part, first_row)?;
                let residuals = worker
                    .residuals(&coefficients, centre, |y, r| file.write(y, r).map_err(FitError::from))?;
                file.finish()?;
                gang.send(&Message::Evaluated {
                    residuals,
                    read_seconds: worker.reading().as_secs_f64(),
                    compute_seconds: worker.computing().as_secs_f64(),
                })?;
            }
            Message::Done => {
                return Ok(RankWork {
                    rank: place.rank,
                    address: None,
                    rows: first.rows,
                    read_seconds: worker.reading().as_secs_f64(),
                    compute_seconds: worker.computing().as_secs_f64(),
                });
            }
            other => return Err(gang.unexpected(&other).into()),
        }
    }
}
