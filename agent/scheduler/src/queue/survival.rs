//! The normal distribution, as logarithms of durations are thought to follow it, and what is known of
//! one that is not over.

/// `1 - Φ(z)`: how likely it is that more comes, to about 1e-7 (Abramowitz and Stegun, "Handbook of
/// Mathematical Functions", 1964, 26.2.17; for large `z` the first terms of 26.2.12).
pub fn tail(z: f64) -> f64 {
    if z > 5.0 {
        return density(z) / z * (1.0 - 1.0 / (z * z) + 3.0 / (z * z * z * z));
    }
    const B: [f64; 5] = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let tail = density(z) * t * B.iter().rev().fold(0.0, |sum, b| sum * t + b);
    if z < 0.0 { 1.0 - tail } else { tail }
}

fn density(z: f64) -> f64 {
    (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The mean of what is above `z`, which is above `z` itself (the inverse of Mills' ratio).
fn mean_above(z: f64) -> f64 {
    if z > 30.0 { z + 1.0 / z } else { density(z) / tail(z) }
}

/// What one that is above `z` says of the mean: as much as this part of an observation, of a value so
/// much above the mean. (A step of Newton's method on the likelihood of a censored observation: the
/// slope, and the information, which is the slope's.)
pub fn censored(z: f64) -> (f64, f64) {
    let slope = mean_above(z);
    (slope * (slope - z), 1.0 / (slope - z))
}

/// As many that are above `z` are above this as below it.
pub fn median_above(z: f64) -> f64 {
    if z > 8.0 {
        return z + std::f64::consts::LN_2 / z;
    }
    let half = tail(z) / 2.0;
    let (mut low, mut high) = (z, z.max(0.0) + 2.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        if tail(middle) > half { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_are_those_of_the_tables() {
        for (z, wanted) in [(0.0, 0.5), (1.0, 0.158_655_25), (-1.0, 0.841_344_75), (3.0, 0.001_349_898)] {
            assert!((tail(z) - wanted).abs() < 1e-7, "{z}: {}", tail(z));
        }
        assert!((tail(6.0) / 9.865_876e-10 - 1.0).abs() < 1e-3);
        assert!((tail(4.999) / tail(5.001) - 1.0).abs() < 0.02, "the two ways meet");
    }

    #[test]
    fn who_lives_longer_than_expected_says_more() {
        let parts = [-4.0, -1.0, 0.0, 1.0, 4.0, 40.0].map(|z| censored(z).0);
        assert!(parts.is_sorted() && parts[0] < 0.001 && parts[5] > 0.99, "{parts:?}");
        // Half of a normal distribution is above its mean by sqrt(2/pi) on average.
        let (part, above) = censored(0.0);
        let slope = (2.0 / std::f64::consts::PI).sqrt();
        assert!((part - slope * slope).abs() < 1e-6 && (above - 1.0 / slope).abs() < 1e-6);
        assert!((median_above(-9.0)).abs() < 1e-6 && (median_above(0.0) - 0.674_489_75).abs() < 1e-5);
    }
}
