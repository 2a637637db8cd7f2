//! Numbers of users and groups on the command line.

/// A user's or a group's number.
pub(crate) fn parse(text: &str) -> Result<u32, String> {
    // The last number means "no change" to the kernel.
    text.parse().ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
        format!(
            "{text:?} is not a number: `id -u NAME` prints that of a user, `getent group NAME` that of a \
             group"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_refused_with_the_way_to_their_number() {
        assert_eq!(parse("1000"), Ok(1000));
        for text in ["root", "", "-1", "4294967295", "4294967296"] {
            assert!(parse(text).is_err_and(|error| error.contains("id -u NAME")), "{text}");
        }
    }
}
