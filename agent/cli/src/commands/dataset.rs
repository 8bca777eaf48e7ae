//! `lathe dataset`: data that tasks read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Subcommand;
use lathe_api::artefact::{Dataset, DatasetFile, Digest};
use lathe_api::client::Client;
use sha2::Digest as _;

use super::upload;
use crate::exit::Exit;
use crate::output::{self, Format};

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring files into the cluster under a name.
    Add {
        /// The name jobs use.
        name: String,
        /// Files and folders; a folder's files keep their paths below it.
        #[arg(required = true)]
        sources: Vec<PathBuf>,
    },
    /// List the datasets.
    List,
}

/// Runs a subcommand.
///
/// # Errors
/// When a file cannot be read, or what the coordinator said.
pub async fn run(command: Command, client: &Client, format: Format) -> anyhow::Result<Exit> {
    match command {
        Command::Add { name, sources } => {
            let dataset = add(client, name, sources).await?;
            match format {
                Format::Json => output::json(&dataset)?,
                Format::Table => println!("{} {}", dataset.name, dataset.digest),
            }
        }
        Command::List => {
            let datasets = client.datasets().await?;
            match format {
                Format::Json => output::json(&datasets)?,
                Format::Table => {
                    let mut table = output::table(&["NAME", "FILES", "SIZE", "DIGEST"]);
                    for dataset in &datasets {
                        let size = format!("{:.1} MiB", dataset.size().bytes() as f64 / 1_048_576.0);
                        let files = dataset.files.len().to_string();
                        table.add_row([dataset.name.clone(), files, size, dataset.digest.to_string()]);
                    }
                    println!("{table}");
                }
            }
        }
    }
    Ok(Exit::Success)
}

async fn add(client: &Client, name: String, sources: Vec<PathBuf>) -> anyhow::Result<Dataset> {
    let (files, places) = tokio::task::spawn_blocking(move || describe(&sources)).await??;
    let total = files.iter().map(|file| file.size_bytes).sum();
    let bar = upload::bar(total, format!("dataset {name}"));
    for (file, place) in files.iter().zip(&places) {
        upload::blob(client, &file.digest, file.size_bytes, place, &bar).await?;
    }
    bar.finish_and_clear();
    let dataset = Dataset { name, digest: Dataset::digest_of(&files), files };
    client.add_dataset(&dataset).await?;
    Ok(dataset)
}

/// The files behind `sources`, sorted by their path in the dataset, and where each is here.
fn describe(sources: &[PathBuf]) -> anyhow::Result<(Vec<DatasetFile>, Vec<PathBuf>)> {
    let mut found = Vec::new();
    for source in sources {
        let meta = source.metadata().with_context(|| format!("cannot read {}", source.display()))?;
        if meta.is_dir() {
            walk(source, Path::new(""), &mut found)?;
        } else {
            let Some(name) = source.file_name() else { bail!("{} has no file name", source.display()) };
            found.push((PathBuf::from(name), source.clone()));
        }
    }
    found.sort();
    if let Some(pair) = found.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        bail!("two files would both be {} in the dataset", pair[0].0.display());
    }
    if found.is_empty() {
        bail!("there are no files in what was given");
    }
    let mut files = Vec::new();
    let mut places = Vec::new();
    for (inside, place) in found {
        let Some(path) = inside.to_str().map(str::to_owned) else {
            bail!("{} is not UTF-8; rename it", inside.display());
        };
        let context = || format!("cannot read {}", place.display());
        let mut hasher = sha2::Sha256::new();
        let size_bytes =
            io::copy(&mut File::open(&place).with_context(context)?, &mut hasher).with_context(context)?;
        files.push(DatasetFile { path, digest: Digest::from_bytes(hasher.finalize().into()), size_bytes });
        places.push(place);
    }
    Ok((files, places))
}

fn walk(dir: &Path, inside: &Path, found: &mut Vec<(PathBuf, PathBuf)>) -> anyhow::Result<()> {
    for entry in dir.read_dir().with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let inside = inside.join(entry.file_name());
        // A link could point anywhere on this machine: only what lies in the folder is taken.
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), &inside, found)?;
        } else if kind.is_file() {
            found.push((inside, entry.path()));
        } else {
            bail!("{} is neither a file nor a folder", entry.path().display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn folders_keep_their_shape_and_order_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("part/b")).unwrap();
        fs::write(dir.path().join("part/b/2.csv"), "2").unwrap();
        fs::write(dir.path().join("part/1.csv"), "1").unwrap();
        fs::write(dir.path().join("readme"), "r").unwrap();
        let sources = [dir.path().join("part"), dir.path().join("readme")];
        let (files, _) = describe(&sources).unwrap();
        let names: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(names, ["1.csv", "b/2.csv", "readme"]);
        let (again, _) = describe(&[sources[1].clone(), sources[0].clone()]).unwrap();
        assert_eq!(Dataset::digest_of(&files), Dataset::digest_of(&again));
    }

    #[test]
    fn two_files_of_one_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for part in ["a", "b"] {
            fs::create_dir(dir.path().join(part)).unwrap();
            fs::write(dir.path().join(part).join("x.csv"), part).unwrap();
        }
        let error = describe(&[dir.path().join("a"), dir.path().join("b")]).unwrap_err().to_string();
        assert!(error.contains("x.csv"), "{error}");
    }
}
