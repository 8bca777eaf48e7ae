//! Ranges of addresses.

use std::ops::Range;

/// What is left of `range` without `holes`, in order.
pub(crate) fn without(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = vec![range];
    for hole in holes.iter().filter(|hole| !hole.is_empty()) {
        let cut =
            |part: Range<u64>| [part.start..part.end.min(hole.start), part.start.max(hole.end)..part.end];
        parts = parts.into_iter().flat_map(cut).collect();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_left_is_what_no_hole_has(
            range in (0_u64..64, 0_u64..64),
            holes in proptest::collection::vec((0_u64..64, 0_u64..64), 0..5),
        ) {
            let holes: Vec<_> = holes.into_iter().map(|(start, end)| start..end).collect();
            let left = without(range.0..range.1, &holes);
            for at in 0..64 {
                let expected = (range.0..range.1).contains(&at) && !holes.iter().any(|hole| hole.contains(&at));
                prop_assert_eq!(left.iter().filter(|part| part.contains(&at)).count(), usize::from(expected));
            }
            prop_assert!(left.iter().all(|part| !part.is_empty()));
            prop_assert!(left.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }
}
