//! Adds the fix to error texts that have the same cause wherever they occur.

/// Appends the fix to an error text if the cause is too many open files, in the daemon or on the whole host.
///
/// Matches on the text, because many libraries pass the error on as text only.
#[must_use]
pub fn add_open_files_hint(mut error: String) -> String {
    let (limit, host) = ("raise the limit of open files", "raise the sysctl fs.file-max");
    if error.contains(TOO_MANY_ON_HOST) && !error.contains(host) {
        error = format!("{error}; {host}");
    } else if error.contains(TOO_MANY) && !error.contains(TOO_MANY_ON_HOST) && !error.contains(limit) {
        error = format!("{error}; {limit} (LimitNOFILE= in the unit; `prlimit --nofile` for a running daemon)");
    }
    error
}

/// `EMFILE` and `ENFILE`, as both the standard library and the C library spell them.
const TOO_MANY: &str = "Too many open files";
const TOO_MANY_ON_HOST: &str = "Too many open files in system";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_for_lack_of_descriptors_says_what_to_do() {
        let text =
            |errno: i32| add_open_files_hint(format!("cannot open it: {}", std::io::Error::from_raw_os_error(errno)));
        let fix = "; raise the limit of open files (LimitNOFILE= in the unit; `prlimit --nofile` for a running daemon)";
        assert_eq!(text(nix::libc::EMFILE), format!("cannot open it: Too many open files (os error 24){fix}"));
        assert!(text(nix::libc::ENFILE).ends_with("(os error 23); raise the sysctl fs.file-max"));
        assert_eq!(text(nix::libc::EPERM), "cannot open it: Operation not permitted (os error 1)");
        assert_eq!(add_open_files_hint(text(nix::libc::EMFILE)), text(nix::libc::EMFILE), "once is enough");
    }
}
