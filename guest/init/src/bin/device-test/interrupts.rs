//! /proc/interrupts.

use std::collections::BTreeMap;

/// How often each interrupt whose action starts with `prefix` came, over all CPUs, by action.
pub fn counts(text: &str, prefix: &str) -> BTreeMap<String, u64> {
    let mut lines = text.lines();
    let cpus = lines.next().unwrap_or_default().split_whitespace().count();
    let parse = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let action = rest.split_whitespace().last()?;
        let counts = rest.split_whitespace().take(cpus);
        let sum = counts.map_while(|count| count.parse::<u64>().ok()).sum();
        action.starts_with(prefix).then(|| (action.to_owned(), sum))
    };
    lines.filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_action() {
        let text = "           CPU0       CPU1       \n  \
            1:          0          9   IO-APIC   1-edge      acpi\n \
            24:         10          2  PCI-MSIX-0000:01:00.0   0-edge      nvme0q0\n \
            25:        512          0  PCI-MSIX-0000:01:00.0   1-edge      nvme0q1\n\
            NMI:          0          0   Non-maskable interrupts\n";
        let expected = [("nvme0q0".to_owned(), 12), ("nvme0q1".to_owned(), 512)];
        assert_eq!(counts(text, "nvme0q"), BTreeMap::from(expected));
        assert!(counts("", "nvme").is_empty());
    }
}
