//! NIST StRD "Longley": certified coefficients, and how many digits a fit shares with them.

use crate::report::Coefficient;

/// Certified values (NIST Statistical Reference Datasets, linear regression, Longley), intercept first.
pub const LONGLEY: [(&str, f64); 7] = [
    ("intercept", -3_482_258.634_595_82),
    ("GNPDEFL", 15.061_872_271_373_3),
    ("GNP", -0.035_819_179_292_591_0),
    ("UNEMP", -2.020_229_803_816_83),
    ("ARMED", -1.033_226_867_173_59),
    ("POP", -0.051_104_105_653_580_7),
    ("YEAR", 1_829.151_464_613_55),
];

/// Certified coefficient of determination.
pub const LONGLEY_R_SQUARED: f64 = 0.995_479_004_577_296;

/// Significant digits on which `value` and `certified` agree (the logarithm of the relative error, as
/// NIST counts them); 15 when they are equal.
pub fn digits(value: f64, certified: f64) -> f64 {
    if value == certified {
        return 15.0;
    }
    (-((value - certified).abs() / certified.abs()).log10()).clamp(0.0, 15.0)
}

/// The fewest digits on which a fit agrees with NIST; `None` when a coefficient is missing.
pub fn longley_digits(coefficients: &[Coefficient]) -> Option<f64> {
    let each = LONGLEY.iter().map(|(name, certified)| {
        let found = coefficients.iter().find(|c| c.name.eq_ignore_ascii_case(name))?;
        Some(digits(found.value, *certified))
    });
    each.collect::<Option<Vec<f64>>>().map(|digits| digits.into_iter().fold(15.0, f64::min))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_counted_as_nist_does() {
        assert_eq!(digits(1.0, 1.0), 15.0);
        assert!((digits(1.000_001, 1.0) - 6.0).abs() < 1e-6);
        let exact: Vec<_> =
            LONGLEY.iter().map(|(name, value)| Coefficient { name: (*name).into(), value: *value }).collect();
        assert_eq!(longley_digits(&exact), Some(15.0));
        assert_eq!(longley_digits(&exact[1..]), None);
    }
}
