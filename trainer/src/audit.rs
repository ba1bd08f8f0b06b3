//! Whether the loaders of all ranks delivered what the sample order says: every sample of the
//! global batch once, each on the rank and in the place that is due to it.

use std::collections::BTreeMap;
use std::fmt;

/// Most samples that a message names of each kind.
const NAMED: usize = 8;

/// How the samples of a step differ from the sample order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFault {
    /// Samples that were delivered more than once, with the rank of every time.
    pub duplicates: Vec<(u64, Vec<u32>)>,
    /// Samples of the global batch that nobody delivered, with the rank that should have.
    pub missing: Vec<(u64, u32)>,
    /// Samples that do not belong to the global batch, with the rank that delivered them.
    pub foreign: Vec<(u64, u32)>,
    /// Samples that another rank should have delivered: sample, its rank, the rank that did.
    pub misplaced: Vec<(u64, u32, u32)>,
    /// Ranks that delivered their samples in another order.
    pub out_of_order: Vec<u32>,
}

/// Compares what the ranks delivered, joined in their order, with the samples due to each of them;
/// returns all samples, sorted.
///
/// # Errors
/// What differs. The parts are as long as `due` says, which the gathering itself makes sure of.
pub fn check(gathered: &[u64], due: &[Vec<u64>]) -> Result<Vec<u64>, AuditFault> {
    let mut ranks: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    let mut owners: BTreeMap<u64, u32> = BTreeMap::new();
    let mut fault = AuditFault::default();
    let mut rest = gathered;
    for (rank, due) in (0..).zip(due) {
        let (delivered, others) = rest.split_at(due.len().min(rest.len()));
        rest = others;
        for sample in delivered {
            ranks.entry(*sample).or_default().push(rank);
        }
        owners.extend(due.iter().map(|sample| (*sample, rank)));
        let sorted = |samples: &[u64]| {
            let mut samples = samples.to_vec();
            samples.sort_unstable();
            samples
        };
        if delivered != due && sorted(delivered) == sorted(due) {
            fault.out_of_order.push(rank);
        }
    }
    for (sample, by) in &ranks {
        match owners.get(sample) {
            None => fault.foreign.extend(by.iter().map(|rank| (*sample, *rank))),
            Some(owner) => {
                let others = by.iter().filter(|rank| *rank != owner);
                fault
                    .misplaced
                    .extend(others.map(|rank| (*sample, *owner, *rank)));
            }
        }
        if by.len() > 1 {
            fault.duplicates.push((*sample, by.clone()));
        }
    }
    let missing = owners
        .iter()
        .filter(|(sample, _)| !ranks.contains_key(sample));
    fault
        .missing
        .extend(missing.map(|(sample, rank)| (*sample, *rank)));
    if fault == AuditFault::default() {
        Ok(ranks.into_keys().collect())
    } else {
        Err(fault)
    }
}

impl fmt::Display for AuditFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let mut part = |what: &str, named: Vec<String>| {
            if named.is_empty() {
                return;
            }
            let more = match named.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let named = named[..named.len().min(NAMED)].join(", ");
            parts.push(format!("{what} {named}{more}"));
        };
        let duplicates = self.duplicates.iter().map(|(sample, ranks)| {
            let ranks: Vec<String> = ranks.iter().map(u32::to_string).collect();
            format!("{sample} (by ranks {})", ranks.join(" and "))
        });
        part("delivered more than once:", duplicates.collect());
        let of_rank = |(sample, rank): &(u64, u32)| format!("{sample} (rank {rank})");
        part("missing:", self.missing.iter().map(of_rank).collect());
        let foreign = self.foreign.iter().map(of_rank);
        part("not of this global batch:", foreign.collect());
        let misplaced = self
            .misplaced
            .iter()
            .map(|(sample, owner, rank)| format!("{sample} (rank {rank}, not {owner})"));
        part("on another rank:", misplaced.collect());
        let unordered = self
            .out_of_order
            .iter()
            .map(|rank| format!("of rank {rank}"));
        part("out of order: those", unordered.collect());
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due() -> Vec<Vec<u64>> {
        vec![vec![16, 19], vec![18, 17]]
    }

    #[track_caller]
    fn fault(gathered: [u64; 4]) -> AuditFault {
        check(&gathered, &due()).expect_err("a fault")
    }

    #[test]
    fn what_is_due_is_accepted_and_sorted() {
        assert_eq!(check(&[16, 19, 18, 17], &due()), Ok(vec![16, 17, 18, 19]));
        assert_eq!(check(&[], &[]), Ok(vec![]));
    }

    #[test]
    fn a_sample_of_two_ranks_is_named_with_both() {
        let fault = fault([16, 19, 18, 16]);
        assert_eq!(fault.duplicates, [(16, vec![0, 1])]);
        assert_eq!(fault.missing, [(17, 1)]);
        assert_eq!(fault.misplaced, [(16, 0, 1)]);
        assert_eq!(
            fault.to_string(),
            "delivered more than once: 16 (by ranks 0 and 1); missing: 17 (rank 1); on another rank: \
             16 (rank 1, not 0)"
        );
    }

    #[test]
    fn a_sample_twice_on_one_rank_is_named_too() {
        let fault = fault([16, 16, 18, 17]);
        assert_eq!(fault.duplicates, [(16, vec![0, 0])]);
        assert_eq!(fault.missing, [(19, 0)]);
    }

    #[test]
    fn foreign_exchanged_and_unordered_samples_are_told_apart() {
        let foreign = fault([16, 24, 18, 17]);
        assert_eq!(
            (foreign.foreign, foreign.missing),
            (vec![(24, 0)], vec![(19, 0)])
        );
        let exchanged = fault([16, 18, 19, 17]);
        assert_eq!(exchanged.misplaced, [(18, 1, 0), (19, 0, 1)]);
        assert!(exchanged.duplicates.is_empty() && exchanged.missing.is_empty());
        let unordered = fault([16, 19, 17, 18]);
        assert_eq!(unordered.out_of_order, [1]);
        assert_eq!(unordered.to_string(), "out of order: those of rank 1");
    }

    #[test]
    fn many_samples_are_counted() {
        let fault = check(&[0; 12], &[(0..12).collect()]).expect_err("a fault");
        assert!(fault.to_string().contains("and 3 more"), "{fault}");
    }
}
