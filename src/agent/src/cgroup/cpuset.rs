// SPDX-License-Identifier: Apache-2.0
//! Lists such as `0-3,7`, of CPUs and of memory nodes.

/// Ranges with both ends.
type Ranges = Vec<(u32, u32)>;

/// Reads a list.
pub(super) fn parse(text: &str) -> Option<Ranges> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = (first.parse().ok()?, last.parse().ok()?);
            (range.0 <= range.1).then_some(range)
        })
        .collect()
}

/// What both lists have.
pub(super) fn within(wanted: &[(u32, u32)], there: &[(u32, u32)]) -> Ranges {
    let mut both = Ranges::new();
    for wanted in wanted {
        for there in there {
            let range = (wanted.0.max(there.0), wanted.1.min(there.1));
            if range.0 <= range.1 {
                both.push(range);
            }
        }
    }
    both
}

/// Writes a list.
pub(super) fn words(ranges: &[(u32, u32)]) -> String {
    let words: Vec<String> = ranges
        .iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_s_list_is_cut_to_the_guest() {
        let cut = |wanted, guest| words(&within(&parse(wanted).unwrap(), &parse(guest).unwrap()));
        assert_eq!(cut("0-3,7", "0-1"), "0-1");
        assert_eq!(cut("1,3-9", "0-4"), "1,3-4");
        assert_eq!(cut("12-15", "0-1"), "");
        assert_eq!(cut("0", "0"), "0");
    }

    #[test]
    fn nonsense_is_no_list() {
        for wrong in ["x", "3-1", "1-", "-1", "1;2", "1-2-3"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
