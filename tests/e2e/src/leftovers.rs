//! What a host holds of Lathe's making, counted.

use std::collections::BTreeMap;

use lathe_testbed::Host;

/// One line a thing: `KIND NAME`. What a sandbox makes shows in one of these; what the host always
/// has (kernel threads, its own mounts) shows before and after alike.
const SCRIPT: &str = r#"
for p in /proc/[0-9]*; do
  # This shell's own command line has all the names below in it.
  [ $p = /proc/$$ ] && continue
  c=$(tr '\0' ' ' < $p/cmdline 2>/dev/null)
  case "$c" in *lathe-vmm*|*"lathe-agent supervise"*|*"lathe-agent sandbox"*|*libcontainer*|*least-squares*|*python*)
    echo "process ${c%% *}";; esac
done
ls /sys/class/net | sed 's/^/link /'
find /sys/fs/cgroup -mindepth 1 -type d | sed 's/^/cgroup /'
awk '{print "mount " $5}' /proc/self/mountinfo
ls /run/netns 2>/dev/null | sed 's/^/netns /'
losetup -a 2>/dev/null | cut -d: -f1 | sed 's/^/loop /'
ls -A /run/lathe 2>/dev/null | sed 's/^/run /'
find /run/lathe /var/lib/lathe -type s 2>/dev/null | sed 's/^/socket /'
find /var/lib/lathe/sandboxes -mindepth 1 2>/dev/null | sed 's/^/sandbox /'
ip route | sed 's/^/route /'
nft list ruleset 2>/dev/null | sed 's/^/nft /'
"#;

/// What was found: how often each line.
pub type Census = BTreeMap<String, usize>;

/// Counts what `host` holds now.
///
/// # Errors
/// When the host does not answer.
pub fn census(host: &Host) -> anyhow::Result<Census> {
    let mut found = Census::new();
    for line in host.shell(SCRIPT)?.lines() {
        *found.entry(line.trim().to_owned()).or_default() += 1;
    }
    Ok(found)
}

/// What is there now and was not before.
pub fn new_since(before: &Census, now: &Census) -> Vec<String> {
    now.iter()
        .filter(|(line, count)| before.get(*line).is_none_or(|had| had < count))
        .map(|(line, _)| line.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_is_named() {
        let census = |lines: &[(&str, usize)]| {
            lines.iter().map(|(line, count)| ((*line).to_owned(), *count)).collect::<Census>()
        };
        let before = census(&[("link lo", 1), ("process lathe-vmm", 1)]);
        let now = census(&[("link lo", 1), ("process lathe-vmm", 2), ("link tap0", 1)]);
        assert_eq!(new_since(&before, &now), ["link tap0", "process lathe-vmm"]);
        assert!(new_since(&now, &before).is_empty());
    }
}
