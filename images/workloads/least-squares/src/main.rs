//! The `least-squares` worker: one rank of a distributed least-squares fit.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use least_squares::data::Dataset;
use least_squares::fit::{EXIT_DATA, FitError, Problem, run_master, run_member};
use least_squares::gang::{GangError, MAX_RANKS, Place};
use least_squares::generate::{Recipe, generate};
use least_squares::{output, report, terminate};

/// Linear least squares over a gang of processes, by tall-skinny QR.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fit a linear model to a CSV or Parquet file, as one rank of a gang or alone.
    ///
    /// Exit status: 0 done, 2 bad arguments or data, 3 another rank was not reached or was lost.
    Fit(FitArgs),
    /// Write a synthetic dataset with known coefficients, printed as one line of JSON.
    Generate(GenerateArgs),
}

#[derive(Args)]
struct FitArgs {
    /// Dataset; every rank needs it, and reads its share only.
    #[arg(long, value_name = "FILE.csv|FILE.parquet")]
    data: PathBuf,
    /// Column to explain.
    #[arg(long, value_name = "COLUMN")]
    response: String,
    /// Columns to explain it by [default: all others].
    #[arg(long, value_name = "COLUMN,...", value_delimiter = ',')]
    features: Option<Vec<String>>,
    /// Fit through the origin; R² is then relative to zero instead of the mean.
    #[arg(long)]
    no_intercept: bool,
    /// Where rank 0 writes the result as JSON.
    #[arg(long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Where residuals are written; with several ranks each writes its rows to FILE.RANK.csv.
    #[arg(long, value_name = "FILE.csv")]
    residuals: Option<PathBuf>,
    /// Passes of iterative refinement [default: 1 where the columns are ill-conditioned, else 0].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=10))]
    refine: Option<u32>,
    /// MiB of rows each rank may keep in memory between passes instead of reading them again.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    keep_mib: u32,
    #[command(flatten)]
    place: PlaceArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Place in the gang")]
struct PlaceArgs {
    /// This rank.
    #[arg(long, env = "RANK", default_value_t = 0)]
    rank: u32,
    /// Number of ranks.
    #[arg(long, env = "WORLD_SIZE", default_value_t = 1)]
    world_size: u32,
    /// Name or address of rank 0's machine.
    #[arg(long, env = "MASTER_ADDR", default_value = "127.0.0.1")]
    master_addr: String,
    /// Port of rank 0.
    #[arg(long, env = "MASTER_PORT", default_value_t = 29_500)]
    master_port: u16,
    /// Seconds within which all ranks must have met.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    connect_timeout: u32,
    /// Seconds after which a machine that no longer answers counts as lost.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    peer_timeout: u32,
}

#[derive(Args)]
struct GenerateArgs {
    /// Number of rows.
    #[arg(long)]
    rows: u64,
    /// Number of features.
    #[arg(long)]
    features: usize,
    /// Seed; the same one gives the same file.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Standard deviation of the noise on the response.
    #[arg(long, default_value_t = 0.5)]
    noise: f64,
    /// File to write.
    #[arg(long, value_name = "FILE.csv|FILE.parquet")]
    output: PathBuf,
}

fn main() -> ExitCode {
    terminate::on_signals();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Fit(args) => fit(&args).map_err(|e| (e.exit_status(), e.to_string())),
        Command::Generate(args) => run_generate(&args).map_err(|e| (EXIT_DATA, e)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err((status, message)) => {
            eprintln!("least-squares: {message}");
            ExitCode::from(status)
        }
    }
}

fn fit(args: &FitArgs) -> Result<(), FitError> {
    let (rank, world) = (args.place.rank, args.place.world_size);
    if world == 0 || world > MAX_RANKS || rank >= world {
        let message =
            format!("RANK {rank} of WORLD_SIZE {world}: ranks are 0 to WORLD_SIZE - 1, at most {MAX_RANKS}");
        return Err(GangError::Setup(message).into());
    }
    if let Some(path) = args.output.as_deref().filter(|_| rank == 0) {
        output::check_writable(path)?;
    }
    let problem = Problem {
        dataset: Dataset::open(&args.data, &args.response, args.features.as_deref())?,
        intercept: !args.no_intercept,
        refinements: args.refine,
        keep_bytes: args.keep_mib as usize * (1 << 20),
        residuals: args.residuals.clone(),
    };
    let place = Place {
        rank,
        world,
        address: args.place.master_addr.clone(),
        port: args.place.master_port,
        connect_timeout: Duration::from_secs(args.place.connect_timeout.into()),
        peer_timeout: Duration::from_secs(args.place.peer_timeout.into()),
        problem: problem.in_words(),
        message_limit: problem.message_limit(),
    };
    if rank > 0 {
        let work = run_member(&problem, &place)?;
        println!(
            "rank {rank} of {world}: {} rows, read {:.3} s, factor {:.3} s",
            work.rows, work.read_seconds, work.compute_seconds
        );
        return Ok(());
    }
    let fit = run_master(&problem, &place)?;
    let json = report::json(&fit);
    if let Some(path) = &args.output {
        output::write_file(path, &format!("{json:#}\n"))?;
    }
    print!("{}", report::table(&fit, problem.dataset.response()));
    println!("RESULT {json}");
    Ok(())
}

fn run_generate(args: &GenerateArgs) -> Result<(), String> {
    if !(0.0..=1000.0).contains(&args.noise) {
        return Err(format!("--noise {}: from 0 to 1000 is possible", args.noise));
    }
    let recipe = Recipe {
        rows: args.rows,
        features: args.features,
        seed: args.seed,
        noise_millionths: (args.noise * 1e6).round() as u32,
    };
    let truth = generate(&recipe, &args.output).map_err(|e| e.to_string())?;
    println!("{}", serde_json::json!(truth));
    Ok(())
}
