//! Calls into other people's parsers of foreign bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a parser that may panic on broken input, as Parquet readers do; a panic becomes the error
/// that `panicked` makes of its message.
///
/// `parse` must own what it changes: it is dropped half-way through.
pub fn no_panic<T, E>(
    parse: impl FnOnce() -> Result<T, E>,
    panicked: impl FnOnce(String) -> E,
) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(parse)).unwrap_or_else(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied());
        Err(panicked(format!(
            "its parser gave up: {}",
            said.unwrap_or("no reason given")
        )))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        let run = |parse: fn() -> Result<u32, String>| no_panic(parse, |said| said);
        assert_eq!(run(|| Ok(3)), Ok(3));
        assert_eq!(run(|| Err("broken".into())), Err("broken".into()));
        let number = run(|| panic!("page {}", 7)).expect_err("panics");
        assert!(number.ends_with("gave up: page 7"), "{number}");
        let plain = run(|| panic!("no dictionary")).expect_err("panics");
        assert!(plain.ends_with("gave up: no dictionary"), "{plain}");
    }
}
