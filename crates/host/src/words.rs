//! Guesses what a misspelled word was meant to be.

/// The nearest candidate, if no more than a third of its letters differ. Ignores case and `_`.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let (nearest, distance) =
        candidates.into_iter().map(|candidate| (candidate, distance(word, candidate))).min_by_key(|(_, far)| *far)?;
    (distance <= nearest.len() / 3).then_some(nearest)
}

/// The number of letters to insert, delete, change, or swap with their neighbor to turn one word into the other. Words
/// beyond 64 letters count as far from everything.
pub fn distance(one: &str, other: &str) -> usize {
    const LONGEST: usize = 64;
    if one.len().max(other.len()) > LONGEST {
        return usize::MAX;
    }
    let letters =
        |word: &str| -> Vec<char> { word.chars().filter(|c| *c != '_').flat_map(char::to_uppercase).collect() };
    let (one, other) = (letters(one), letters(other));
    let (mut before, mut last) = (Vec::new(), (0..=other.len()).collect::<Vec<_>>());
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let mut least = (last[j] + usize::from(a != b)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_near_what_it_was_meant_to_be_and_far_from_the_rest() {
        for (one, other, far) in [
            ("INFO", "info", 0),
            ("TUNNEL_ONEXIT", "TUNNEL_ON_EXIT", 0),
            ("inof", "INFO", 1),
            ("WARNIG", "WARNING", 1),
            ("LOG_LEVLE", "LOG_LEVEL", 1),
            ("", "ABC", 3),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!((distance(one, other), distance(other, one)), (far, far), "{one} {other}");
        }
        let levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"];
        assert_eq!(nearest("inof", levels), Some("INFO"));
        assert_eq!(nearest("eror", levels), Some("ERROR"));
        assert_eq!(nearest("verbose", levels), None);
        assert_eq!(nearest(&"x".repeat(10_000), levels), None);
    }
}
