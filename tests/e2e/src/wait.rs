//! Waiting for something to become true. Bounds here keep a hung test from hanging for ever; no test
//! asserts how long a thing took.

use std::time::{Duration, Instant};

use anyhow::bail;

/// How long anything may take on a loaded machine under emulation.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Asks `probe` until it gives something, or fails with what was waited for.
///
/// # Errors
/// When `limit` has passed, with the last thing `probe` had to say.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() > end {
            match last {
                Some(error) => bail!("{what}: not within {} s: {error:#}", limit.as_secs()),
                None => bail!("{what}: not within {} s", limit.as_secs()),
            }
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}
