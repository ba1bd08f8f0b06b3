//! Slurm's compressed lists: hosts such as `n[01-04,7],m2` and counts such as `2(x3),1`.

/// Returns the first host of a list.
pub(crate) fn first_host(list: &str) -> Option<String> {
    let Some((prefix, rest)) = list.split_once('[').filter(|(head, _)| !head.contains(',')) else {
        let first = list.split(',').next()?.trim();
        return (!first.is_empty()).then(|| first.to_owned());
    };
    let (ranges, after) = rest.split_once(']')?;
    let number = ranges.split([',', '-']).next()?;
    let suffix = after.split(',').next()?;
    // A second bracket, as in rack[1-2]n[1-4], begins with its first number too.
    let suffix = if suffix.contains('[') {
        first_host(after)?
    } else {
        suffix.to_owned()
    };
    (!number.is_empty()).then(|| format!("{prefix}{number}{suffix}"))
}

/// Returns how many tasks the `node`-th node has.
pub(crate) fn tasks_on_node(counts: &str, node: u32) -> Option<u32> {
    let mut first = 0;
    for part in counts.split(',') {
        let (count, repeat) = match part.split_once("(x") {
            Some((count, repeat)) => (count, repeat.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if node < first + repeat {
            return count.trim().parse().ok();
        }
        first += repeat;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_hosts() {
        let cases = [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("n[1-2]", "n1"),
            ("n[01-04,7],m2", "n01"),
            ("gpu[3,7]-x", "gpu3-x"),
            ("a,n[1-2]", "a"),
            ("rack[1-2]n[4-5]", "rack1n4"),
        ];
        for (list, host) in cases {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for wrong in ["", "n[", "n[]"] {
            assert_eq!(first_host(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn tasks_per_node() {
        assert_eq!(tasks_on_node("4", 0), Some(4));
        assert_eq!(tasks_on_node("2(x3),1", 2), Some(2));
        assert_eq!(tasks_on_node("2(x3),1", 3), Some(1));
        assert_eq!(tasks_on_node("2(x3),1", 4), None);
        assert_eq!(tasks_on_node("x", 0), None);
    }
}
